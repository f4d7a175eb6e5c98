"""What one step of GDDIM computes, against brute force in NumPy."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx._process import AbstractLangevin

from ..helpers import (
    adaptive,
    CountedModel,
    diffrax_solve,
    flow_of,
    last,
    max_difference,
    mixture_for,
    NoNoise,
    prior_state,
    processes,
    solve,
    thorough,
)


def _components(y):
    return np.stack([np.asarray(leaf) for leaf in jtu.tree_leaves(y)])


@eqx.filter_jit
def _log_snr(process, times):
    return jax.vmap(process.log_snr)(jnp.asarray(times))


def _coordinate(name, process, times):
    """The coordinates by their definitions, in NumPy."""
    times = np.asarray(times, float)
    if name == "time":
        return times
    if name == "soft log-SNR":
        return np.log1p(np.exp(1 + np.asarray(_log_snr(process, times))))
    all_times = np.concatenate([[process.t_max, process.t_min], times])
    clock = 0.0
    for readings in (np.asarray(_log_snr(process, all_times)), np.sqrt(all_times)):
        first, end = readings[:2]
        clock += 0.5 * (readings[2:] - first) / (end - first)
    return np.exp(-10 * clock)


@eqx.filter_jit
def _noise_integrand(process, frame, t, taus):
    """Psi(t, tau) G G^T K^-T / 2 (equation 19 of the paper)."""

    def integrand(tau):
        g = process.diffusion(tau)
        k = process.factor(tau) if frame == "R" else process.cholesky(tau)
        return 0.5 * (process.transition(t, tau) @ g @ g.T @ k.inverse().T).blocks

    return jax.vmap(integrand)(taus)


@eqx.filter_jit
def _data_integrand(process, lam, t, taus):
    """What multiplies the prediction of the initial state under the integral."""

    def integrand(tau):
        g = process.diffusion(tau)
        back = gd.reverse_transition(process, t, tau, lam)[0]
        score = g @ g.T @ process.covariance(tau).inverse()
        data = process.transition(tau, jnp.zeros_like(tau))
        return (back @ score @ data * (-0.5 * (1 + lam**2))).blocks

    return jax.vmap(integrand)(taus)


@eqx.filter_jit
def _transition(process, t, s, lam):
    """That of the linear part; `lam` is `None` in noise space."""
    if lam is None:
        return process.transition(t, s).blocks
    return gd.reverse_transition(process, t, s, lam)[0].blocks


def _by_hand(process, coordinate, integrand, lam, times, values, u, s, t):
    """The exact solution if the interpolated quantity is the polynomial in the coordinate
    through its values at some times."""
    x, w = np.polynomial.legendre.leggauss(8)
    edges = np.linspace(s, t, 13)
    half = np.diff(edges)[:, None] / 2
    tau = (edges[:-1, None] + half * (1 + x)).ravel()
    weight = (half * w).ravel()
    s, t = jnp.asarray(s), jnp.asarray(t)
    kernel = np.asarray(integrand(t, jnp.asarray(tau)))
    out = np.einsum("ij...,j...->i...", _transition(process, t, s, lam), u)
    at_nodes = _coordinate(coordinate, process, times)
    at_tau = _coordinate(coordinate, process, tau)
    for j, value in enumerate(values):
        others = np.delete(at_nodes, j)
        basis = np.prod((at_tau[:, None] - others) / (at_nodes[j] - others), axis=1)
        coefficient = np.tensordot(weight * basis, kernel, 1)
        out = out + np.einsum("ij...,j...->i...", coefficient, value)
    return out


def _check_steps(process, term, solver, evaluate, by_hand, coordinate, order, corrector):
    """Four steps of different lengths, each with its correction and error estimate."""
    ts, y = [0.9, 0.7, 0.62, 0.4, 0.3], prior_state(process)
    state = solver.init(term, ts[0], ts[1], y, None)
    step, evaluate = eqx.filter_jit(solver.step), eqx.filter_jit(evaluate)
    times, values, before = [], [], None
    for s, t in zip(ts[:-1], ts[1:]):
        times = [s, *times]
        values = [_components(evaluate(jnp.asarray(s), y)), *values]
        start = _components(y)
        if corrector and before is not None:
            used = slice(corrector + 1)
            start = by_hand(coordinate, times[used], values[used], before, times[1], s)
        hand = lambda name, q: by_hand(name, times[:q], values[:q], start, s, t)
        expected = hand(coordinate, order)
        y, error, _, state, _ = step(
            term, jnp.asarray(s), jnp.asarray(t), y, None, state, False
        )
        np.testing.assert_allclose(_components(y), expected, rtol=1e-9, atol=1e-9)
        lower = min(len(times), order) - 1
        if lower >= 1:
            # The coordinate of the lower order does not depend on that of the step.
            change = expected - hand("soft log-SNR", lower)
            np.testing.assert_allclose(_components(error), change, atol=1e-9)
        before = start


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, frame, order",
    [
        *(("vp", "R", 4), ("cld", "R", 4), ("cld", "cholesky", 4)),
        *thorough(("vp", "R", 1), ("cld", "R", 2), ("cld", "cholesky", 3)),
    ],
)
def test_steps_in_noise_space_are_those_of_the_paper(name, frame, order):
    flow, process = flow_of(name), processes[name]()
    integrand = lambda t, taus: _noise_integrand(process, frame, t, taus)
    hand = lambda coordinate, *args: _by_hand(process, coordinate, integrand, None, *args)
    evaluate = lambda s, y: flow.noise(s, y, None, frame)
    solver = gd.GDDIM(order, "noise", frame=frame)
    _check_steps(process, flow, solver, evaluate, hand, "time", order, 0)


def _data_by_hand(process, lam):
    lam = jnp.asarray(lam)
    integrand = lambda t, taus: _data_integrand(process, lam, t, taus)
    return lambda coordinate, *args: _by_hand(process, coordinate, integrand, lam, *args)


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, coordinate, order, corrector, lam",
    [
        *(("vp", "clock", 2, 2, 0.0), ("cld", "clock", 3, 2, 0.7)),
        *thorough(
            *(("cld", "time", 1, 1, 0.0), ("cld", "time", 1, 1, 0.7)),
            *(("cld", "clock", 3, 2, 0.0), ("vp", "clock", 2, 2, 0.7)),
            *(("vp", "time", 3, 0, 0.0), ("vp", "time", 3, 0, 0.7)),
        ),
    ],
)
def test_steps_in_data_space(name, coordinate, order, corrector, lam):
    flow, process = flow_of(name), processes[name]()
    term = gd.reverse_sde(flow, lam, NoNoise(prior_state(process))) if lam else flow
    solver = gd.GDDIM(order, corrector=corrector, coordinate=coordinate)
    evaluate = lambda s, y: flow.denoised(s, y, None)
    hand = _data_by_hand(process, lam)
    _check_steps(process, term, solver, evaluate, hand, coordinate, order, corrector)


@pytest.mark.x64
def test_reevaluation_is_the_corrector_with_a_second_evaluation():
    process = gd.CLD((3,))
    model = CountedModel(mixture_for(process).model(process))
    flow = gd.ProbabilityFlow(process, model)
    ts, y = jnp.array([0.8, 0.6, 0.5]), prior_state(process)
    got = _components(solve(flow, gd.GDDIM(2, reevaluate=True), ts, y))
    jax.effects_barrier()
    assert model.count == 2 * 2
    y, hand = _components(y), _data_by_hand(process, 0.0)
    predict = lambda t, u: _components(flow.denoised(t, gd.Phase(*jnp.asarray(u)), None))
    times, values = [], []
    for s, t in zip(ts[:-1], ts[1:]):
        times, values = [s, *times][:2], [predict(s, y), *values][:2]
        guess = hand("clock", times, values, y, s, t)
        y = hand("clock", [t, s], [predict(t, guess), values[0]], y, s, t)
    np.testing.assert_allclose(got, y, atol=1e-8)


@eqx.filter_jit
def _steps_for_one_point(process, spaces, s, t):
    """Errors of steps between pairs of times, for data at one point; and what rounding
    errors are multiplied by: backward from where little of the data is left, and forward
    from where there is little noise."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=process.shape))
    model = gd.GaussianMixture(x[None]).model(process)
    flow, start = gd.ProbabilityFlow(process, model), process.encode(x)
    noise = jtu.tree_map(lambda y: jnp.asarray(rng.normal(size=y.shape)), start)
    size = lambda operator: jnp.abs(operator.blocks).max()

    def exact(t):
        mean = process.transition(t, jnp.zeros_like(t)).mv(start)
        return jtu.tree_map(lambda a, b: a + b, mean, process.factor(t).mv(noise))

    def errors(s, t):
        out = []
        for space in spaces:
            solver, y = gd.GDDIM(4, space), exact(s)
            state = solver.init(flow, s, t, y, None)
            y = solver.step(flow, s, t, y, None, state, False)[0]
            differences = jtu.tree_map(lambda a, b: jnp.abs(a - b).max(), y, exact(t))
            out.append(jnp.stack(jtu.tree_leaves(differences)).max())
        growth = size(process.transition(t, s)) * size(process.factor(s))
        inverse = process.factor(s).inverse()
        return jnp.stack(out), growth + size(process.factor(t)) * size(inverse)

    return jax.vmap(errors)(s, t)


