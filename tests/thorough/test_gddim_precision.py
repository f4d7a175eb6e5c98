"""Accuracy of whole solves, in every dtype."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.solvers import Clock, DataSplitting

from ..helpers import (
    accurate,
    every_family,
    last,
    max_difference,
    mixture_for,
    prior_state,
    processes,
    slow,
    solve,
)


pytestmark = pytest.mark.precision


@pytest.mark.x64
def test_medians_of_the_error_on_a_mixture_under_cld():
    process = gd.CLD((1,))
    data = gd.GaussianMixture(jnp.array([[-1.0], [1.5]]), 0.3, jnp.array([0.4, 0.6]))
    term = gd.ProbabilityFlow(process, data.model(process))
    x, v = np.meshgrid([-1.5, -0.5, 0.5, 1.5], [-0.4, 0.4], indexing="ij")
    u = gd.Phase(jnp.asarray(x.reshape(-1, 1)), jnp.asarray(v.reshape(-1, 1)))
    exact = accurate(term, 1.0, 1e-3, u, rtol=1e-12).x
    # From an independent implementation in NumPy.
    expected = {
        (1, 10): 1.7e-1,
        (1, 50): 4.3e-2,
        (3, 50): 3.2e-3,
        (3, 100): 4.6e-4,
        (4, 50): 9.8e-4,
        (4, 100): 8.5e-5,
    }
    for (order, steps), median in expected.items():
        ts = gd.time_grid(process, steps, "quadratic")
        y = solve(term, gd.GDDIM(order, "noise"), ts, u)
        assert abs(np.median(np.abs(y.x - exact)) / median - 1) < 0.1


@pytest.mark.parametrize(
    "predicts, space, num_steps", [("data", "data", 1), ("noise", "noise", 2)]
)
def test_the_distribution_of_a_single_point_is_exact_in_one_step_or_two(
    predicts, space, num_steps
):
    process, point = gd.CLD((2,)), np.array([0.7, -0.3])
    model = gd.GaussianMixture(point[None]).model(process, predicts)
    flow, key = gd.ProbabilityFlow(process, model, predicts), jax.random.key(0)
    x, _ = gd.sample(flow, key, 4000, num_steps, gd.GDDIM(1, space), dtype=jnp.float32)
    # The solution of the equations of CLD, with M = 1/4, at beta t = 0.004.
    y = 2 * 0.004
    grown = 1 - np.exp(-2 * y) * (1 + 2 * y + 2 * y**2)
    variance = np.exp(-2 * y) * (1e-6 * (1 + y) ** 2 + (0.04 + 4e-6) * y**2) + grown
    deviation = np.asarray(x, np.float64) - (1 + y) * np.exp(-y) * point
    assert abs(np.sqrt((deviation**2).mean() / variance) - 1) < 0.03


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, steps, solver",
    [
        ("cld", 10, gd.GDDIM()),
        ("cld", 100, gd.GDDIM(3, "noise")),
        ("bdm", 10, gd.GDDIM()),
        *slow(("vp", 100, gd.GDDIM()), ("bdm", 100, gd.GDDIM(3, "noise"))),
    ],
)
def test_single_precision_agrees_with_double(name, steps, solver):
    process = processes[name]()
    data = mixture_for(process)
    y0 = prior_state(process, (64,))

    def run(dtype):
        cast = lambda tree: jtu.tree_map(lambda x: x.astype(dtype), tree)
        term = gd.ProbabilityFlow(process, cast(data).model(process))
        ts = gd.time_grid(process, steps, dtype=dtype)
        return solve(term, solver, ts, cast(y0))

    single, double = run(jnp.float32), run(jnp.float64)
    assert all(x.dtype == jnp.float32 for x in jtu.tree_leaves(single))
    x, expected = (np.float64(jtu.tree_leaves(y)[0]) for y in (single, double))
    # Paths that pass near the boundary between modes are sensitive: hence the median.
    # BDM amplifies its high frequencies, and rounding errors in them, a hundredfold.
    assert np.median(np.abs(x - expected)) < (3e-5 if name == "bdm" else 3e-6)
    assert np.quantile(np.abs(x - expected), 0.98) < 1e-3


@pytest.mark.parametrize("name", ("vp", "cld"))
@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_states_keep_their_dtype(name, dtype):
    process = processes[name]()

    def stationary(t, u, args):
        # Data that the process does not change: the noise prediction is R^T S^-1 u.
        if name == "cld":
            u = gd.Phase(u.x, process.mass_inverse * u.v)
        return process.factor(t).T.astype(jtu.tree_leaves(u)[0].dtype).mv(u)

    def run(dtype):
        y0 = jtu.tree_map(lambda x: x.astype(dtype), given)
        term = gd.ProbabilityFlow(process, stationary)
        return solve(term, gd.GDDIM(), ts.astype(dtype), y0)

    given = process.prior(jax.random.key(0), (2,), dtype)
    # Where rounding errors are hardly amplified.
    ts = gd.time_grid(process, 6, "uniform", t0=0.5, t1=0.25, dtype=dtype)
    y = run(dtype)
    assert all(x.dtype == dtype for x in jtu.tree_leaves(y))
    assert all(jnp.isfinite(x).all() for x in jtu.tree_leaves(y))
    if name == "vp":
        difference = np.float32(y) - np.float32(run(jnp.float32))
        assert np.abs(difference).max() < 20 * float(jnp.finfo(dtype).eps)


@pytest.mark.x64
def test_times_may_be_narrower_than_states():
    process = gd.VP((3,))
    term = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    y0 = prior_state(process)
    ts = gd.time_grid(process, 5, dtype=jnp.float32)
    y = solve(term, gd.GDDIM(), ts, y0)
    expected = solve(term, gd.GDDIM(), ts.astype(jnp.float64), y0)
    assert y.dtype == jnp.float64
    assert max_difference(y, expected) < 1e-12


@pytest.mark.parametrize("t0,dt0", ((1, -0.2), (1.0, -0.2), (np.float32(1), -0.2)))
def test_python_and_numpy_times(t0, dt0):
    process = gd.CLD((3,))
    term = gd.ProbabilityFlow(process, lambda t, u, args: u)
    y0 = prior_state(process)
    sol = dfx.diffeqsolve(term, gd.GDDIM(), t0, 0.2, dt0, y0)
    assert jnp.isfinite(last(sol.ys).x).all()


@pytest.mark.x64
@pytest.mark.parametrize("batch", ((), (0,), (1,), (2, 3)))
def test_any_batch_axes(batch):
    process = gd.BDM((2, 3, 1))
    term = gd.ProbabilityFlow(process, lambda t, u, args: u)
    y0 = prior_state(process, batch)
    y = solve(term, gd.GDDIM(), gd.time_grid(process, 4), y0)
    assert y.shape == (*batch, 2, 3, 1)
    assert process.decode(y).shape == (*batch, 2, 3, 1)


@pytest.mark.x64
@every_family
def test_coefficients_in_single_precision_survive_the_compiler(name):
    """`make test-all` runs this under XLA's default flags, and with most of its
    optimisations off, where it once took a term out of the clock's derivative."""
    process = processes[name]()
    ts = gd.time_grid(process, 20, dtype=jnp.float32)

    @jax.jit
    @jax.vmap
    def step(s, t):
        c = DataSplitting().integrate(process, s, t, 4, Clock())
        return c.linear, c.moments

    single = step(ts[:-1], ts[1:])
    double = step(ts[:-1].astype(jnp.float64), ts[1:].astype(jnp.float64))
    for a, b in zip(single, double):
        size = jnp.abs(b).reshape(20, -1).max(1)
        error = jnp.abs(a.astype(b.dtype) - b).reshape(20, -1).max(1) / size
        assert error.max() < 2e-5
