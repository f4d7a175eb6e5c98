import functools as ft
import pathlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import gddim_eqx as gd
from gddim_eqx._exponential import lagrange, NoiseSplitting, weights

from ..helpers import (
    every_process,
    processes,
)


pytestmark = pytest.mark.precision


X64 = jnp.result_type(float) == np.float64
EXACT = 1e-12 if X64 else 1e-5
# The most moments that are used, and one compilation for the steps of one grid.
NUMBER, STEPS = 4, 20


def moments(process, s, t, number):
    """Of a step in noise space."""
    return NoiseSplitting().integrate(process, s, t, number).moments


def authors_grid(process, number=STEPS, dtype=float):
    first, last = process.t_max**0.5, process.t_min**0.5
    return jnp.asarray(np.linspace(first, last, number + 1) ** 2, dtype)


def steps_of(process, direction=1, dtype=float, number=STEPS):
    """Starts and ends of the steps of a grid."""
    ts = authors_grid(process, number, dtype)[::direction]
    return ts[:-1], ts[1:]


@ft.cache
def _compiled(name):
    process = processes[name]()

    def fn(s, t):
        at_end, at_start = (
            process.factor(t),
            process.transition(t, s) @ process.factor(s),
        )
        return dict(
            many=moments(process, s, t, NUMBER),
            difference=(at_end - at_start).blocks,
            frames=[at_end.blocks, at_start.blocks],
        )

    return jax.jit(jax.vmap(fn))


def all_moments(name, s, t):
    """The moments of steps, `(steps, NUMBER, n, n, *spectrum)`, and the size of what
    they are differences of."""
    results = _compiled(name)(s, t)
    sizes = [np.abs(f).reshape(len(f), -1).max(1) for f in results["frames"]]
    return np.asarray(results["many"], float), np.max(sizes, axis=0)


def assert_close(actual, expected, tolerance):
    """Close up to a tolerance for each step, the first axis."""
    error = np.abs(actual - expected).reshape(len(actual), -1).max(1)
    assert (error <= tolerance).all()


# Against the formula in the paper, by brute force.

PANELS = 64
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


@ft.cache
def _integrand(name):
    process = processes[name]()

    def at(t, tau):
        """1/2 Psi(t, tau) G G^T R_tau^-T."""
        diffusion, turned = process.diffusion(tau), process.factor(tau).inverse().T
        return (process.transition(t, tau) @ diffusion @ diffusion.T @ turned / 2).blocks

    return jax.jit(jax.vmap(at, in_axes=(None, 0)))


def brute_force(name, s, t):
    """The moments of one step by 64 panels of 16 nodes, ever shorter towards time 0 and
    towards where the signal vanishes."""
    end = processes[name]().t_zero_signal
    first, last = np.log(s / (1 - s / end)), np.log(t / (1 - t / end))
    edges = np.exp(np.linspace(first, last, PANELS + 1))
    edges = edges / (1 + edges / end)
    edges[0], edges[-1] = s, t
    half = np.diff(edges)[:, None] / 2
    tau = (edges[:-1, None] + half * (1 + NODES)).ravel()
    values = np.asarray(_integrand(name)(jnp.asarray(t), jnp.asarray(tau)))
    x, weight = (tau - s) / (t - s), (half * NODE_WEIGHTS).ravel()
    rules = weight * x ** np.arange(NUMBER)[:, None]
    return np.tensordot(rules, values, 1)


def _tolerance(name):
    # It is not smooth at its thousand indices, which limits both quadratures.
    return 1e-6 if name == "discrete" else 1e-11


@pytest.mark.x64
@every_process
def test_moments_are_the_integrals_in_the_paper(name):
    for direction in (1, -1):
        s, t = steps_of(processes[name](), direction)
        values, size = all_moments(name, s, t)
        for k in (0, 1, 7, 13, 18, 19):
            expected = brute_force(name, float(s[k]), float(t[k]))
            assert values[k].shape == expected.shape
            assert np.abs(values[k] - expected).max() <= _tolerance(name) * size[k]


