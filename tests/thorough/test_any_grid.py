"""Steps of any length: grids with close times, adaptive steps over many decades of noise,
and steps that begin with almost no signal."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import gddim_eqx as gd

from ..helpers import (
    adaptive,
    every_family,
    last,
    mixture_for,
    prior_state,
    processes,
    solve,
)


# Data with a normal distribution, for which the probability flow is known.
_mean, _std = 1.3, 0.4


def _normal_flow(process):
    singular = process.t_zero_signal <= process.t_end
    predicts = "flow" if singular else "data"
    model = gd.GaussianMixture(jnp.array([[_mean]]), _std).model(process, predicts)
    return gd.ProbabilityFlow(process, model, predicts)


def _exact(process, t, s, u):
    """The probability flow from `s` to `t`, for a process with one component."""

    def moments(t):
        signal = process.transition(t, 0.0).blocks[0, 0] * process.data_scale
        noise = process.factor(t).blocks[0, 0]
        return signal * _mean, jnp.hypot(signal * _std, noise)

    (m0, s0), (m1, s1) = moments(jnp.asarray(s)), moments(jnp.asarray(t))
    return m1 + (u - m0) / s0 * s1


_scalar = {
    "edm": ft.partial(gd.EDM, (1,)),
    "vp": ft.partial(gd.VP, (1,)),
    "ve": ft.partial(gd.VE, (1,)),
    "rectified": ft.partial(gd.RectifiedFlow, (1,)),
    "trigonometric": ft.partial(gd.TrigonometricFlow, (1,)),
    "shifted": ft.partial(gd.RectifiedFlow, (1,), 3.0),
}


def _prior(process):
    return process.prior_factor().mv(jnp.array([[-1.0], [0.3], [2.0]]))


# Close times


def _error(flow, solver, ts, u):
    found = solve(flow, solver, ts, u)
    return float(jnp.abs(found - _exact(flow.process, ts[-1], ts[0], u)).max())


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, order", [("edm", 2), ("vp", 4), ("rectified", 2), ("rectified", 4)]
)
def test_an_extra_time_close_to_another_does_no_harm(name, order):
    process = _scalar[name]()
    flow, u, solver = _normal_flow(process), _prior(process), gd.GDDIM(order)
    ts = np.asarray(gd.time_grid(process, 20))
    without = _error(flow, solver, ts, u)
    # On both sides of a time, at the start, in the middle and near the end.
    for i in (0, 1, 5, 10, 15, 18):
        for fraction in (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.99, 1 - 1e-4, 1 - 1e-6):
            extra = ts[i] + fraction * (ts[i + 1] - ts[i])
            error = _error(flow, solver, np.insert(ts, i + 1, extra), u)
            assert error < 1.5 * without, (i, fraction, error, without)


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "rectified"))
@pytest.mark.parametrize("solver", (gd.GDDIM(), gd.GDDIM(corrector=0)), ids=("4", "4, 0"))
def test_several_close_times_on_a_coarse_grid(name, solver):
    process = _scalar[name]()
    flow, u = _normal_flow(process), _prior(process)
    ts = np.asarray(gd.time_grid(process, 8))
    without = _error(flow, solver, ts, u)
    for gap in (1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 2e-8):
        for number in (1, 2, 3, 4):
            close = ts[1] - gap * np.arange(1, number + 1)
            error = _error(flow, solver, np.insert(ts, 2, close), u)
            assert error < 1.5 * without, (gap, number, error, without)


_orders = (
    *("gddim1", "gddim2", "gddim3", "gddim4"),
    *("uncorrected", "reevaluated", "noise"),
)
_any_order = {f"gddim{q}": gd.GDDIM(q) for q in (1, 2, 3, 4)} | {
    "uncorrected": gd.GDDIM(corrector=0),
    "reevaluated": gd.GDDIM(2, reevaluate=True),
    "noise": gd.GDDIM(3, "noise"),
}


@ft.cache
def _mixture(name):
    process = processes[name]()
    predicts = "noise" if process.t_zero_signal > process.t_end else "flow"
    model = mixture_for(process).model(process, predicts)
    flow = gd.ProbabilityFlow(process, model, predicts)
    u = prior_state(process, (16,))
    fine = np.asarray(gd.time_grid(process, 400))
    return flow, u, solve(flow, gd.GDDIM(), fine, u)


def _rms(process, a, b):
    return float(jnp.sqrt(jnp.mean((process.decode(a) - process.decode(b)) ** 2)))


@every_family
@given(
    steps=st.lists(st.floats(-6, 0), min_size=6, max_size=20),
    where=st.floats(0, 0.999),
    fraction=st.floats(-6, -0.5),
    end=st.booleans(),
    solver=st.sampled_from(_orders),
)
def test_an_extra_time_on_any_grid(name, steps, where, fraction, end, solver):
    flow, u, exact = _mixture(name)
    process, solver = flow.process, _any_order[solver]
    # Steps whose lengths differ by up to six orders of magnitude, in the clock of the
    # default grid.
    clock = np.append(0, np.cumsum(10.0 ** np.array(steps)))
    fine = np.asarray(gd.time_grid(process, 4000))
    ts = np.interp(clock / clock[-1], np.linspace(0, 1, len(fine)), fine)
    ts = ts[np.append(True, np.diff(ts) < 0)]
    i = int(where * (len(ts) - 1))
    share = 1 - 10**fraction if end else 10**fraction
    extra = ts[i] + share * (ts[i + 1] - ts[i])
    if not ts[i + 1] < extra < ts[i]:
        return
    without = _rms(process, solve(flow, solver, ts, u), exact)
    error = _rms(process, solve(flow, solver, np.insert(ts, i + 1, extra), u), exact)
    # Errors are only comparable where the solution has begun to converge.
    if without < 0.1:
        rounding = 1e-9 if jax.config.jax_enable_x64 else 1e-3
        assert error < 3 * without + rounding, (ts, extra)


# Adaptive steps


@eqx.filter_jit
def _adaptive(flow, solver, tolerance, u, t1=None):
    t1 = flow.process.t_min if t1 is None else t1
    return adaptive(flow, solver, flow.process.t_max, t1, None, u, tolerance).ys


@pytest.mark.precision
@pytest.mark.parametrize(
    "solver",
    (
        gd.GDDIM(),
        gd.GDDIM(1),
        gd.GDDIM(2, reevaluate=True),
        gd.GDDIM(3, "noise"),
    ),
    ids=repr,
)
def test_adaptive_steps_do_not_jump_over_the_data(solver):
    data = gd.GaussianMixture(jnp.array([[-1.0, 0.0], [1.0, 0.0]]), 0.1)
    process = gd.EDM((2,))
    flow = gd.ProbabilityFlow(process, data.model(process, "data"), "data")
    u = process.prior(jax.random.key(0), (500,))
    found = np.asarray(_adaptive(flow, solver, 1e-3, u))[0]
    np.testing.assert_allclose(found.std(0), (1.005, 0.0972), atol=0.01)


@pytest.mark.x64
@pytest.mark.parametrize("name", _scalar)
def test_adaptive_steps_meet_any_tolerance(name):
    process = _scalar[name]()
    flow, u = _normal_flow(process), _prior(process)
    exact = _exact(process, process.t_min, process.t_max, u)
    for tolerance in (1e-2, 1e-3, 1e-5):
        found = _adaptive(flow, gd.GDDIM(), jnp.asarray(tolerance), u)[0]
        assert jnp.abs(found - exact).max() < 10 * tolerance, tolerance


@pytest.mark.x64
@every_family
def test_adaptive_steps_of_every_process(name):
    flow, u, exact = _mixture(name)
    found = last(_adaptive(flow, gd.GDDIM(), 1e-3, u))
    assert _rms(flow.process, found, exact) < 10 * 1e-3


def test_the_scale_of_the_data_is_not_assumed():
    process = gd.EDM((1,))
    for scale in (1e-2, 1.0, 10.0):
        data = gd.GaussianMixture(scale * jnp.array([[-1.0], [1.0]]), 0.1 * scale)
        flow = gd.ProbabilityFlow(process, data.model(process, "data"), "data")
        u = process.prior(jax.random.key(0), (200,))
        exact = solve(flow, gd.GDDIM(), np.asarray(gd.time_grid(process, 300)), u)
        found = _adaptive(flow, gd.GDDIM(), jnp.asarray(1e-4 * min(1, scale)), u)[0]
        assert jnp.abs(found - exact).mean() < 1e-3 * scale, scale


@pytest.mark.x64
def test_the_first_step_is_not_tiny():
    process = gd.VP((1,))
    solver, flow, u = gd.GDDIM(), _normal_flow(process), _prior(process)
    state = solver.init(flow, 1.0, 0.99, u, None)
    y, error, *_ = eqx.filter_jit(solver.step)(flow, 1.0, 0.99, u, None, state, False)
    true = jnp.abs(y - _exact(process, 0.99, 1.0, u)).max()
    # It was the whole contribution of the model, 9e-4.
    assert true < jnp.abs(error).max() < 1e-4


# Almost no signal


@pytest.mark.precision
@pytest.mark.parametrize("name", ("rectified", "trigonometric", "shifted"))
def test_a_small_first_step_from_pure_noise(name):
    process = _scalar[name]()
    flow, u = _normal_flow(process), _prior(process)
    dtype = jnp.result_type(float)

    @eqx.filter_jit
    def both(ts):
        controller = dfx.StepTo(ts)
        solves = (
            dfx.diffeqsolve(
                term, solver, ts[0], ts[-1], None, u, stepsize_controller=controller
            ).ys[0]
            for term, solver in ((flow, gd.GDDIM()), (reverse, gd.GDDIM(1)))
        )
        return tuple(solves)

    reverse = gd.reverse_sde(flow, 0.5, jax.random.key(0), (3,))
    long, _ = both(jnp.array([1, 1 - 1e-3, 0.5, 0.2, 0.05, 0.001], dtype))
    for first in (1e-4, 1e-5, 2e-6):
        ts = jnp.array([1, 1 - first, 0.5, 0.2, 0.05, 0.001], dtype)
        found, stochastic = both(ts)
        np.testing.assert_allclose(found, long, rtol=2e-2)
        assert jnp.isfinite(stochastic).all()
    # A step of one unit of rounding.
    ts = jnp.array([1, np.nextafter(np.array(1, dtype), 0), 0.5, 0.2, 0.05, 0.001], dtype)
    found = solve(flow, gd.GDDIM(), np.asarray(ts), u)
    np.testing.assert_allclose(found, long, rtol=2e-2)


@pytest.mark.precision
def test_adaptive_steps_from_pure_noise():
    process = gd.RectifiedFlow((1,))
    flow, u = _normal_flow(process), _prior(process)
    for end in (process.t_min, 0.0):
        found = _adaptive(flow, gd.GDDIM(), 1e-5, u, end)[0]
        exact = _exact(process, end, 1.0, u)
        np.testing.assert_allclose(found, exact, atol=1e-4)
