"""The symmetric splitting sampler."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import max_difference, mixture_for, NoNoise, prior_state, solve


_clds = (gd.CLD((2,)), gd.CLD((2,), beta=1.0, beta_slope=6.0, mass_inverse=2.0))


@pytest.mark.x64
def test_the_half_step_has_its_reference_matrix():
    transition, _ = gd.CLD((1,)).stationary_reversal(0.45, 0.5)
    expected = [0.938448064449895, -0.5362560368285116]
    expected += [0.13406400920712785, 0.40219202762138373]
    np.testing.assert_allclose(transition.as_matrix().ravel(), expected, atol=1e-15)


@pytest.mark.parametrize("process", _clds)
def test_the_half_step_is_exact_and_keeps_the_prior(process):
    s, t = jnp.asarray(0.6), jnp.asarray(0.45)
    transition, root = process.stationary_reversal(t, s)
    prior = process.prior_factor() @ process.prior_factor().T
    kept = transition @ prior @ transition.T + root @ root.T
    np.testing.assert_allclose(kept.blocks, prior.blocks, atol=1e-6)
    # d(transition)/dt = (F + G G^T / prior) transition, by small steps.
    times = jnp.linspace(0.6, 0.45, 2001)
    drift = jax.vmap(lambda t: process.drift(t).blocks)(0.5 * (times[1:] + times[:-1]))
    noise = jax.vmap(lambda t: process.diffusion(t).blocks)(0.5 * (times[1:] + times[:-1]))
    matrix = np.eye(2)
    for f, g in zip(np.asarray(drift, np.float64), np.asarray(noise, np.float64)):
        half = -0.5 * 0.15 / 2000 * (f + g @ g.T @ np.linalg.inv(prior.blocks))
        matrix = np.linalg.solve(np.eye(2) - half, (np.eye(2) + half) @ matrix)
    np.testing.assert_allclose(transition.blocks, matrix, atol=1e-5)
    short = process.stationary_reversal(jnp.asarray(0.0), jnp.asarray(1e-6))[1].blocks
    assert jnp.isfinite(short).all() and short[0, 0] > 0


@pytest.mark.skipif(jax.config.jax_enable_x64, reason="as good in single precision")
@pytest.mark.parametrize("process", _clds)
def test_is_exact_where_the_prior_is_the_distribution(process):
    number = 20_000

    def model(t, u, args):
        # The score of the prior.
        prior = process.prior_factor() @ process.prior_factor().T
        return jtu.tree_map(jnp.negative, prior.inverse().mv(u))

    u = process.prior(jax.random.key(0), (number,))
    flow = gd.ProbabilityFlow(process, model, "score")
    terms = gd.reverse_sde(flow, 1.0, jax.random.key(1), (number,), tol=1e-2)
    y = eqx.filter_jit(solve)(terms, gd.SSCS(), jnp.array([0.9, 0.6, 0.5, 0.1]), u)
    variance = 1 / process.mass_inverse
    for leaf, size in ((y.x, 1), (y.v, variance)):
        assert np.abs(leaf.mean(0) / np.sqrt(size / number)).max() < 4
        assert np.abs((leaf.var(0) / size - 1) / np.sqrt(2 / number)).max() < 4
    assert np.abs((y.x * y.v).mean(0) / np.sqrt(variance / number)).max() < 4


@pytest.mark.x64
def test_distributions_converge_with_the_first_order():
    """Exactly, by the mean for one normal component: the equation is linear there. It is
    the Euler step of the score that is of the first order."""
    process = gd.CLD((2,))
    data = gd.GaussianMixture([[1.0, -0.5]], 0.4)
    start, end = (
        process.transition(t, 0.0).mv(process.encode(data.means[0])) for t in (0.6, 0.2)
    )
    terms = gd.reverse_sde(
        gd.ProbabilityFlow(process, data.model(process)), 1.0, NoNoise(start)
    )
    run = eqx.filter_jit(lambda ts: solve(terms, gd.SSCS(), ts, start))
    errors = [
        max_difference(run(jnp.linspace(0.6, 0.2, n + 1)), end) for n in (32, 64, 128)
    ]
    observed = -np.polyfit(np.log([32, 64, 128]), np.log(errors), 1)[0]
    assert 0.95 < observed < 1.15


@pytest.mark.slow
@pytest.mark.x64
def test_follows_the_path_of_the_other_solvers():
    process = gd.CLD((2,))
    data = mixture_for(process, scale=0.6)
    u, _ = process.perturb(jax.random.key(1), data.sample(jax.random.key(0), 32), 0.7)
    terms = gd.reverse_sde(
        gd.ProbabilityFlow(process, data.model(process)), 1.0, jax.random.key(2), (32,)
    )
    run = eqx.filter_jit(lambda solver, ts: solve(terms, solver, ts, u).x)
    expected = run(gd.GDDIM(1), jnp.linspace(0.7, 0.3, 513))
    errors = [
        float(
            jnp.sqrt(
                ((run(gd.SSCS(), jnp.linspace(0.7, 0.3, n + 1)) - expected) ** 2).mean()
            )
        )
        for n in (16, 128)
    ]
    assert errors[1] < errors[0] / 5 and errors[1] < 0.05


@pytest.mark.parametrize(
    "process, lam, message",
    [
        (gd.VP((2,)), 1.0, "phase-space process `CLD`.*got VP"),
        (gd.CLD((2,)), 0.5, r"`reverse_sde\(..., lam=1.0\)`; got lam=0.5"),
    ],
)
def test_what_it_is_not_for_is_refused(process, lam, message):
    terms = gd.reverse_sde(
        gd.ProbabilityFlow(process, mixture_for(process).model(process)),
        lam,
        jax.random.key(0),
    )
    with pytest.raises(ValueError, match=message):
        solve(terms, gd.SSCS(), gd.time_grid(process, 2), prior_state(process))