@pytest.mark.parametrize("name", processes)
def test_one_step_is_exact_for_one_data_point(name):
    process = processes[name]()
    fractions = np.random.default_rng(1).uniform(0, 1, (32, 2))
    fractions[:4] = [[1, 0], [0, 1], [1, 0.9], [0.1, 0.2]]
    fractions = fractions[np.abs(np.diff(fractions)[:, 0]) > 0.02]
    span = process.t_max - process.t_min
    times = jnp.asarray(process.t_min + span * fractions**3, jnp.result_type(float))
    errors, growth = _steps_for_one_point(process, ("noise", "data"), *times.T)
    # Those that are solved by collocation are less accurate.
    solved = isinstance(process, (gd.LinearSDE, AbstractLangevin))
    eps = (6 if solved else 1) * float(jnp.finfo(times.dtype).eps)
    assert (errors < 30 * eps * (1 + growth[:, None])).all(), errors / growth[:, None]


class Trivial(gd.AbstractDiagonalProcess):
    """Without drift and with R_t = t: the flow is du/dt = noise, and GDDIM is the
    Adams-Bashforth method for any ordinary differential equation."""

    shape: tuple[int, ...] = eqx.field(static=True)
    data_scale = 1.0
    t_min = 0.1
    t_max = 100.0
    t_end = 100.0
    t_zero_signal = float("inf")

    @property
    def basis(self):
        return gd.IdentityBasis()

    def _drift(self, t):
        return jnp.zeros_like(t)

    def _diffusion(self, t):
        return jnp.sqrt(2 * t)

    def _transition(self, t, s):
        return jnp.ones_like(t)

    def _std(self, t):
        return t

    def _prior_factor(self):
        return jnp.ones(())


