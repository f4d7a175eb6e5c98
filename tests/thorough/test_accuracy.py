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
    every_process,
    flow_of,
    forward,
    last,
    max_difference,
    mixture_for,
    prior_state,
    processes,
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
        ("vp", 100, gd.GDDIM()),
        ("bdm", 100, gd.GDDIM(3, "noise")),
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
    flow = flow_of("vp")
    y0 = prior_state(flow.process)
    ts = gd.time_grid(flow.process, 5, dtype=jnp.float32)
    y = solve(flow, gd.GDDIM(), ts, y0)
    expected = solve(flow, gd.GDDIM(), ts.astype(jnp.float64), y0)
    assert y.dtype == jnp.float64
    assert max_difference(y, expected) < 1e-12


@pytest.mark.parametrize("t0", (1, 1.0, np.float32(1)))
def test_python_and_numpy_times(t0):
    flow = gd.ProbabilityFlow(gd.CLD((3,)), lambda t, u, args: u)
    y0 = prior_state(flow.process)
    sol = dfx.diffeqsolve(flow, gd.GDDIM(), t0, 0.2, -0.2, y0, adjoint=forward)
    assert jnp.isfinite(last(sol.ys).x).all()


@pytest.mark.x64
@pytest.mark.parametrize("batch", ((), (0,), (1,), (2, 3)))
def test_any_batch_axes(batch):
    process = gd.BDM((2, 3, 1))
    flow = gd.ProbabilityFlow(process, lambda t, u, args: u)
    y = solve(flow, gd.GDDIM(), gd.time_grid(process, 4), prior_state(process, batch))
    assert y.shape == process.decode(y).shape == (*batch, 2, 3, 1)


def _ring_error(process, solver, num_steps, grid="clock"):
    """The median error on a ring of normals, against many steps."""
    angle = np.pi / 4 * np.arange(8)
    ring = gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    flow, u = gd.ProbabilityFlow(process, ring.model(process)), prior_state(process, (256,))
    grids = gd.time_grid(process, num_steps, grid), gd.time_grid(process, 400)
    x, y = (solve(flow, s, ts, u) for s, ts in zip((solver, gd.GDDIM()), grids))
    distance = jnp.linalg.norm(process.decode(x) - process.decode(y), axis=-1)
    return float(jnp.median(distance))


@pytest.mark.x64
@pytest.mark.parametrize("process", (gd.VP((2,)), gd.CLD((2,))), ids=("vp", "cld"))
def test_samples_are_more_accurate_than_the_papers(process):
    papers = gd.GDDIM(3, "noise")
    ours = _ring_error(process, gd.GDDIM(), 30)
    assert 4 * ours < _ring_error(process, papers, 30, "quadratic")
    # The Cholesky factor is the same without a velocity, and far worse with one.
    cholesky = gd.GDDIM(3, "noise", frame="cholesky")
    errors = [_ring_error(process, s, 10, "quadratic") for s in (papers, cholesky)]
    if isinstance(process, gd.VP):
        np.testing.assert_allclose(*errors, rtol=1e-9)
    else:
        assert errors[1] > 100 * errors[0]


@pytest.mark.x64
@pytest.mark.parametrize("coordinate", ["log_snr", "clock"])
def test_several_steps_below_t_min(coordinate):
    flow, solver = flow_of("vp"), gd.GDDIM(coordinate=coordinate)
    process, y0 = flow.process, prior_state(flow.process)
    ts = np.append(gd.time_grid(process, 40), process.t_min * np.array([0.5, 0.2, 0.05]))
    exact = accurate(flow, ts[0], ts[-1], y0)
    assert max_difference(solve(flow, solver, ts, y0), exact) < 0.01


@every_process
def test_all_predictions_of_one_model_give_the_same_initial_state(name):
    process = processes[name]()
    u, t = prior_state(process, (2,)), jnp.asarray(0.4 * process.t_max)
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    clean = flow.denoised(t, u, None)
    data = jtu.tree_map(lambda x: x / process.data_scale, clean)
    predictions = {"data": data, "score": flow.score(t, u, None)}
    if process.num_components == 1:
        mean = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        v = mean.mv(flow.noise(t, u, None)) - process.factor(t).mv(data)
        velocity = flow.vf(t, u, None) / process.flow_speed(t)
        predictions |= {"v": v, "flow": velocity}
    tolerance = 1e-9 if jax.config.jax_enable_x64 else 2e-2
    for predicts, value in predictions.items():
        model = lambda t, u, args, value=value: process.to_data(value)
        other = gd.ProbabilityFlow(process, model, predicts).denoised(t, u, None)
        assert max_difference(other, clean) < tolerance * (1 + max_difference(clean, u))


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