@pytest.mark.x64
@every_process
def test_moments_of_long_steps(name):
    s, t = steps_of(processes[name](), number=5)
    values, size = all_moments(name, s, t)
    for k in range(5):
        expected = brute_force(name, float(s[k]), float(t[k]))
        assert np.abs(values[k] - expected).max() <= _tolerance(name) * size[k]


@pytest.mark.x64
@every_process
def test_moments_in_float32(name):
    for direction in (1, -1):
        s, t = steps_of(processes[name](), direction, jnp.float32)
        single, _ = all_moments(name, s, t)
        exact, size = all_moments(name, *(x.astype(jnp.float64) for x in (s, t)))
        assert_close(single, exact, 1e-5 * size)


@every_process
def test_first_moment_is_the_difference_of_the_frames(name):
    steps = steps_of(processes[name]())
    values, size = all_moments(name, *steps)
    difference = np.asarray(_compiled(name)(*steps)["difference"], float)
    assert_close(values[:, 0], difference, EXACT * size)


@pytest.mark.parametrize("name", ["vp", "bdm"])
def test_one_moment_is_the_first_of_many(name):
    process = processes[name]()
    s, t = steps_of(process)
    first = jax.jit(jax.vmap(lambda s, t: moments(process, s, t, 1)))(s, t)
    values, size = all_moments(name, s, t)
    assert first.shape == (STEPS, 1, *values.shape[2:])
    assert_close(values[:, :1], first, EXACT * size)


@every_process
def test_moments_of_a_step_without_length_vanish(name):
    s, _ = steps_of(processes[name]())
    values, size = all_moments(name, s, s)
    assert_close(values, 0, EXACT * size)


@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_gradients_through_a_step_without_length_are_finite(name):
    process = processes[name]()

    def total(s, t, u):
        nodes = jnp.stack([jnp.zeros_like(s), jnp.ones_like(s)])
        polynomials = lagrange(nodes, jnp.array([True, False]))
        return (u * weights(polynomials, moments(process, s, t, 2))).sum()

    @jax.jit
    def gradients_and_rate(t):
        """As the step grows from no length its coefficient grows by dR/dt - F R."""
        frame = lambda t: process.factor(t).blocks
        value, rate = jax.jvp(frame, (t,), (jnp.ones_like(t),))
        operators = [gd.BlockLinearOperator(b, process.shape) for b in (value, rate)]
        growth = operators[1] - process.drift(t) @ operators[0]
        return jax.grad(total, (0, 1, 2))(t, t, jnp.ones_like(t)), growth.blocks.sum()

    gradients, rate = gradients_and_rate(jnp.array(0.4 * process.t_max))
    tolerance = 1e-9 if X64 else 1e-3
    np.testing.assert_allclose(gradients, [-rate, rate, 0], rtol=tolerance, atol=1e-5)


@every_process
def test_steps_to_and_from_time_zero_are_finite(name):
    process = processes[name]()
    t = jnp.linspace(process.t_min, process.t_max, STEPS)
    for s, e in [(t, jnp.zeros_like(t)), (jnp.zeros_like(t), t)]:
        assert np.isfinite(all_moments(name, s, e)[0]).all()


# Polynomials through stored values.

gaps = st.tuples(*[st.floats(0.25, 2, width=32)] * (NUMBER - 1))
masks = st.tuples(*[st.booleans()] * NUMBER).filter(any)
numbers = st.tuples(*[st.floats(-1, 1, width=32)] * NUMBER)
_lagrange = jax.jit(lagrange)


def nodes_from(gaps, mask, junk=0.0):
    """Node 0 is the step's start, older ones lie behind it; unused ones hold junk."""
    nodes = -np.concatenate([[0], np.cumsum(gaps)])
    return np.where(mask, nodes, junk)


def polynomials_through(nodes, mask):
    return np.asarray(_lagrange(jnp.asarray(nodes, float), jnp.array(mask)), float)


@given(gaps, masks, st.sampled_from([0.0, -1.0, 1e3]))
def test_lagrange_polynomials_interpolate(gaps, mask, junk):
    mask, nodes = np.array(mask), nodes_from(gaps, mask, junk)
    polynomials = polynomials_through(nodes, mask)
    assert (polynomials[~mask] == 0).all()
    assert (polynomials[:, mask.sum() :] == 0).all()
    powers = nodes[mask][:, None] ** np.arange(NUMBER)
    size = np.abs(polynomials) @ np.abs(powers.T) + 1
    at_nodes = polynomials @ powers.T
    assert (np.abs(at_nodes - np.eye(NUMBER)[:, mask]) <= EXACT * size).all()