@pytest.mark.x64
def test_is_adams_bashforth_on_a_process_without_drift():
    def field(t, y, args):
        return jnp.stack([y[1], -args * y[0]])

    flow = gd.ProbabilityFlow(Trivial((2,)), field)
    y0, h = jnp.array([1.0, 0.5]), 0.1
    ts = 1 + h * np.arange(21)
    got = solve(flow, gd.GDDIM(3, "noise"), jnp.asarray(ts), y0, args=jnp.asarray(2.0))
    rules = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    y, history = np.asarray(y0), []
    for t in ts[:-1]:
        history = [np.array([y[1], -2 * y[0]]), *history][:3]
        y = y + h * sum(b * f for b, f in zip(rules[len(history) - 1], history))
    np.testing.assert_allclose(got, y, rtol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("order", (4, *thorough(2)))
def test_solves_nonlinear_problems_adaptively(order):
    # Two problems of the DETEST set, with closed-form solutions.
    def field(t, y, args):
        return jnp.stack([-0.5 * y[0] ** 3, y[1] * jnp.cos(t - 1)])

    flow, solver = gd.ProbabilityFlow(Trivial((2,)), field), gd.GDDIM(order, "noise")
    sol = adaptive(flow, solver, 1.0, 6.0, 1e-4, jnp.ones(2), 1e-8, max_steps=200_000)
    exact = [1 / np.sqrt(6.0), np.exp(np.sin(5.0))]
    np.testing.assert_allclose(last(sol.ys), exact, rtol=1e-5)


def test_three_steps_do_not_diverge():
    for name in ("vp", "cld", "bdm"):
        process = processes[name]()
        data = mixture_for(process, scale=0.1)
        flow = gd.ProbabilityFlow(process, data.model(process))
        ts, u = gd.time_grid(process, 3), prior_state(process, (64,))
        x = process.decode(solve(flow, gd.GDDIM(), ts, u))
        assert float(jnp.abs(x).max()) < 2 * float(jnp.abs(data.means).max())


# Time zero


@pytest.mark.x64
def test_starting_without_noise_is_rejected():
    flow = flow_of("vp")
    y, ts = prior_state(flow.process), jnp.array([0.0, 0.1, 0.2])
    with pytest.raises(Exception, match="cannot start where there is no noise"):
        solve(flow, gd.GDDIM(), ts, y)
    assert jnp.isfinite(solve(flow, gd.GDDIM(3, "noise"), ts, y)).all()


@pytest.mark.x64
def test_a_solve_to_time_zero_returns_the_predicted_data():
    flow = flow_of("vp")
    ts, y0 = gd.time_grid(flow.process, 6), prior_state(flow.process)
    before = solve(flow, gd.GDDIM(1), ts, y0)
    y = solve(flow, gd.GDDIM(1), jnp.append(ts, 0.0), y0)
    assert max_difference(y, flow.denoised(ts[-1], before, None)) < 1e-12
    assert jnp.isfinite(solve(flow, gd.GDDIM(), jnp.append(ts, 0.0), y0)).all()


@pytest.mark.x64
def test_one_long_step_to_time_zero_does_not_extrapolate_in_a_logarithm():
    flow, solver = flow_of("vp"), gd.GDDIM(corrector=0, coordinate="log_snr")
    ts, y0 = np.linspace(1, 0, 11), prior_state(flow.process)
    data = flow.denoised(0.1, solve(flow, solver, ts[:-1], y0), None)
    assert max_difference(solve(flow, solver, ts, y0), data) < 1e-9


# Options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(order=0), r"must be 1, 2, 3 or 4; got 0\.(.|\n)*count from 0.*one more"),
        (dict(order=5), "must be 1, 2, 3 or 4; got 5"),
        (dict(order=True), "must be 1, 2, 3 or 4; got True"),
        (dict(space="score"), "`space` must be 'data', 'noise' or.*got 'score'"),
        (dict(space="noise", frame="L"), "`frame` must be 'R' or 'cholesky'; got 'L'"),
        (dict(order=2, corrector=3), "`corrector` must be an integer from 0.*is 2,.*got 3"),
        (dict(corrector=True), "`corrector` must be an integer"),
        (
            dict(coordinate="snr"),
            "`coordinate` must be one of 'time', 'log_snr'.*got 'snr'",
        ),
        (dict(variable="time"), "`variable` was renamed: pass `coordinate`"),
        (dict(factor="R"), "`factor` was renamed: pass `frame`"),
        (dict(frame="cholesky"), r"use `GDDIM\(space='noise', frame='cholesky'\)`"),
        (dict(order=1, reevaluate=True), "`reevaluate` is for the corrector"),
    ],
)
def test_unknown_or_contradictory_options_are_rejected(
    arguments, message, without_type_checks
):
    with pytest.raises(ValueError, match=message):
        gd.GDDIM(**arguments)


