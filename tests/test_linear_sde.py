"""`LinearSDE` knows a process from F and G alone: here it is the oracle of the closed
forms, and they are its."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import processes


def _like(process):
    with jax.enable_x64(True):
        initial = np.asarray(process.covariance(np.float64(0)).blocks)
    return gd.LinearSDE(
        process.shape,
        process.drift,
        process.diffusion,
        initial,
        basis=process.basis,
        data_scale=process.data_scale,
        t_min=process.t_min,
        t_end=process.t_max,
    )


@pytest.mark.x64
@pytest.mark.parametrize("name", processes)
def test_closed_forms_agree_with_the_differential_equations(name):
    process = processes[name]()
    solved = _like(process)
    rng = np.random.default_rng(0)
    span = np.log(process.t_max / process.t_min)
    times = np.exp(np.log(process.t_min) + span * rng.uniform(size=(2, 100)))
    times[:, 0], times[:, 1] = process.t_min, process.t_max
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.float64, 1e-11)):
        if dtype == jnp.float64 and not jax.config.jax_enable_x64:
            continue
        t, s = jnp.clip(jnp.asarray(times, dtype), max=process.t_max)
        for method in ("covariance", "factor", "cholesky", "transition"):
            arguments = (t, s) if method == "transition" else (t,)

            def blocks(which):
                fn = lambda *a: getattr(which, method)(*a).blocks
                return np.asarray(jax.jit(jax.vmap(fn))(*arguments), np.float64)

            got, expected = blocks(solved), blocks(process)
            expected = expected.reshape(expected.shape + (1,) * (got.ndim - expected.ndim))
            scale = np.abs(expected).max(axis=2, keepdims=True)
            assert (np.abs(got - expected) / scale).max() < 2 * tolerance, method


@pytest.mark.x64
def test_third_order_langevin_dynamics():
    def drift(t):
        return 6 * jnp.array([[0, 1.0, 0], [-1, 0, 1.5], [0, -1.5, -3]], t.dtype)

    def diffusion(t):
        return jnp.diag(jnp.array([0, 0, 6.0], t.dtype))

    process = gd.LinearSDE((2,), drift, diffusion, np.diag([1e-4, 0.1, 0.1]))
    u = process.prior(jax.random.key(0), (5,))
    assert [x.shape for x in u] == [(5, 2)] * 3
    data = gd.GaussianMixture([[0.3, -0.4]], 0.0)
    x, _ = gd.sample(process, data.model(process), jax.random.key(0), 8, 1)
    # One step is exact, up to the noise that is left at `t_min`.
    np.testing.assert_allclose(x, np.broadcast_to([0.3, -0.4], (8, 2)), atol=0.06)


def test_scalar_coefficients_and_use_under_jit():
    @jax.jit
    def mean(x):
        process = gd.LinearSDE((2,), lambda t: -t, lambda t: (2 * t) ** 0.5)
        return process.transition(0.5, 0.1).mv(x)

    np.testing.assert_allclose(mean(jnp.ones(2)), np.exp(-0.12), rtol=1e-6)


def test_factors_at_time_zero_from_a_singular_start():
    process = gd.LinearSDE(
        (2,),
        lambda t: 4 * jnp.array([[0, 4.0], [-1, -4]], t.dtype),
        lambda t: jnp.array([[0, 0], [0, 8.0**0.5]], t.dtype),
    )
    for t in (0.0, 1e-8):
        factor = process.factor(t)
        np.testing.assert_allclose(
            (factor @ factor.T).blocks, process.covariance(t).blocks, atol=1e-7
        )
    limit = gd.CLD((2,), gamma=0.0, epsilon=1e-14)
    np.testing.assert_allclose(
        process.cholesky(1e-3).blocks, limit.cholesky(1e-3).blocks, rtol=1e-5
    )


def test_what_cannot_be_solved_is_refused():
    one = lambda t: jnp.ones_like(t)
    with pytest.raises(ValueError, match="resolved near t = 0.37"):
        gd.LinearSDE((2,), lambda t: -t, lambda t: jnp.where(t > 0.3712, 1.0, 2.0))
    with pytest.raises(ValueError, match="near t = 0.49|near t = 0.5"):
        gd.LinearSDE((2,), lambda t: 1 / (0.5 - t), one)
    with pytest.raises(ValueError, match=r"`diffusion` must be made of 2 x 2 blocks"):
        gd.LinearSDE((2,), lambda t: jnp.eye(2), one)
    with pytest.raises(ValueError, match="positive definite after time 0"):
        gd.LinearSDE((2,), lambda t: -one(t), lambda t: 0 * t)
    with pytest.raises(ValueError, match="must be finite on the whole"):
        gd.LinearSDE((2,), lambda t: jnp.log(t - 0.5), one)
    with pytest.raises(ValueError, match="`initial_covariance` must be positive semi"):
        gd.LinearSDE((2,), lambda t: -one(t), one, -1.0)
    with pytest.raises(ValueError, match="t_min < t_max <= t_end"):
        gd.LinearSDE((2,), lambda t: -one(t), one, t_max=2.0)
