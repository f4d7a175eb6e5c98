"""GDDIM in data space: its formula, its corrector, and what they are for."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    accurate,
    CountedModel,
    every_family,
    forward,
    max_difference,
    mixture_for,
    NoNoise,
    prior_state,
    processes,
    slow,
    solve,
)


def _components(y):
    return np.stack([np.asarray(leaf) for leaf in jtu.tree_leaves(y)])


def _readings(variable, process, times):
    """The variable by its definition, in NumPy."""
    times = np.asarray(times, float)
    if variable == "time":
        return times
    all_times = np.concatenate([[process.t_max, process.t_min], times])
    if variable == "soft log-SNR":
        return np.log1p(np.exp(1 + np.asarray(_log_snr(process, times))))
    clock = 0.0
    for readings in (np.asarray(_log_snr(process, all_times)), np.sqrt(all_times)):
        first, end = readings[:2]
        clock += 0.5 * (readings[2:] - first) / (end - first)
    return np.exp(-10 * clock)


@eqx.filter_jit
def _log_snr(process, times):
    return jax.vmap(process.log_snr)(times)


@eqx.filter_jit
def _linear(process, t, s, lam):
    return gd.reverse_transition(process, t, s, lam)[0].blocks


@eqx.filter_jit
def _integrand(process, lam, t, taus):
    """What multiplies the prediction of the initial state under the integral."""

    def integrand(tau):
        g = process.diffusion(tau)
        back = gd.reverse_transition(process, t, tau, lam)[0]
        score = g @ g.T @ process.covariance(tau).inverse()
        data = process.transition(tau, jnp.zeros_like(tau))
        return (back @ score @ data * (-0.5 * (1 + lam**2))).blocks

    return jax.vmap(integrand)(taus)


def _by_hand(process, variable, lam, times, predictions, u, s, t):
    """The exact solution of the equation in which the prediction of the initial state is
    the polynomial in the variable through those at some times, by brute force."""
    x, w = np.polynomial.legendre.leggauss(8)
    edges = np.linspace(s, t, 13)
    half = np.diff(edges)[:, None] / 2
    tau = (edges[:-1, None] + half * (1 + x)).ravel()
    weight = (half * w).ravel()

    lam, t = jnp.asarray(lam), jnp.asarray(t)
    values = np.asarray(_integrand(process, lam, t, jnp.asarray(tau)))
    linear = _linear(process, t, jnp.asarray(s), lam)
    out = np.einsum("ij...,j...->i...", linear, u)
    at_nodes = _readings(variable, process, times)
    at_tau = _readings(variable, process, tau)
    for j, prediction in enumerate(predictions):
        others = np.delete(at_nodes, j)
        basis = np.prod((at_tau[:, None] - others) / (at_nodes[j] - others), axis=1)
        coefficient = np.tensordot(weight * basis, values, 1)
        out = out + np.einsum("ij...,j...->i...", coefficient, prediction)
    return out


@pytest.mark.x64
@pytest.mark.parametrize("lam", (0.0, 0.7))
@pytest.mark.parametrize(
    "name, variable, order, corrector",
    [
        ("vp", "clock", 2, 2),
        ("cld", "time", 1, 1),
        ("cld", "clock", 3, 2),
        *slow(("vp", "time", 3, 0)),
    ],
)
def test_steps_by_hand(name, variable, order, corrector, lam):
    process = processes[name]()
    term = flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    y = prior_state(process)
    if lam:
        term = gd.reverse_sde(flow, lam, NoNoise(y))
    solver = gd.GDDIM(order, corrector=corrector, coordinate=variable)
    ts = [0.9, 0.7, 0.62, 0.4, 0.3]
    state = solver.init(term, ts[0], ts[1], y, None)
    step = eqx.filter_jit(solver.step)
    times, predictions, before = [], [], None
    denoised = eqx.filter_jit(lambda s, y: flow.denoised(s, y, None))
    for s, t in zip(ts[:-1], ts[1:]):
        times = [s, *times]
        predictions = [_components(denoised(jnp.asarray(s), y)), *predictions]
        start = _components(y)
        if corrector and before is not None:
            used = slice(corrector + 1)
            start = _by_hand(
                process, variable, lam, times[used], predictions[used], before, times[1], s
            )
        hand = lambda variable, q: _by_hand(
            process, variable, lam, times[:q], predictions[:q], start, s, t
        )
        expected = hand(variable, order)
        y, error, _, state, _ = step(
            term, jnp.asarray(s), jnp.asarray(t), y, None, state, False
        )
        np.testing.assert_allclose(_components(y), expected, rtol=1e-8, atol=1e-8)
        if len(times) >= order > 1:
            # The variable of the lower order does not depend on that of the step.
            change = expected - hand("soft log-SNR", order - 1)
            np.testing.assert_allclose(_components(error), change, atol=1e-8)
        before = start


@pytest.mark.x64
def test_reevaluation_is_the_corrector_with_a_second_evaluation():
    process = gd.CLD((3,))
    model = CountedModel(mixture_for(process).model(process))
    term = gd.ProbabilityFlow(process, model)
    solver = gd.GDDIM(2, reevaluate=True)
    ts, y = jnp.array([0.8, 0.6, 0.5]), prior_state(process)
    got = _components(solve(term, solver, ts, y))
    jax.effects_barrier()
    assert model.count == 2 * 2
    y = _components(y)
    predict = lambda t, u: _components(term.denoised(t, gd.Phase(*jnp.asarray(u)), None))
    step = lambda times, values, u, s, t: _by_hand(
        process, "clock", 0.0, times, values, u, s, t
    )
    times, values = [], []
    for s, t in zip(ts[:-1], ts[1:]):
        times, values = [s, *times][:2], [predict(s, y), *values][:2]
        guess = step(times, values, y, s, t)
        y = step([t, s], [predict(t, guess), values[0]], y, s, t)
    np.testing.assert_allclose(got, y, atol=1e-8)


@every_family
def test_all_predictions_of_one_model_give_the_same_initial_state(name):
    process = processes[name]()
    u, t = prior_state(process, (2,)), jnp.asarray(0.4 * process.t_max)
    noise_of = mixture_for(process).model(process)
    flow = gd.ProbabilityFlow(process, noise_of)
    initial = flow.denoised(t, u, None)
    data = lambda t, u, args: process.to_data(
        jtu.tree_map(lambda x: x / process.data_scale, initial)
    )
    score = lambda t, u, args: process.to_data(flow.score(t, u_in_states, None))
    u_in_states = u
    predictions = {"data": data, "score": score}
    if process.num_components == 1:

        def v(t, u, args):
            mean = process.transition(t, jnp.zeros_like(t)) * process.data_scale
            clean = jtu.tree_map(lambda x: x / process.data_scale, initial)
            noise = flow.noise(t, u_in_states, None)
            return process.to_data(mean.mv(noise) - process.factor(t).mv(clean))

        predictions["v"] = v
        predictions["flow"] = lambda t, u, args: process.to_data(
            flow.vf(t, u_in_states, None) / process.flow_speed(t)
        )
    tolerance = 1e-9 if jax.config.jax_enable_x64 else 2e-2
    for predicts, model in predictions.items():
        other = gd.ProbabilityFlow(process, model, predicts).denoised(t, u, None)
        assert max_difference(other, initial) < tolerance * (1 + max_difference(initial, u))


@pytest.mark.x64
def test_samples_are_more_accurate_than_the_papers():
    angle = np.pi / 4 * np.arange(8)
    ring = gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    for process in (gd.VP((2,)), gd.CLD((2,))):
        term = gd.ProbabilityFlow(process, ring.model(process))
        u = process.prior(jax.random.key(0), (256,))

        def draw(solver, number, grid):
            ts = gd.time_grid(process, number, grid)
            return process.decode(solve(term, solver, ts, u))

        exact = draw(gd.GDDIM(), 300, "clock")
        error = lambda x: float(jnp.median(jnp.linalg.norm(x - exact, axis=-1)))
        ours = error(draw(gd.GDDIM(), 30, "clock"))
        assert 4 * ours < error(draw(gd.GDDIM(3, "noise"), 30, "quadratic"))


def test_three_steps_do_not_diverge():
    for name in ("vp", "cld", "bdm"):
        process = processes[name]()
        data = mixture_for(process, scale=0.1)
        u = process.prior(jax.random.key(0), (64,))
        term = gd.ProbabilityFlow(process, data.model(process))
        ts = gd.time_grid(process, 3)
        x = process.decode(solve(term, gd.GDDIM(), ts, u))
        assert float(jnp.abs(x).max()) < 2 * float(jnp.abs(data.means).max())


@pytest.mark.x64
def test_dense_output_is_continuous_across_corrections():
    process = gd.CLD((3,))
    term = gd.ProbabilityFlow(process, mixture_for(process, scale=0.5).model(process))
    ts, y0 = gd.time_grid(process, 8), prior_state(process)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(),
        ts[0],
        ts[-1],
        None,
        y0,
        stepsize_controller=dfx.StepTo(ts),
        saveat=dfx.SaveAt(dense=True),
        max_steps=8,
        adjoint=forward,
    )
    for t in ts[1:-1]:
        jump = max_difference(sol.evaluate(t * (1 + 1e-9)), sol.evaluate(t * (1 - 1e-9)))
        assert jump < 1e-6


@pytest.mark.x64
def test_starting_without_noise_is_refused():
    process = gd.VP((2,))
    term = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    y, ts = prior_state(process), jnp.array([0.0, 0.1, 0.2])
    with pytest.raises(Exception, match="cannot start where there is no noise"):
        solve(term, gd.GDDIM(), ts, y)
    assert jnp.isfinite(solve(term, gd.GDDIM(3, "noise"), ts, y)).all()


@pytest.mark.x64
def test_a_solve_to_time_zero_returns_the_predicted_data():
    process = gd.VP((2,))
    data = mixture_for(process)
    term = gd.ProbabilityFlow(process, data.model(process))
    ts, y0 = gd.time_grid(process, 6), prior_state(process)
    before = solve(term, gd.GDDIM(1), ts, y0)
    y = solve(term, gd.GDDIM(1), jnp.append(ts, 0.0), y0)
    assert max_difference(y, term.denoised(ts[-1], before, None)) < 1e-12
    assert jnp.isfinite(solve(term, gd.GDDIM(), jnp.append(ts, 0.0), y0)).all()


@pytest.mark.x64
@pytest.mark.parametrize("variable", ["log_snr", "clock"])
def test_several_steps_below_t_min(variable):
    process = gd.VP((2,))
    data = mixture_for(process)
    term = gd.ProbabilityFlow(process, data.model(process))
    y0 = prior_state(process)
    ts = np.append(gd.time_grid(process, 40), process.t_min * np.array([0.5, 0.2, 0.05]))
    exact = accurate(term, ts[0], ts[-1], y0)
    solver = gd.GDDIM(coordinate=variable)
    assert max_difference(solve(term, solver, ts, y0), exact) < 0.01
    # One long step to time 0 does not extrapolate in a logarithm.
    ts = np.linspace(1, 0, 11)
    if variable != "clock":
        found = solve(term, gd.GDDIM(4, "data", 0, coordinate=variable), ts, y0)
        before = solve(term, gd.GDDIM(4, "data", 0, coordinate=variable), ts[:-1], y0)
        data = term.denoised(0.1, before, None)
        assert max_difference(found, data) < 1e-9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(space="score"), "`space` must be 'data', 'noise' or.*got 'score'"),
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
def test_unknown_or_contradictory_options_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        gd.GDDIM(**arguments)


@pytest.mark.x64
def test_options_of_noise_space_are_refused_where_there_is_noise():
    process = gd.VP((2,))
    u = prior_state(process)
    terms = gd.reverse_sde(
        gd.ProbabilityFlow(process, mixture_for(process).model(process)), 1.0, NoNoise(u)
    )
    for order, corrector in ((3, 0), (1, 1)):
        solver = gd.GDDIM(order, "noise", corrector)
        with pytest.raises(ValueError, match=rf"order 1.*`GDDIM\({order}\)`.*lam=1.0"):
            solve(terms, solver, gd.time_grid(process, 3), u)