@ft.cache
def _reverse(name="vp"):
    flow = flow_of(name)
    return gd.reverse_sde(flow, 1.0, NoNoise(prior_state(flow.process)))


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, solver, message",
    [
        ("vp", gd.GDDIM(3, "noise"), r"order 1.*`GDDIM\(3\)`.*lam=1.0"),
        ("vp", gd.GDDIM(1, "noise", 1), r"order 1.*`GDDIM\(1\)`.*lam=1.0"),
        ("cld", gd.GDDIM(1, "noise", frame="cholesky"), "for the probability flow only"),
    ],
)
def test_noise_space_on_reverse_diffusions_is_of_order_one(name, solver, message):
    y = prior_state(processes[name]())

    def step():
        state = solver.init(_reverse(name), 0.9, 0.8, y, None)
        return solver.step(_reverse(name), 0.9, 0.8, y, None, state, False)

    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(step)


def _term_of(name):
    ode = dfx.ODETerm(lambda t, y, args: -y)
    path = dfx.UnsafeBrownianPath((2,), jax.random.key(0))
    return {
        "ode": ode,
        "sde": dfx.MultiTerm(ode, dfx.ControlTerm(lambda t, y, args: 1.0, path)),
        "semilinear": gd.Semilinear(-1.0, lambda t, y, args: y),
        "vp": flow_of("vp"),
        "cld": flow_of("cld"),
    }[name]


