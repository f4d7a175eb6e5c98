"""`LinearSDE` knows a process from F and G alone: here it is the oracle of the closed
forms, and they are its."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    every_process,
    processes,
)


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


def _methods(t, s):
    one = dict.fromkeys(("covariance", "factor", "cholesky"), (t,))
    return one | {"transition": (t, s)}


@pytest.mark.x64
@every_process
def test_closed_forms_agree_with_the_differential_equations(name):
    if name == "discrete":
        pytest.skip("is only smooth between its thousand indices")
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

        @jax.jit
        @jax.vmap
        def blocks(t, s):
            return [
                {
                    method: getattr(which, method)(*times).blocks
                    for method, times in _methods(t, s).items()
                }
                for which in (solved, process)
            ]

        both = blocks(t, s)
        for method in both[0]:
            got, expected = (np.asarray(values[method], np.float64) for values in both)
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
    x, _ = gd.sample(
        gd.ProbabilityFlow(process, data.model(process)), jax.random.key(0), 8, 1
    )
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


def _decay(rate, diffusion, **times):
    """Constant coefficients: the arguments, the standard deviation and the transition."""

    def std(t):
        grown = -np.expm1(-2 * rate * t) / (2 * rate) if rate else t
        return diffusion * np.sqrt(grown)

    @np.errstate(over="ignore")
    def transition(t, s):
        return np.exp(-rate * (t - s))

    arguments = lambda t: -rate + 0 * t, lambda t: diffusion + 0 * t
    return arguments, times, std, transition


def _flow_matching(t_end):
    arguments = lambda t: -1 / (1 - t), lambda t: (2 * t / (1 - t)) ** 0.5
    times = dict(t_end=t_end)
    return arguments, times, lambda t: t, lambda t, s: (1 - t) / (1 - s)


def _sub_vp_that_cancels(t_min):
    rate, integral = lambda t: 0.1 + 19.9 * t, lambda t: 0.1 * t + 9.95 * t**2
    arguments = (
        lambda t: -0.5 * rate(t),
        lambda t: (rate(t) * (1 - jnp.exp(-2 * integral(t)))) ** 0.5,
    )
    transition = lambda t, s: np.exp(-0.5 * (integral(t) - integral(s)))
    return arguments, dict(t_min=t_min), lambda t: -np.expm1(-integral(t)), transition


def _kink():
    integral = lambda t: (np.abs(t - 0.37) * (t - 0.37) + 0.37**2) / 2
    arguments = lambda t: 0 * t, lambda t: abs(t - 0.37) ** 0.5
    return arguments, {}, lambda t: integral(t) ** 0.5, lambda t, s: 1 + 0 * t


scales = {
    "long": _decay(0.005, 0.1, t_end=1000.0),
    "very long": _decay(5e-5, 0.01, t_end=1e5),
    "many relaxation times": _decay(5.0, 10**0.5, t_end=200.0),
    "fast": _decay(400.0, 1.0),
    "short": _decay(1e6, 1.0, t_min=1e-9, t_end=1e-6),
    "early": _decay(5.0, 10**0.5, t_min=1e-6),
    "very early": _decay(5.0, 10**0.5, t_min=1e-10),
    "slow": _decay(1e-6, 1e-8),
    "growing": _decay(-5.0, 1.0, t_end=10.0),
    "no drift": _decay(0.0, 1e8, t_end=1e5),
    "EDM": (
        (lambda t: 0 * t, lambda t: (2 * t) ** 0.5),
        dict(t_min=0.002, t_end=80.0),
        lambda t: t,
        lambda t, s: 1 + 0 * t,
    ),
    "flow matching": _flow_matching(0.9999),
    "flow matching to 1e-5": _flow_matching(0.99999),
    "flow matching to 1e-7": _flow_matching(1 - 1e-7),
    "flow matching to 1e-9": _flow_matching(1 - 1e-9),
    "cosine": (
        (
            lambda t: -0.5 * np.pi * jnp.tan(0.5 * np.pi * t),
            lambda t: (np.pi * jnp.tan(0.5 * np.pi * t)) ** 0.5,
        ),
        dict(t_end=0.9999),
        lambda t: np.sin(0.5 * np.pi * t),
        lambda t, s: np.sin(0.5 * np.pi * (1 - t)) / np.sin(0.5 * np.pi * (1 - s)),
    ),
    "rounding errors": _sub_vp_that_cancels(1e-5),
    "kink": _kink(),
}


@pytest.mark.parametrize("name", scales)
def test_resolution_scales_with_the_process(name):
    arguments, times, std, transition = scales[name]
    process = gd.LinearSDE((2,), *arguments, **times)
    rng = np.random.default_rng(0)
    first, last = process.t_min, process.t_end
    t = first * (last / first) ** rng.uniform(size=60)
    t = np.concatenate([t, last * (1 - 10 ** -rng.uniform(0, 10, 40)), [first, last]])
    t = np.clip(t, first, last)
    s = rng.permutation(t)

    @jax.jit
    @jax.vmap
    def values(t, s):
        roots = process.factor(t), process.cholesky(t)
        return [x.blocks[0, 0] for x in (*roots, process.transition(t, s))]

    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 2e-11)):
        if dtype == np.float64 and not jax.config.jax_enable_x64:
            continue
        rounded = [np.minimum(np.float64(x.astype(dtype)), last) for x in (t, s)]
        for got, expected in zip(
            values(*(jnp.asarray(x, dtype) for x in (t, s))),
            (std(rounded[0]), std(rounded[0]), transition(*rounded)),
        ):
            got = np.asarray(got, np.float64)
            largest = np.finfo(dtype).max
            # Beyond what the dtype can hold: a huge number, or zero.
            assert (got[expected > largest] > 0.01 * largest).all()
            assert np.isfinite(got).all()
            assert (np.abs(got[expected < 1 / largest]) < 1e-37).all()
            held = (expected < 0.1 * largest) & (expected > 100 / largest)
            np.testing.assert_allclose(got[held], expected[held], rtol=tolerance)


@pytest.mark.x64
@pytest.mark.parametrize("kwargs", [dict(t_end=100.0), dict(t_min=1e-7)], ids=str)
def test_matrices_on_other_scales(kwargs):
    process = gd.CLD((2,), **kwargs)
    solved = _like(process)
    span = np.log(process.t_max / process.t_min)
    t = process.t_min * np.exp(span * np.random.default_rng(0).uniform(size=50))
    for method in ("covariance", "factor"):
        got, expected = (
            np.asarray(jax.jit(jax.vmap(lambda t: getattr(p, method)(t).blocks))(t))
            for p in (solved, process)
        )
        scale = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(got - expected) / scale).max() < 1e-11, method
    # Backward too, over spans whose decay cannot be inverted in float32.
    back = solved.transition(jnp.float32(0), jnp.float32(process.t_max)).blocks
    assert np.isfinite(back).all()


@pytest.mark.x64
def test_third_order_from_a_singular_start():
    """Noise reaches the first component by way of two others: variances of t^5, t^3 and
    t, whose correlations are those of the integrals of Brownian motion."""
    chain = jnp.array([[0, 1.0, 0], [0, 0, 1], [0, 0, 0]])
    process = gd.LinearSDE(
        (2,),
        lambda t: chain.astype(t.dtype),
        lambda t: jnp.diag(jnp.array([0, 0, 1.0], t.dtype)),
        t_end=50.0,
    )
    for t in (1e-3, 1.0, 50.0):
        powers = [
            [t**5 / 20, t**4 / 8, t**3 / 6],
            [t**4 / 8, t**3 / 3, t**2 / 2],
            [t**3 / 6, t**2 / 2, t],
        ]
        factor = process.factor(t)
        np.testing.assert_allclose((factor @ factor.T).blocks, powers, rtol=1e-10)
        np.testing.assert_allclose(
            process.cholesky(t).blocks, np.linalg.cholesky(powers), rtol=1e-9
        )


def test_one_component_decays_and_another_does_not():
    rates = jnp.array([5.0, 0.0])
    process = gd.LinearSDE(
        (2,),
        lambda t: jnp.diag(-rates).astype(t.dtype) + 0 * t,
        lambda t: jnp.eye(2, dtype=t.dtype),
        t_end=100.0,
    )
    end, start = jnp.float32(100), jnp.float32(0)
    np.testing.assert_array_equal(process.transition(end, start).blocks, np.diag([0, 1.0]))
    back = process.transition(start, end).blocks
    np.testing.assert_array_equal(back, np.diag([np.finfo(np.float32).max, 1]))


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
    with pytest.raises(ValueError, match="`t_min` < `t_max` <= `t_end`"):
        gd.LinearSDE((2,), lambda t: -one(t), one, t_max=2.0)


def test_refusals_name_what_is_wrong():
    one = lambda t: jnp.ones_like(t)
    rough = lambda t: jnp.where(t > 0.3712, -1.0, -2.0)
    with pytest.raises(ValueError, match="`drift` could not be resolved near t = 0.371"):
        gd.LinearSDE((2,), rough, one)
    with pytest.raises(ValueError, match="`diffusion` could not be resolved near t = 0.37"):
        gd.LinearSDE((2,), lambda t: -one(t), rough)
    with pytest.raises(ValueError, match="`drift` could not be resolved near t = 1.* end"):
        gd.LinearSDE((2,), lambda t: -1 / (1 - t), one)
    with pytest.raises(ValueError, match="`diffusion` must be finite .* near t = "):
        gd.LinearSDE((2,), lambda t: -one(t), lambda t: jnp.sqrt(0.7 - t))
    with pytest.raises(ValueError, match="covariance overflows near t = 7[01]"):
        gd.LinearSDE((2,), lambda t: 5 * one(t), one, t_end=400.0)
    with pytest.raises(ValueError, match="must be positive definite .* near t = 0"):
        gd.LinearSDE((2,), lambda t: -one(t), lambda t: jnp.maximum(t - 0.5, 0))
    with pytest.raises(ValueError, match="`drift` could not be resolved .* may cancel"):
        gd.LinearSDE((2,), lambda t: (1 - 1e14) - (t - 1e14), one)
    with pytest.raises(ValueError, match="`initial_covariance` must be symmetric"):
        eye = lambda t: jnp.eye(2, dtype=t.dtype)
        gd.LinearSDE((2,), eye, eye, np.array([[1.0, 0.5], [0.0, 1.0]]))


def test_rough_on_all_scales_ends(monkeypatch):
    monkeypatch.setattr("gddim_eqx._process.linear_sde_solution._MOST_PANELS", 100)
    with pytest.raises(ValueError, match="changes too often .* reach t = .* `drift`"):
        gd.LinearSDE((2,), lambda t: jnp.sin(1e6 * t), lambda t: jnp.ones_like(t))
