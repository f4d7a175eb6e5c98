"""The exact transition and covariance of the reverse diffusion of one data point."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

import gddim_eqx as gd
from gddim_eqx._exponential import noise_transition, step_nodes
from gddim_eqx._linear import align, join_components

from ..helpers import (
    every_family,
    forward,
    last,
    max_difference,
    processes,
    slow,
)


_noise_transition = jax.jit(
    lambda process, s, t, lam: noise_transition(step_nodes(process, s, t), lam),
    static_argnums=0,
)


@ft.partial(jax.jit, static_argnums=0)
def _transition(process, t, s, lam):
    """`reverse_transition` for a level of noise that is traced, to compile once."""
    step = noise_transition(step_nodes(process, s, t), lam)
    omega, noise_root = (gd.BlockLinearOperator(x, process.shape) for x in step[:2])
    mean = process.factor(t) @ omega @ process.factor(s).inverse()
    root = process.factor(t) @ noise_root
    return mean, root @ root.T


def _blocks(operator, like):
    blocks = np.asarray(operator.blocks)
    return blocks.reshape(blocks.shape + (1,) * (like.blocks.ndim - blocks.ndim))


@pytest.mark.x64
@pytest.mark.parametrize(
    "process, s, t, lam, expected",
    [
        (gd.CLD((1,)), 0.5, 0.3, 0.5, [0.42830736, -0.08294086, 0.10659589]),
        (gd.CLD((1,)), 0.5, 0.3, 1.0, [0.53722513, -0.06089398, 0.19740411]),
        (gd.VP((1,)), 0.6, 0.4, 0.5, [0.340447540658]),
        (gd.VP((1,)), 0.6, 0.4, 1.0, [0.715416957339]),
    ],
    ids=["cld .5", "cld 1", "vp .5", "vp 1"],
)
def test_reference_covariances(process, s, t, lam, expected):
    got = gd.reverse_transition(process, t, s, lam)[1].as_matrix()
    got = got[np.tril_indices(got.shape[0])]
    np.testing.assert_allclose(got, expected, atol=6e-9 if len(expected) > 1 else 6e-13)


@pytest.mark.x64
@every_family
def test_marginals_are_kept(name):
    process = processes[name]()
    span = process.t_max - process.t_min
    fraction = st.floats(0, 1)

    @given(fraction, fraction, st.floats(0, 3))
    def check(a, b, lam):
        s, t = (process.t_min + span * f**3 for f in (max(a, b), min(a, b)))
        s, t = jnp.asarray(s), jnp.asarray(t)
        mean, added = _transition(process, t, s, jnp.asarray(lam))
        kept = mean @ process.covariance(s) @ mean.T + added
        expected = _blocks(process.covariance(t), kept)
        assert np.abs(kept.blocks - expected).max() < 1e-10 * np.abs(expected).max()

    check()


@pytest.mark.x64
@pytest.mark.parametrize(
    "name",
    ["vp", "ve", "cld", "bdm", *slow("vp_cosine", "sub_vp", "cld_sloped", "third_order")],
)
def test_solves_the_differential_equation_of_the_paper(name):
    """Proposition 6, with a general solver."""
    process = processes[name]()
    n = process.num_components

    def field(t, y, lam):
        g = process.diffusion(t)
        forcing = g @ g.T @ process.covariance(t).inverse()
        total = process.drift(t) + forcing * (0.5 * (1 + lam**2))
        return [total.mv(column) for column in y]

    def unit(j):
        x = [jnp.full(process.shape, 1.0 if i == j else 0.0) for i in range(n)]
        return join_components(x)

    columns = [unit(j) for j in range(n)]
    for s, t, lam in ((0.6, 0.4, 0.7), (0.2, 0.01, 1.5), (0.9, 0.5, 3.0)):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dfx.Dopri8(),
            s,
            t,
            None,
            columns,
            jnp.asarray(lam),
            stepsize_controller=dfx.PIDController(rtol=1e-12, atol=1e-12),
            adjoint=forward,
        )
        mean, _ = _transition(process, jnp.asarray(t), jnp.asarray(s), jnp.asarray(lam))
        got = [mean.mv(column) for column in columns]
        assert max_difference(got, last(sol.ys)) < 1e-9


@pytest.mark.x64
@every_family
def test_special_levels_of_noise(name):
    process = processes[name]()
    zero, one = jnp.zeros(()), jnp.ones(())
    for s, t in ((0.9, 0.2), (0.5, 0.49), (0.01, process.t_min)):
        s, t = jnp.asarray(s), jnp.asarray(t)
        flow, nothing = _transition(process, t, s, zero)
        expected = process.factor(t) @ process.factor(s).inverse()
        np.testing.assert_allclose(flow.blocks - _blocks(expected, flow), 0, atol=1e-12)
        np.testing.assert_allclose(nothing.blocks, 0, atol=1e-12)
        # The posterior of the state at t given that at s.
        mean, added = _transition(process, t, s, one)
        prior, forward = process.covariance(t), process.transition(s, t)
        gain = prior @ forward.T @ process.covariance(s).inverse()
        left = prior - gain @ forward @ prior
        atol = 1e-8 if name == "discrete" else 1e-11  # Only smooth between its indices.
        np.testing.assert_allclose(mean.blocks - _blocks(gain, mean), 0, atol=atol)
        np.testing.assert_allclose(added.blocks - _blocks(left, added), 0, atol=atol)


@every_family
def test_covariance_is_semidefinite_at_the_shortest_steps(name):
    process = processes[name]()
    f32 = jnp.float32
    for s in (process.t_max, 0.5, 0.01, process.t_min):
        for length in (1e-6, 1e-5, 1e-3):
            for lam in jnp.array([0.01, 1.0, 3.0], f32):
                s32 = jnp.asarray(s, f32)
                # At least as long as single precision can tell.
                length32 = jnp.asarray(length * max(1, process.t_max), f32)
                t32 = jnp.maximum(s32 - length32, 0)
                step = _noise_transition(process, s32, t32, lam)
                _, added = _transition(process, t32, s32, lam)
                blocks = np.asarray(added.blocks, np.float64)
                eigenvalues = np.linalg.eigvalsh(np.moveaxis(blocks, (0, 1), (-2, -1)))
                # The product of a matrix and its transpose, but for the product's rounding.
                assert (eigenvalues >= -1e-7 * np.abs(blocks).max()).all()
                assert (
                    np.isfinite(step.noise_root).all() and np.abs(step.noise_root).max() > 0
                )
                assert np.abs(step.omega).max() <= 1 + 1e-5


@pytest.mark.x64
@every_family
def test_single_precision(name):
    process = processes[name]()
    for s, t in ((process.t_max, process.t_min), (0.5, 0.3), (0.02, 0.01), (0.6, 0.599)):
        for lam in (0.3, 1.0):
            times32 = [jnp.asarray(x, jnp.float32) for x in (s, t)]
            times64 = [x.astype(jnp.float64) for x in times32]
            low, high = (
                _noise_transition(process, *x, jnp.asarray(lam, x[0].dtype))
                for x in (times32, times64)
            )
            # Omega is of the order of the identity, or negligible.
            sizes = (1, np.abs(high.noise_root).max())
            for a, b, size in zip(low[:2], high[:2], sizes):
                assert a.dtype == jnp.float32
                # Noise of two components, one of which is nearly zero, can hardly be
                # aligned with the Brownian motion in single precision.
                tolerance = 1e-2 if name == "blurring_cld" else 1e-5
                assert np.abs(np.asarray(a, np.float64) - b).max() < tolerance * size


@pytest.mark.x64
@every_family
def test_noise_of_a_short_step_is_that_of_the_equation(name):
    process, lam, s, length = processes[name](), 0.8, 0.4, 1e-7
    times = jnp.array([s, s - length])
    noise_root = _noise_transition(process, *times, jnp.asarray(lam)).noise_root
    loading = process.factor(s).inverse() @ process.diffusion(s)
    expected = lam * np.sqrt(length) * loading.blocks
    difference = np.abs(noise_root - expected).max() / np.abs(expected).max()
    assert difference < 1e-4


_align = jax.jit(align)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_aligning_keeps_the_covariance(n, seed, zeros):
    rng = np.random.default_rng(seed)
    root = jnp.asarray(np.tril(rng.normal(size=(n, n))), jnp.float32)
    target = rng.normal(size=(n, n))
    target[:, : min(zeros, n)] = 0
    got = _align(root, jnp.asarray(target, jnp.float32))
    np.testing.assert_allclose(got @ got.T, root @ root.T, atol=2e-5)
    if n < 3:
        # No other square root is closer to the target.
        singular = np.linalg.svd(np.asarray(root, float).T @ target, compute_uv=False)
        overlap = (np.asarray(got, float) * target).sum()
        np.testing.assert_allclose(overlap, singular.sum(), rtol=1e-3, atol=1e-5)


def test_aligning_finds_the_target():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3):
        root = np.eye(n) + 0.3 * rng.normal(size=(n, n))
        turn = np.linalg.qr(rng.normal(size=(n, n)))[0]
        got = align(jnp.asarray(root), jnp.asarray(3 * root @ turn))
        np.testing.assert_allclose(got, root @ turn, rtol=1e-3, atol=1e-3)


@every_family
def test_a_step_of_no_length(name):
    process = processes[name]()
    for t in (0.0, process.t_min, 0.5):
        time = jnp.asarray(t)
        step = _noise_transition(process, time, time, jnp.ones(()))
        eye = np.eye(process.num_components)
        eye = eye.reshape(eye.shape + (1,) * (step.omega.ndim - 2))
        np.testing.assert_allclose(step.omega, eye + 0 * step.omega, atol=1e-6)
        np.testing.assert_allclose(step.noise_root, 0, atol=1e-6)


@pytest.mark.parametrize("lam", (-0.5, float("nan"), float("inf"), "much"))
def test_bad_levels_of_noise_are_refused(lam, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="`lam` must be"):
        gd.reverse_transition(gd.VP((2,)), 0.4, 0.6, lam)


def test_forward_in_time_is_refused():
    with pytest.raises(Exception, match="`t` must not exceed `s`"):
        gd.reverse_transition(gd.VP((2,)), 0.6, 0.4, 1.0)
