import functools as ft
import inspect
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import lineax as lx
import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
from hypothesis import given
from scipy.integrate import solve_ivp

import gddim_eqx as gd
from gddim_eqx._process import AbstractLangevin, coarse_and_rest

from ..helpers import (
    every_process,
    processes,
)


pytestmark = pytest.mark.precision


X64 = jnp.result_type(float) == np.float64
QUANTITIES = ("drift", "diffusion", "transition", "covariance", "factor", "cholesky")
# Everything is evaluated for so many times at once: one compilation per dtype.
BATCH = 64
NUM_DRAWS = 20_000

dtypes = pytest.mark.parametrize(
    "dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)]
)
EPS = float(jnp.finfo(jnp.result_type(float)).eps)
# What a sum of a few products may lose to rounding, and to float32's steep derivatives.
ROUNDING = 2e-13 if X64 else 4e-6
DERIVATIVE = 2e-12 if X64 else 1e-4


def quantities(process, t, s):
    """Everything at time `t`, and the transition from `s`, as matrices of shape
    `(*spectrum, n, n)`."""
    n, rank = process.num_components, len(process.shape)
    operators = [
        process.transition(t, s) if q == "transition" else getattr(process, q)(t)
        for q in QUANTITIES
    ]
    blocks = [operator.blocks for operator in operators]
    blocks = [b.reshape(n, n, *(b.shape[2:] or (1,) * rank)) for b in blocks]
    return [jnp.moveaxis(b, (0, 1), (-2, -1)) for b in blocks]


def test_every_public_process_is_in_the_list():
    public = {
        cls
        for cls in vars(gd).values()
        if inspect.isclass(cls)
        and issubclass(cls, gd.AbstractProcess)
        and not inspect.isabstract(cls)
    }
    assert public == {type(make()) for make in processes.values()}


@ft.cache
def _compiled(name, rates):
    process = processes[name]()

    def at(t, s):
        values = lambda t: quantities(process, t, s)
        return jax.jvp(values, (t,), (jnp.ones_like(t),))[1] if rates else values(t)

    return jax.jit(jax.vmap(at))