@pytest.mark.parametrize(
    "name, y0, message",
    [
        (
            *("ode", jnp.ones(2)),
            r"got ODETerm. .* pass that process: `GDDIM\(process=",
        ),
        ("semilinear", jnp.ones(2), "got Semilinear. .* use `ExponentialAdams`"),
        ("sde", jnp.ones(2), "got MultiTerm. Use another"),
        ("cld", jnp.ones(3), r"Phase.*\(\*batch, 3\)"),
        ("vp", jnp.ones(2), r"\(\*batch, 3\).*got \(2,\)"),
        (
            *("cld", gd.Phase(jnp.ones((1, 3)), jnp.ones((2, 3)))),
            r"got Phase\(x=\(1, 3\), v=\(2, 3\)\)",
        ),
    ],
)
def test_other_terms_and_states_are_rejected(name, y0, message):
    with pytest.raises(ValueError, match=message):
        gd.GDDIM().init(_term_of(name), 1.0, 0.1, y0, None)


@pytest.mark.parametrize(
    "model", (lambda t, u, args: u.v, lambda t, u, args: gd.Phase(u.x, u.v[:2]))
)
def test_a_model_that_returns_something_else_is_rejected(model):
    flow = gd.ProbabilityFlow(gd.CLD((3,)), model)
    with pytest.raises(
        ValueError, match="must return the structure and shape of its state"
    ):
        solve(flow, gd.GDDIM(), gd.time_grid(flow.process, 4), prior_state(flow.process))


@pytest.mark.x64
@pytest.mark.parametrize(
    "times, error, message",
    [
        (np.linspace(1.2, 0.5, 4), RuntimeError, r"outside \[0, 1.0\]"),
        (np.linspace(0.5, -0.1, 4), RuntimeError, r"outside \[0, 1.0\]"),
        (np.array([1.0, 0.5, 0.7, 0.1]), RuntimeError, "strictly increasing"),
        (np.array([0.1, 0.5]), Exception, "must be solved backward in time"),
    ],
)
def test_times_are_checked(times, error, message):
    term = _reverse() if len(times) == 2 else flow_of("vp")
    with pytest.raises(error, match=message):
        diffrax_solve(term, gd.GDDIM(), jnp.asarray(times), prior_state(gd.VP((3,))))


def test_a_step_size_that_is_nan_is_named(as_users_have_it):
    solver, flow = gd.GDDIM(), flow_of("vp")
    u = prior_state(flow.process)
    state = solver.init(flow, 1.0, 0.9, u, None)
    with pytest.raises(Exception, match="step size is NaN"):
        eqx.filter_jit(solver.step)(flow, 1.0, jnp.nan, u, None, state, False)
