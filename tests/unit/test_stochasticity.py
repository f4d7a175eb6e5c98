"""Levels of noise: their derivatives, and levels that depend on time."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.integrate

import gddim_eqx as gd

from ..helpers import processes, slow, solve


def _end(process, solver, lam, model):
    ts = gd.time_grid(process, 6)
    u = process.prior(jax.random.key(0), (4,))
    terms = gd.reverse_sde(gd.ProbabilityFlow(process, model), lam, jax.random.key(3), (4,))
    state = solver.init(terms, ts[0], ts[1], u, None)

    def step(carry, ends):
        y, _, _, state, _ = solver.step(terms, *ends, carry[0], None, carry[1], False)
        return (y, state), None

    (y, _), _ = jax.lax.scan(step, (u, state), (ts[:-1], ts[1:]))
    return sum(x.sum() for x in jtu.tree_leaves(y))


@pytest.mark.x64
@pytest.mark.parametrize(
    "process, solver",
    [
        (gd.VP((1,)), gd.GDDIM(1)),
        (gd.VP((1,)), gd.GDDIM(1, "noise")),
        (gd.CLD((1,)), gd.GDDIM(1)),
        *slow((gd.CLD((1,)), gd.GDDIM(2)), (gd.CLD((1,)), gd.GDDIM(1, "noise"))),
    ],
)
def test_derivative_with_respect_to_the_level_is_right_at_zero_too(process, solver):
    model = gd.GaussianMixture(jnp.array([[1.0]]), 0.3).model(process)
    end = jax.jit(lambda lam: _end(process, solver, lam, model))
    both = jax.jit(jax.value_and_grad(lambda lam: _end(process, solver, lam, model)))
    end, gradient = ((lambda x, n=n: float(both(jnp.asarray(x))[n])) for n in (0, 1))
    step = 1e-4
    # Of second order, on the side where levels are.
    quotient = (4 * end(step) - end(2 * step) - 3 * end(0.0)) / (2 * step)
    np.testing.assert_allclose(gradient(0.0), quotient, rtol=1e-5)
    quotient = (end(0.5 + step) - end(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(gradient(0.5), quotient, rtol=1e-6)
    if solver.predictor.num_nodes == 1 and process.num_components == 1:
        assert abs(gradient(0.0) - 1.324) < 1e-3


@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_a_constant_function_is_the_level(name):
    process = processes[name]()
    for a, b in zip(
        gd.reverse_transition(process, 0.2, 0.5, lambda t: 0.7),
        gd.reverse_transition(process, 0.2, 0.5, 0.7),
    ):
        scale = float(jnp.abs(b.blocks).max())
        tolerance = 1e-12 if a.blocks.dtype == np.float64 else 2e-6
        np.testing.assert_allclose(a.blocks, b.blocks, atol=tolerance * scale)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", "cld"])
@pytest.mark.parametrize(
    "level", [lambda t: jnp.sqrt(t), lambda t: jnp.where(t > 0.3, 1.5, 0.0)]
)
def test_transition_for_a_level_that_depends_on_time(name, level):
    process = processes[name]()
    t, s = 0.3, 0.8
    n = process.num_components

    @jax.jit
    def operators(tau):
        noise = process.diffusion(tau) @ process.diffusion(tau).T
        return process.drift(tau).blocks, noise.blocks, process.covariance(tau).blocks

    def slope(tau, psi):
        """Of Psihat(tau, s), and of the covariance added since."""
        psi, covariance = psi.reshape(2, n, n)
        drift, noise, covariance_of_data = map(np.asarray, operators(tau))
        precision = np.linalg.inv(covariance_of_data)
        # Right of the jump, which is at the end of the interval.
        square = float(level(max(tau, t + 1e-12))) ** 2
        generator = drift + 0.5 * (1 + square) * noise @ precision
        grown = generator @ covariance + covariance @ generator.T - square * noise
        return np.stack([generator @ psi, grown]).ravel()

    start = np.stack([np.eye(n), np.zeros((n, n))]).ravel()
    solution = scipy.integrate.solve_ivp(slope, (s, t), start, rtol=1e-10, atol=1e-12)
    transition, covariance = solution.y[:, -1].reshape(2, n, n)
    # The level at `t` itself is that of the other side of the jump.
    got = gd.reverse_transition(process, t + 1e-13, s, level)
    np.testing.assert_allclose(got[0].blocks, transition, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(got[1].blocks, covariance, rtol=1e-7, atol=1e-8)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", "cld"])
def test_samples_of_one_point_are_exact_if_noise_is_added_in_an_interval(name):
    process = processes[name]()
    model = gd.GaussianMixture(jnp.ones((1, 3))).model(process)
    level = lambda t: jnp.where((0.1 < t) & (t < 0.6), 2.0, 0.0)
    key = jax.random.split(jax.random.key(0))
    terms = gd.reverse_sde(gd.ProbabilityFlow(process, model), level, key[0], (20_000,))
    # The true distribution at the start, and a grid that does not know of the jumps.
    u, _ = process.perturb(key[1], jnp.ones((20_000, 3)), 1.0)
    y = solve(terms, gd.GDDIM(), jnp.array([1.0, 0.7, 0.35, 0.2]), u)
    mean, covariance = process.transition(0.2, 0.0), process.covariance(0.2)
    n = process.num_components
    leaves = jnp.stack(jtu.tree_leaves(y))
    residual = leaves - mean.blocks[:, 0][:, None, None]
    got = jnp.einsum("iab,jab->ij", residual, residual) / residual[0].size
    assert got.shape == (n, n)
    np.testing.assert_allclose(got, covariance.blocks, rtol=0.05, atol=1e-3)


@pytest.mark.x64
def test_solvers_converge_to_one_sample_for_a_level_that_depends_on_time():
    process = gd.VP((2,))
    model = gd.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.3).model(process)
    terms = gd.reverse_sde(
        gd.ProbabilityFlow(process, model), jnp.sqrt, jax.random.key(0), (8,)
    )
    u = process.prior(jax.random.key(1), (8,))
    fine = solve(terms, dfx.Euler(), gd.time_grid(process, 500, 1.0), u)
    errors = [
        float(jnp.abs(solve(terms, gd.GDDIM(), ts, u) - fine).mean())
        for ts in (gd.time_grid(process, 25, 1.0), gd.time_grid(process, 200, 1.0))
    ]
    assert errors[1] < 0.4 * errors[0] < 0.1


@pytest.mark.parametrize("lam", [lambda t: -1.0, lambda t: jnp.inf])
def test_a_level_out_of_range_at_some_time_raises(lam):
    with pytest.raises(Exception, match="finite and not negative"):
        jax.block_until_ready(gd.reverse_transition(gd.VP((2,)), 0.2, 0.5, lam)[0].blocks)


@pytest.mark.parametrize(
    "lam", ["1", True, None, 1j, -0.5, jnp.ones(2), lambda t: jnp.ones(2)]
)
def test_what_is_no_level_raises(lam, without_type_checks):
    process = gd.VP((2,))
    model = gd.GaussianMixture(jnp.ones((1, 2))).model(process)
    with pytest.raises(ValueError, match="lam"):
        gd.sample(gd.ProbabilityFlow(process, model), jax.random.key(0), 4, 2, lam=lam)