def evaluate(
    name, t, s: npt.ArrayLike = 0.0, dtype=None, rates=False
) -> dict[str, np.ndarray]:
    """Every quantity of a process, or its derivative in time, at times `t`, computed in
    a dtype but as float64 matrices `(len(t), *spectrum, n, n)`."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    t, s = np.broadcast_arrays(np.asarray(t), np.asarray(s))
    padded = (jnp.asarray(np.resize(x, BATCH), dtype) for x in (t, s))
    matrices = _compiled(name, rates)(*padded)
    matrices = [np.asarray(m, np.float64)[: len(t)] for m in matrices]
    return dict(zip(QUANTITIES, matrices))


def transpose(m):
    return np.swapaxes(m, -1, -2)


def times_of(process, number=BATCH):
    """Times dense at both ends of the sampling interval, which are included, exact in
    float32."""
    fraction = np.linspace(0, 1, number // 2)
    first, last = process.t_min, process.t_max
    times = np.concatenate(
        [first * (last / first) ** fraction, last - (last - first) * fraction**2]
    )
    ends = np.array([first, last], np.float32)
    return np.clip(times.astype(np.float32), *ends).astype(float)


def assert_within(actual, expected, tolerance, size=None):
    """An error relative to the largest entry of each row of a block."""
    size = np.abs(expected) if size is None else size
    size = size.max(-1, keepdims=True)
    error = np.abs(actual - expected) / np.where(size == 0, 1, size)
    assert error.max() <= tolerance


# Laws that hold between the quantities of any process.


@every_process
@given(fractions=st.tuples(*[st.floats(0, 1, width=32)] * 3))
def test_transitions_compose(name, fractions):
    process = processes[name]()
    t, r, s = process.t_max * np.array(fractions) ** 2
    values = evaluate(name, [t, r, t, s, t], [r, s, s, t, t])
    to_t, to_r, direct, back, nowhere = values["transition"]
    assert_within(to_t @ to_r, direct, 3 * ROUNDING, np.abs(to_t) @ np.abs(to_r))
    identity = np.eye(process.num_components)
    assert_within(back @ direct, identity, 3 * ROUNDING, np.abs(back) @ np.abs(direct))
    solved = isinstance(process, (gd.LinearSDE, AbstractLangevin))
    assert (np.abs(nowhere - identity) <= (8 if solved else 2) * EPS).all()


@every_process
def test_time_derivatives_are_the_defining_equations(name):
    process = processes[name]()
    t = times_of(process)
    # These are themselves solutions of these equations, by collocation.
    solved = isinstance(process, (gd.LinearSDE, AbstractLangevin))
    tolerance = DERIVATIVE * (3 if solved else 1)
    F, G, Psi, S, R, _ = evaluate(name, t, t[::-1]).values()
    rates = evaluate(name, t, t[::-1], rates=True)
    GG = G @ transpose(G)

    size = np.abs(F) @ np.abs(Psi)
    assert_within(rates["transition"], F @ Psi, tolerance, size)

    size = np.abs(F) @ np.abs(S) + np.abs(S) @ np.abs(transpose(F)) + GG
    lyapunov = F @ S + S @ transpose(F) + GG
    assert_within(rates["covariance"], lyapunov, tolerance, size)

    # Sigma^-1 R is the inverse transpose of R. The paper's equation 17.
    turned = np.linalg.inv(transpose(R))
    size = np.abs(F) @ np.abs(R) + GG @ np.abs(turned)
    assert_within(rates["factor"], F @ R + GG @ turned / 2, tolerance, size)


@every_process
def test_square_roots_of_the_covariance(name):
    t = times_of(processes[name]())
    values = evaluate(name, t)
    for quantity in ("factor", "cholesky"):
        root = values[quantity]
        size = np.abs(root) @ np.abs(transpose(root))
        square = root @ transpose(root)
        assert_within(square, values["covariance"], ROUNDING, size)
    lower = values["cholesky"]
    assert (np.triu(lower, 1) == 0).all()
    assert (np.diagonal(lower, axis1=-2, axis2=-1) > 0).all()


@every_process
def test_operators_are_tagged(name):
    process, t = processes[name](), jnp.array(0.5)
    assert lx.is_lower_triangular(jax.eval_shape(process.cholesky, t))
    assert lx.is_positive_semidefinite(jax.eval_shape(process.covariance, t))


@every_process
def test_noise_free_transition_carries_the_covariance(name):
    """With lambda = 0, Psihat(t, s) = R_t R_s^-1 leaves no covariance to be added."""
    t = times_of(processes[name]())
    values = evaluate(name, t)
    R, S = values["factor"], values["covariance"]
    moved = R @ np.linalg.inv(R[::-1])
    size = np.abs(moved) @ np.abs(S[::-1]) @ np.abs(transpose(moved))
    assert_within(moved @ S[::-1] @ transpose(moved), S, 3 * ROUNDING, size)


# An independent oracle: drift and diffusion from the papers, and an ODE solver.


def _scalar(drift, diffusion):
    return np.full((1, 1, 1), drift), np.full((1, 1, 1), diffusion)


def _vp(t):
    beta = 0.1 + 19.9 * t
    return _scalar(-beta / 2, beta**0.5)


def _vp_cosine(t):
    unit = math.pi / 2 / 1.008
    beta = 2 * unit * math.tan(unit * (t + 0.008))
    return _scalar(-beta / 2, beta**0.5)


def _sub_vp(t):
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    return _scalar(-beta / 2, (beta * -math.expm1(-2 * integral)) ** 0.5)


def _ve(t):
    sigma, growth = 0.01 * 5000**t, math.log(5000)
    return _scalar(0.0, sigma * (2 * growth) ** 0.5)


def _cld(t, beta_0=4.0, beta_1=0.0, mass_inverse=4.0):
    beta, friction = beta_0 + beta_1 * t, 2 * mass_inverse**-0.5
    drift = beta * np.array([[0, mass_inverse], [-1, -friction * mass_inverse]])
    return drift[None], np.diag([0.0, (2 * friction * beta) ** 0.5])[None]


def _bdm(t):
    rows, columns = np.meshgrid(np.arange(4) / 4, np.arange(6) / 6, indexing="ij")
    dissipation = np.pi**2 * (rows**2 + columns**2)
    sine, cosine = math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)
    blur = 0.999 * np.exp(-dissipation * 50 * sine**4)
    fading = -blur / (blur + 0.001) * dissipation * 100 * math.pi * sine**3 * cosine
    unit = math.pi / 2 / 1.008
    log_alpha_rate = -2 * unit * math.tan(unit * (t + 0.004))
    variance = math.sin(unit * (t + 0.004)) ** 2
    squared = -log_alpha_rate - 2 * variance * fading
    drift = log_alpha_rate / 2 + fading
    drift, diffusion = drift[:, :, None, None], np.sqrt(squared)[:, :, None, None]
    return drift[..., None], diffusion[..., None]


# The coefficients as functions of time, and the covariance at time 0.
written_out = {
    "vp": (_vp, np.zeros((1, 1, 1))),
    "vp_cosine": (_vp_cosine, np.zeros((1, 1, 1))),
    "sub_vp": (_sub_vp, np.zeros((1, 1, 1))),
    "ve": (_ve, np.full((1, 1, 1), 1e-4)),
    "cld": (_cld, np.diag([1e-6, 0.01 + 1e-6])[None]),
    "cld_sloped": (
        ft.partial(_cld, beta_0=1.0, beta_1=6.0, mass_inverse=2.0),
        np.diag([1e-6, 0.02 + 1e-6])[None],
    ),
    "bdm": (
        _bdm,
        np.full((4, 6, 1, 1, 1), math.sin(math.pi / 2 * 0.004 / 1.008) ** 2),
    ),
}
every_written_out = pytest.mark.parametrize("name", written_out)


def _integrate(rate, start, end, matrices):
    """Solve an ODE for a stack of matrices."""
    solution = solve_ivp(
        lambda t, y: np.stack(rate(t, *y.reshape(matrices.shape))).ravel(),
        (start, end),
        matrices.ravel(),
        method="DOP853",
        rtol=3e-14,
        atol=1e-25,
    )
    assert solution.success
    return solution.y[:, -1].reshape(matrices.shape)


@ft.cache
def oracle(name):
    """Times and Psi(t, 0), Sigma_t, R_t and Psi(t, t_max) at them."""
    process = processes[name]()
    coefficients, covariance = written_out[name]
    identity = np.broadcast_to(np.eye(covariance.shape[-1]), covariance.shape)

    def mean_rate(t, Psi):
        return [coefficients(t)[0] @ Psi]

    def moment_rates(t, Psi, S):
        F, G = coefficients(t)
        return F @ Psi, F @ S + S @ transpose(F) + G @ transpose(G)

    def all_rates(t, Psi, S, R):
        F, G = coefficients(t)
        rate = F @ R + G @ transpose(G) @ np.linalg.solve(S, R) / 2
        return *moment_rates(t, Psi, S), rate

    times = times_of(process)[:: BATCH // 8]
    ends = np.array([process.t_min, process.t_max], np.float32)
    times = np.unique(np.append(times, ends))
    now, matrices = 0.0, np.stack([identity, covariance])
    if (covariance == 0).all():
        # There R starts from a singular matrix.
        now, matrices = times[0], _integrate(moment_rates, 0.0, times[0], matrices)
    matrices = np.stack([*matrices, np.linalg.cholesky(matrices[1])])
    forward, backward = [], [identity]
    for t in times:
        matrices = matrices if t == now else _integrate(all_rates, now, t, matrices)
        forward.append(matrices)
        now = t
    for t, after in zip(times[-2::-1], times[:0:-1]):
        backward.append(_integrate(mean_rate, after, t, backward[-1][None])[0])
    return times, *np.stack(forward, 1), np.stack(backward[::-1])


@every_written_out
@dtypes
def test_quantities_agree_with_an_ode_solver(name, dtype):
    times, Psi, S, R, Psi_from_end = oracle(name)
    tolerance = 1e-6 if dtype == np.float32 else 1e-11
    values = evaluate(name, times, dtype=dtype)
    assert_within(values["transition"], Psi, tolerance)
    assert_within(values["covariance"], S, tolerance)
    # The solver itself loses some digits of R where it starts from nearly nothing.
    assert_within(values["factor"], R, 2 * tolerance)
    assert_within(values["cholesky"], np.linalg.cholesky(S), tolerance)
    values = evaluate(name, times, times[-1:], dtype=dtype)
    assert_within(values["transition"], Psi_from_end, tolerance)


@every_written_out
@dtypes
def test_drift_and_diffusion_are_those_of_the_papers(name, dtype):
    times = times_of(processes[name]())
    values = evaluate(name, times, dtype=dtype)
    F, G = (np.stack(x) for x in zip(*[written_out[name][0](t) for t in times]))
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    assert_within(values["drift"], F, tolerance)
    assert_within(values["diffusion"], G, tolerance)


@every_written_out
def test_start_at_time_zero(name):
    values = evaluate(name, [0.0])
    assert_within(values["covariance"][0], written_out[name][1], ROUNDING)
    assert (values["transition"] == np.eye(processes[name]().num_components)).all()


@pytest.mark.x64
@every_process
def test_float32_is_right_down_to_the_last_digits(name):
    """From the times as they are in float32, over the whole interval."""
    process, rng = processes[name](), np.random.default_rng(0)
    for power in (0, 1, 2, 6):
        span = process.t_max - process.t_min
        t = process.t_min + span * rng.uniform(size=BATCH) ** power
        t = times_of(process) if power == 0 else np.float32(t).astype(float)
        for s in (t[::-1], t[-1:], np.zeros(1)):
            exact = evaluate(name, t, s)
            single = evaluate(name, t, s, np.float32)
            for quantity in QUANTITIES:
                # Rescaled times, and products with the blur, are rounded once more.
                twice = isinstance(process, (AbstractLangevin, gd.BlurringCLD))
                tolerance = 2e-6 if twice else 1e-6
                # The noise of what has been blurred away is a small root of small numbers.
                least = 1e-6 if name == "blurring_cld" else 0
                size = np.maximum(np.abs(exact[quantity]), least)
                assert_within(single[quantity], exact[quantity], tolerance, size)


# Numbers computed elsewhere.

CLD_FACTORS = {
    1e-3: (0.000849, 0.001864, -0.026736, 0.129784),
    0.01: (-0.026032, 0.012135, -0.272896, -0.032621),
    0.3: (0.776484, 0.506389, -0.220623, 0.430817),
    0.5: (-0.584152, 0.803260, -0.405810, -0.288534),
    1.0: (0.996620, -0.082057, 0.041036, 0.498310),
}


def test_cld_reference_values():
    precise = 1e-11 if X64 else 1e-6
    t = np.array([0.1, *CLD_FACTORS])
    values = evaluate("cld", t)
    xx, xv, vv = 0.221811232041, 0.129859759616, 0.215758390927
    np.testing.assert_allclose(
        values["covariance"][0, 0], [[xx, xv], [xv, vv]], rtol=precise
    )
    expected = (0.112751924196, -0.45727260538, 0.428947604485, -0.178219930238)
    np.testing.assert_allclose(values["factor"][0].ravel(), expected, atol=precise)
    np.testing.assert_allclose(
        values["factor"][1:].reshape(-1, 4), list(CLD_FACTORS.values()), atol=1e-6
    )


def test_cld_reference_step():
    process = gd.CLD((3,))
    t, s = jnp.array(0.5), jnp.array(1.0)
    moved = process.transition(t, s)
    expected = np.reshape(
        [-163.7944500994327, -436.7852002651539, 109.19630006628847, 272.9907501657212],
        (2, 2),
    )
    np.testing.assert_allclose(moved.blocks, expected, rtol=1e-12 if X64 else 1e-6)
    first = process.factor(t) - moved @ process.factor(s)
    expected = np.reshape(
        [180.58035563703, 205.01725909121, -120.43532556624, -127.36226325082], (2, 2)
    )
    np.testing.assert_allclose(first.blocks, expected, rtol=1e-11 if X64 else 1e-5)


def test_bdm_reference_values():
    process = gd.BDM((32, 32, 3))
    times = jnp.array(0.5), jnp.array(0.0)
    transition = jax.jit(process.transition)(*times).blocks
    mean = transition[0, 0, 3, 2, 0] * process.data_scale
    assert float(mean) == pytest.approx(0.148226520688, rel=1e-11 if X64 else 1e-6)
    assert process.t_max == pytest.approx(0.99598, abs=5e-6)


# Data and states.


def data_for(process, batch=(), seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*batch, *process.shape)), dtype)


def rows(state, batch=1):
    """A state as float64 NumPy vectors, in the order of `as_matrix`."""
    leaves = [np.asarray(x, np.float64) for x in jtu.tree_leaves(state)]
    return np.concatenate([x.reshape(*x.shape[:batch], -1) for x in leaves], -1)


@every_process
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
def test_decode_undoes_encode(name, batch):
    process = processes[name]()
    x = data_for(process, batch)
    u = process.encode(x)
    assert all(leaf.shape == x.shape for leaf in jtu.tree_leaves(u))
    decoded = process.decode(u)
    assert decoded.shape == x.shape and decoded.dtype == x.dtype
    np.testing.assert_allclose(decoded, x, atol=10 * ROUNDING)
    back = process.from_data(process.to_data(u))
    for a, b in zip(jtu.tree_leaves(back), jtu.tree_leaves(u), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * ROUNDING)


def test_encode_without_a_basis_is_the_data_and_no_velocity():
    x = data_for(gd.CLD((3,)))
    assert (gd.VP((3,)).encode(x) == x).all()
    u = gd.CLD((3,)).encode(x)
    assert isinstance(u, gd.Phase)
    assert (u.x == x).all() and (u.v == 0).all()


@pytest.mark.parametrize("shape", [(4, 6, 2), (6, 4, 1), (8, 8, 3), (1, 5, 1)], ids=str)
def test_bdm_states_are_cosine_coefficients(shape):
    process = gd.BDM(shape)
    x = data_for(process, (2,))
    coefficients = np.asarray(scipy.fft.dctn(np.asarray(x), norm="ortho", axes=(1, 2)))
    np.testing.assert_allclose(process.from_data(x), coefficients, atol=10 * ROUNDING)
    signal = math.cos(math.pi / 2 * 0.004 / 1.008)
    np.testing.assert_allclose(process.encode(x), signal * coefficients, atol=10 * ROUNDING)


def test_cosine_basis_keeps_inner_products():
    basis, (a, b) = gd.CosineBasis(), data_for(gd.BDM((5, 7, 2)), (2,))
    for change in (basis.forward, basis.inverse):
        np.testing.assert_allclose(
            (change(a) * change(b)).sum(), (a * b).sum(), rtol=100 * ROUNDING
        )


def assert_standard_errors(draws, mean, covariance):
    """Mean and covariance of draws, a row each, are within 5 standard errors."""
    number = len(draws)
    variance = np.diag(covariance)
    error = np.abs(draws.mean(0) - mean)
    assert (error <= 5 * np.sqrt(variance / number)).all()
    centred = draws - mean
    error = np.abs(centred.T @ centred / number - covariance)
    deviation = np.sqrt((np.outer(variance, variance) + covariance**2) / number)
    assert (error <= 5 * deviation).all()


def dense(operator):
    return np.asarray(operator.as_matrix(), np.float64)


@every_process
def test_prior_has_the_moments_of_the_state_where_sampling_starts(name):
    process = processes[name]()
    draws = rows(process.prior(jr.key(0), (NUM_DRAWS,)))
    factor = dense(process.prior_factor())
    assert_standard_errors(draws, 0, factor @ factor.T)
    covariance = dense(jax.jit(process.covariance)(jnp.asarray(process.t_max)))
    assert np.abs(factor @ factor.T - covariance).max() <= 1e-3 * covariance.max()


def expected_state(name, x, noise, t, dtype=None):
    """Psi(t, 0) encode(x) + R_t noise, and the size of the sum, both as rows."""
    values = evaluate(name, [t], dtype=dtype)
    wide = x.astype(jnp.float32) if dtype else x
    size, total = 0.0, 0.0
    for quantity, state in [
        ("transition", processes[name]().encode(wide)),
        ("factor", noise),
    ]:
        leaves = [np.asarray(y, np.float64) for y in jtu.tree_leaves(state)]
        vector = np.stack(leaves, -1)[..., None]
        total = total + values[quantity] @ vector
        size = size + np.abs(values[quantity]) @ np.abs(vector)
    as_rows = lambda y: rows(tuple(y[..., k, 0] for k in range(y.shape[-2])))
    return as_rows(total), as_rows(size)


@every_process
def test_perturbed_data_have_the_moments_of_the_forward_process(name):
    process = processes[name]()
    x = jnp.broadcast_to(data_for(process), (NUM_DRAWS, *process.shape))
    perturb = jax.jit(process.perturb)
    covariance = jax.jit(lambda t: process.covariance(t).as_matrix())
    for t in (process.t_min, 0.3):
        state, noise = perturb(jr.key(2), x, jnp.asarray(t))
        expected, size = expected_state(name, x, noise, t)
        assert (np.abs(rows(state) - expected) <= 10 * ROUNDING * size).all()
        still = jtu.tree_map(lambda y: jnp.zeros_like(y[:1]), noise)
        mean, _ = expected_state(name, x[:1], still, t)
        assert_standard_errors(rows(state), mean[0], covariance(jnp.asarray(t)))
        assert_standard_errors(rows(noise), 0, np.eye(mean.size))


@pytest.mark.parametrize("name", ["ve", "cld", "bdm"])
def test_perturb_takes_one_time_each_by_vmap(name):
    process = processes[name]()
    x, keys = data_for(process, (3,)), jr.split(jr.key(3), 3)
    times = jnp.array([0.1, 0.4, 0.9])
    state, noise = jax.jit(jax.vmap(process.perturb))(keys, x, times)
    for k, t in enumerate(times):
        one = lambda y: jtu.tree_map(lambda leaf: leaf[k : k + 1], y)
        expected, size = expected_state(name, one(x), one(noise), t)
        assert (np.abs(rows(one(state)) - expected) <= 10 * ROUNDING * size).all()
    assert len(np.unique(rows(noise))) == rows(noise).size


@every_process
def test_batches_are_leading_axes_and_may_be_empty(name):
    process, key = processes[name](), jr.key(0)
    for batch in [(), (0,), (2, 3), (2, 0)]:
        full, x = (*batch, *process.shape), data_for(process, batch)
        perturb = jax.eval_shape(process.perturb, key, x, jnp.array(0.5))
        prior = jax.eval_shape(lambda: process.prior(key, batch))
        for u in (*perturb, prior):
            shapes = [y.shape for y in jtu.tree_leaves(u)]
            assert shapes == [full] * process.num_components
        assert jax.eval_shape(process.decode, prior).shape == full
    state, noise = process.perturb(key, data_for(process, (0,)), 0.5)
    for y in jtu.tree_leaves((state, noise)):
        assert y.shape == (0, *process.shape)


@every_process
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_states_have_the_dtype_that_is_asked_for(name, dtype):
    process, key = processes[name](), jr.key(0)
    x = data_for(process, (2,), dtype=dtype)
    # The time may have another dtype.
    for t in (jnp.array(0.5), jnp.array(0.5, dtype)):
        perturb = jax.eval_shape(process.perturb, key, x, t)
        prior = jax.eval_shape(lambda: process.prior(key, dtype=dtype))
        for u in (*perturb, prior, jax.eval_shape(process.encode, x)):
            assert all(y.dtype == dtype for y in jtu.tree_leaves(u))
        assert jax.eval_shape(process.decode, prior).dtype == dtype


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, jnp.float16) for name in ("ve", "cld", "bdm")), ("cld", jnp.bfloat16)],
)
def test_perturb_in_half_precision_rounds_only_the_result(name, dtype):
    process = processes[name]()
    x = data_for(process, (2,), dtype=dtype)
    perturb = jax.jit(process.perturb)
    for t in np.array([process.t_min, 0.3, process.t_max], np.float32):
        state, noise = perturb(jr.key(0), x, jnp.asarray(t))
        expected, size = expected_state(name, x, noise, t, np.float32)
        # A basis mixes the coordinates of the data.
        size = size if name != "bdm" else size.max()
        error = np.abs(rows(state) - expected)
        assert (error <= 4 * float(jnp.finfo(dtype).eps) * size).all()


@every_process
@dtypes
def test_everything_is_finite_at_both_ends_of_time(name, dtype):
    end = processes[name]().t_end
    values = evaluate(name, [0, end, 0, end], [0, end, end, 0], dtype)
    assert all(np.isfinite(m).all() for m in values.values())


@every_process
@pytest.mark.parametrize("t", [0, 0.5, np.float32(0.5), jnp.float32(0.5)], ids=repr)
def test_any_kind_of_scalar_is_a_time(name, t):
    process = processes[name]()
    dtype = jnp.result_type(float) if isinstance(t, (int, float)) else jnp.float32
    for call in (
        *(ft.partial(getattr(process, q), t) for q in QUANTITIES if q != "transition"),
        lambda: process.transition(t, t),
    ):
        operator = jax.eval_shape(call)
        assert isinstance(operator, gd.BlockLinearOperator)
        assert operator.shape == process.shape
        assert operator.blocks.dtype == dtype


@every_process
def test_transition_takes_two_kinds_of_scalars(name):
    process, t = processes[name](), jnp.float32(0.5)
    for call in (
        lambda: process.transition(t, 0.0),
        lambda: process.transition(0.0, t),
        lambda: process.transition(t, 0),
        lambda: process.transition(0, t),
    ):
        assert jax.eval_shape(call).blocks.dtype == jnp.float32


# What a process is to Equinox and JAX.


@every_process
def test_processes_have_no_leaves_and_compare_by_value(name):
    process, alike = processes[name](), processes[name]()
    assert jtu.tree_leaves(process) == []
    assert process == alike and hash(process) == hash(alike)
    assert jtu.tree_structure(process) == jtu.tree_structure(alike)
    assert not any(process == make() for other, make in processes.items() if other != name)


def test_shape_may_be_one_integer_or_empty():
    assert gd.VP(3) == gd.VP((3,))
    assert gd.CLD(()).encode(jnp.array(2.0)).x.shape == ()


def test_defaults_are_the_papers():
    cld = gd.CLD((3,))
    assert (cld.beta, cld.mass_inverse, cld.gamma, cld.epsilon) == (4, 4, 0.04, 1e-6)
    assert (cld.t_min, cld.t_max, gd.VP((3,)).t_min) == (1e-3, 1, 1e-3)
    bdm = gd.BDM((32, 32, 3))
    assert (bdm.sigma_blur_max, bdm.min_scale, bdm.t_min) == (10, 0.001, 1e-5)


@every_process
def test_sampling_interval_is_within_the_time_axis(name):
    process = processes[name]()
    assert 0 < process.t_min < process.t_max <= process.t_end


@pytest.mark.parametrize("t_end", [0.5, 0.99, 1.0])
def test_bdm_sampling_starts_before_its_time_axis_ends(t_end):
    assert gd.BDM((4, 4, 1), t_end=t_end).t_max <= t_end


image = (4, 4, 1)


@every_process
def test_log_snr_is_that_of_the_mean_in_the_covariance(name):
    process = processes[name]()
    for fraction in (0.01, 0.3, 0.9):
        t = process.t_min + fraction * (process.t_max - process.t_min)
        n, rank = process.num_components, len(process.shape)
        covariance, transition = (
            np.asarray(x.blocks, np.float64).reshape(
                n, n, *(x.blocks.shape[2:] or (1,) * rank)
            )
            for x in (process.covariance(t), process.transition(t, 0.0))
        )
        signal = np.moveaxis(transition[:, 0], 0, -1)[..., None]
        precision = np.linalg.inv(np.moveaxis(covariance, (0, 1), (-2, -1)))
        snr = np.swapaxes(signal, -1, -2) @ precision @ signal
        expected = 0.5 * np.log(snr).mean()
        np.testing.assert_allclose(process.log_snr(t), expected, rtol=2e-4, atol=2e-4)


bad_arguments = {
    "schedule": (lambda: gd.VP((3,), "linaer"), "linaer"),
    "schedule of sub_vp": (lambda: gd.SubVP((3,), "quadratic"), "quadratic"),
    "beta_min": (lambda: gd.LinearSchedule(beta_min=-1.5), "beta_min.*-1.5"),
    "beta_max": (lambda: gd.LinearSchedule(beta_max=-1.5), "-1.5"),
    "linear t_min": (lambda: gd.VP(3, gd.LinearSchedule(t_min=2.5)), "t_min.*2.5"),
    "offset": (lambda: gd.CosineSchedule(offset=-1.5), "offset.*-1.5"),
    "cosine t_end": (lambda: gd.CosineSchedule(t_end=1.5), "t_end.*1.5"),
    "cosine t_min": (lambda: gd.VP(3, gd.CosineSchedule(t_min=-1.5)), "t_min.*-1.5"),
    "sigma_min": (lambda: gd.VE((3,), sigma_min=0.0), "sigma_min.*0.0"),
    "sigma_max": (lambda: gd.VE((3,), sigma_max=0.001), "sigma_max.*0.001"),
    "sigma_max nan": (lambda: gd.VE((3,), sigma_max=math.nan), "sigma_max.*nan"),
    "ve t_min": (lambda: gd.VE((3,), t_min=2.5), "t_min.*2.5"),
    "ve t_end": (lambda: gd.VE((3,), t_end=-1.5), "t_end.*-1.5"),
    "mass_inverse": (lambda: gd.CLD((3,), mass_inverse=0.0), "mass_inverse.*0.0"),
    "gamma": (lambda: gd.CLD((3,), gamma=-1.5), "gamma.*-1.5"),
    "gamma nan": (lambda: gd.CLD((3,), gamma=math.nan), "gamma.*nan"),
    "epsilon": (lambda: gd.CLD((3,), epsilon=0.0), "epsilon.*0.0"),
    "beta": (lambda: gd.CLD((3,), beta=-1.5), "beta.*-1.5"),
    "beta_slope": (lambda: gd.CLD((3,), beta_slope=-4.5), "beta_slope.*-4.5"),
    "cld t_end": (lambda: gd.CLD((3,), t_end=0.0), "t_end.*0.0"),
    "cld t_min": (lambda: gd.CLD((3,), t_min=2.5), "t_min.*2.5"),
    "image": (lambda: gd.BDM((4, 4)), r"\(4, 4\)"),
    "sigma_blur_max": (lambda: gd.BDM(image, sigma_blur_max=-1.5), "blur_max.*-1.5"),
    "min_scale": (lambda: gd.BDM(image, min_scale=0.0), "min_scale.*0.0"),
    "min_scale above 1": (lambda: gd.BDM(image, min_scale=1.5), "min_scale.*1.5"),
    "bdm offset": (lambda: gd.BDM(image, offset=0.0), "offset.*0.0"),
    "bdm t_min": (lambda: gd.BDM(image, t_min=2.5), "t_min.*2.5"),
    "bdm t_end": (lambda: gd.BDM(image, t_end=1.5), "t_end.*1.5"),
    "negative shape": (lambda: gd.VP((-3,)), "shape.*-3"),
    "fractional shape": (lambda: gd.VP(2.5), "shape.*2.5"),
    "shape of a string": (lambda: gd.VP("3"), "shape.*'3'"),
    "times of a batch": (lambda: gd.VP(3).factor(jnp.ones(2)), r"\(2,\).*jax.vmap"),
}


@pytest.mark.parametrize("case", bad_arguments)
def test_bad_arguments_raise_and_are_named(case, monkeypatch):
    # Without the run-time type checks that only this test-suite has.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    build, message = bad_arguments[case]
    with pytest.raises(ValueError, match=message):
        build()


@every_process
def test_data_and_states_that_do_not_fit_raise(name):
    process = processes[name]()
    wrong = jnp.ones((2, 5))
    for call in (
        lambda: process.encode(wrong),
        lambda: process.decode(wrong),
        lambda: process.decode((data_for(process),) * 4),
        lambda: process.perturb(jr.key(0), wrong, 0.5),
    ):
        with pytest.raises(ValueError, match=r"\(\*batch, "):
            call()


def test_numbers_are_split_exactly_all_at_once():
    values = np.concatenate([[0.0], np.random.default_rng(0).uniform(-1e3, 1e3, 1000)])
    coarse, rest = coarse_and_rest(values.reshape(7, -1))
    assert (coarse + rest == values.reshape(7, -1)).all()
    assert (np.abs(rest) <= np.abs(values.reshape(7, -1)) * 2.0**-12).all()
    # Twelve bits: products of two are exact in float32.
    products = np.float32(coarse[:, :, None]) * np.float32(coarse[:, None])
    assert (products == coarse[:, :, None] * coarse[:, None]).all()