@given(gaps, masks)
def test_lagrange_polynomials_add_up_to_one(gaps, mask):
    polynomials = polynomials_through(nodes_from(gaps, mask), mask)
    error = np.abs(polynomials.sum(0) - np.eye(NUMBER)[0])
    assert (error <= EXACT * (1 + np.abs(polynomials).sum(0))).all()


@given(gaps, masks, st.sampled_from(sorted(processes)))
def test_coefficients_of_any_order_add_up_to_that_of_order_1(gaps, mask, name):
    values, size = all_moments(name, *steps_of(processes[name]()))
    polynomials = polynomials_through(nodes_from(gaps, mask), mask)
    coefficients = weights(jnp.asarray(polynomials), jnp.asarray(values[9]))
    error = np.abs(coefficients.sum(0) - values[9, 0])
    assert error.max() <= 10 * EXACT * size[9] * (1 + np.abs(polynomials).sum())


@given(gaps, numbers, st.integers(1, NUMBER))
def test_coefficients_integrate_polynomials_exactly(gaps, numbers, order):
    """A noise prediction that is a polynomial of degree below the order."""
    values, size = all_moments("cld", *steps_of(gd.CLD((3,))))
    mask = np.arange(NUMBER) < order
    nodes = nodes_from(gaps, mask)
    polynomial = np.where(mask, numbers, 0)
    at_nodes = (nodes[:, None] ** np.arange(NUMBER)) @ polynomial
    polynomials = polynomials_through(nodes, mask)
    coefficients = weights(jnp.asarray(polynomials), jnp.asarray(values[9]))
    expected = np.tensordot(polynomial, values[9], 1)
    error = np.abs(np.tensordot(np.where(mask, at_nodes, 0), coefficients, 1) - expected)
    bound = np.abs(polynomials).sum() * (1 + np.abs(at_nodes).max())
    assert error.max() <= 10 * EXACT * size[9] * bound


# Numbers computed elsewhere.


def coefficients_of_grid(process, ts, order):
    """The coefficients of every step, newest value first, `(steps, order, n, n)`."""

    @jax.jit
    @jax.vmap
    def step(s, t, times, valid):
        nodes = (times - s) / (t - s)
        return weights(lagrange(nodes, valid), moments(process, s, t, order))

    steps, ages = np.arange(len(ts) - 1)[:, None], np.arange(order)
    return step(ts[:-1], ts[1:], ts[np.maximum(steps - ages, 0)], steps >= ages)


def test_agreement_with_the_authors_tables():
    path = pathlib.Path(__file__).parents[1] / "fixtures" / "authors_cld_q3_50.npz"
    with np.load(path) as file:
        ts, table = file["ts"], file["coef"]
    process = gd.CLD((3,))
    ts = jnp.asarray(ts, float)
    transition = jax.vmap(lambda t, s: process.transition(t, s).blocks)(ts[1:], ts[:-1])
    coefficients = coefficients_of_grid(process, ts, 3)
    ours = np.concatenate([transition[:, None], coefficients], 1)
    assert table.shape == (49, 5, 2, 2) and (table[:, 4] == 0).all()
    np.testing.assert_allclose(ours, table[:, :4], atol=1e-4)


def test_vp_reference_step():
    process = gd.VP((3,))
    ts = authors_grid(process, 10)
    step = 5
    np.testing.assert_allclose(
        ts[step : step + 2], [0.266061388301, 0.175538932769], rtol=EXACT + 1e-11
    )
    transition = process.transition(ts[step + 1], ts[step]).blocks
    np.testing.assert_allclose(transition, 1.225563185087, rtol=EXACT + 1e-11)
    coefficients = coefficients_of_grid(process, ts, 3)[step]
    expected = [-0.596072636263, 0.324567647007, -0.084853508507]
    np.testing.assert_allclose(np.ravel(coefficients), expected, atol=EXACT + 1e-11)
