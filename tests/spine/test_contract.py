"""What Diffrax asks of a solver."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    accurate,
    adaptive,
    CountedModel,
    diffrax_solve,
    every_kind_of_saving,
    flow_of,
    forward,
    last,
    max_difference,
    mixture_for,
    prior_state,
    processes,
    thorough,
)


def _tight():
    return 1e-10 if jax.config.jax_enable_x64 else 3e-4


def _rtol():
    return 1e-10 if jax.config.jax_enable_x64 else 1e-5


def _go(flow, solver, ts, y0, **kwargs):
    kwargs = dict(max_steps=len(ts) - 1, adjoint=forward) | kwargs
    controller = dfx.StepTo(ts)
    return dfx.diffeqsolve(
        flow, solver, ts[0], ts[-1], None, y0, stepsize_controller=controller, **kwargs
    )


def _taken(sol):
    """The times of an adaptive solve, and the state at the last."""
    ts = sol.ts[np.isfinite(sol.ts)]
    return ts, jtu.tree_map(lambda ys: ys[len(ts) - 1], sol.ys)


# Time and its direction


@pytest.mark.x64
@pytest.mark.thorough
@pytest.mark.parametrize("name", ("vp", "cld"))
def test_encoding_and_sampling_undo_each_other(name):
    flow = flow_of(name, scale=0.5)
    y0 = prior_state(flow.process, (2,))
    down = gd.time_grid(flow.process, 400, t1=0.02)
    x = diffrax_solve(flow, gd.GDDIM(4), down, y0)
    back = diffrax_solve(flow, gd.GDDIM(4), down[::-1], x)
    assert max_difference(back, y0) < 2e-3


@pytest.mark.parametrize("name", ("vp", "cld"))
def test_agrees_with_a_runge_kutta_method_on_the_same_term(name):
    flow = flow_of(name, scale=0.5)
    y0 = prior_state(flow.process, (2,))
    ts = gd.time_grid(flow.process, 400)
    expected = accurate(flow, ts[0], ts[-1], y0, rtol=_rtol())
    assert max_difference(diffrax_solve(flow, gd.GDDIM(4), ts, y0), expected) < 1e-3


# Saving


@pytest.mark.x64
def test_saved_states_of_all_kinds_agree():
    flow = flow_of("cld")
    y0 = prior_state(flow.process)
    ts = gd.time_grid(flow.process, 12)
    inner = 0.5 * (ts[1:] + ts[:-1])
    sol = _go(flow, gd.GDDIM(3), ts, y0, saveat=every_kind_of_saving(ts, inner))
    assert sol.ts is not None and sol.ys is not None
    steps, at_ts, between, final, skipped = sol.ys
    np.testing.assert_allclose(sol.ts[0], ts)
    # At the end of a step the interpolation may round otherwise than the step.
    assert max_difference(steps, at_ts) < _tight()
    assert max_difference(jtu.tree_map(lambda y: y[0], steps), y0) == 0
    np.testing.assert_allclose(final[0], ts[-1] * last(steps).x, rtol=1e-6)
    assert max_difference(skipped, jtu.tree_map(lambda y: y[3::3], steps)) == 0
    evaluate = jax.jit(jax.vmap(sol.evaluate))
    assert max_difference(evaluate(inner), between) < _tight()
    # Dense output is continuous across corrections.
    ends = ts[1:-1]
    assert max_difference(evaluate(ends * (1 + 1e-9)), evaluate(ends * (1 - 1e-9))) < 1e-6


@pytest.mark.x64
@pytest.mark.thorough
def test_dense_output_is_as_accurate_as_the_steps():
    flow = flow_of("vp", scale=0.5)
    y0 = prior_state(flow.process)
    ts = gd.time_grid(flow.process, 200, t1=0.05)
    sol = _go(flow, gd.GDDIM(4), ts, y0, saveat=dfx.SaveAt(dense=True))
    t = 0.3 * ts[100] + 0.7 * ts[101]
    assert max_difference(sol.evaluate(t), accurate(flow, ts[0], t, y0, 1e-10)) < 1e-5
    velocity = flow.vf(t, sol.evaluate(t), None)
    np.testing.assert_allclose(sol.derivative(t), velocity, rtol=1e-3, atol=1e-3)
    difference = sol.evaluate(t, ts[-1])
    expected = sol.evaluate(ts[-1]) - sol.evaluate(t)
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_no_time_passes_between_equal_times():
    flow = flow_of("vp")
    y0, saveat = prior_state(flow.process), dfx.SaveAt(t0=True, t1=True)
    sol = dfx.diffeqsolve(
        flow, gd.GDDIM(), 0.5, 0.5, -0.1, y0, saveat=saveat, adjoint=forward
    )
    assert max_difference(sol.ys, jnp.stack([y0, y0])) == 0


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *thorough("cld")])
def test_solver_state_continues_a_solve_that_ended_there_only(name):
    flow = flow_of(name)
    y0, ts = prior_state(flow.process), gd.time_grid(flow.process, 20)
    # One program for all.
    go = eqx.filter_jit(lambda ts, y0, **kwargs: _go(flow, gd.GDDIM(4), ts, y0, **kwargs))
    end = lambda sol: last(sol.ys)
    saveat = dfx.SaveAt(t1=True, solver_state=True, made_jump=True)
    go = ft.partial(go, saveat=saveat)
    whole, first = go(ts, y0), go(ts[:11], y0)
    # Diffrax knows statically that fixed grids make no jumps.
    assert first.made_jump is False
    kwargs = dict(solver_state=first.solver_state, made_jump=first.made_jump)
    second = end(go(ts[10:], end(first), **kwargs))
    assert max_difference(second, end(whole)) < _tight()
    fresh = end(go(ts[10:], end(first)))
    assert max_difference(fresh, end(whole)) > 100 * max_difference(second, end(whole))
    # The history of a solve that ended elsewhere is not used. Other slots of the history,
    # hence another order of sums.
    stale = end(go(ts[10:], end(first), solver_state=whole.solver_state))
    assert max_difference(stale, fresh) < _tight()


# Step sizes


@pytest.mark.x64
def test_history_is_dropped_at_a_jump():
    flow, solver = flow_of("vp", scale=0.5), gd.GDDIM(3)
    y0 = prior_state(flow.process)
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-4, atol=1e-4), jump_ts=jnp.array([0.6])
    )
    kwargs = dict(stepsize_controller=controller, saveat=dfx.SaveAt(steps=True, t0=True))
    ts, reached = _taken(
        adaptive(flow, solver, 1.0, 0.3, -0.05, y0, max_steps=64, **kwargs)
    )
    at_jump = int(np.argmin(np.abs(ts - 0.6)))
    y = diffrax_solve(flow, solver, ts[: at_jump + 1], y0)
    y = diffrax_solve(flow, solver, ts[at_jump:], y)
    assert max_difference(y, reached) < _tight()


@pytest.mark.x64
def test_a_fixed_grid_reproduces_the_adaptive_solve():
    # Hence rejected steps leave no trace.
    flow, solver = flow_of("cld", scale=0.5), gd.GDDIM(3)
    y0, saveat = prior_state(flow.process), dfx.SaveAt(t0=True, steps=True)
    sol = adaptive(flow, solver, 1.0, 0.1, -0.5, y0, max_steps=256, saveat=saveat)
    assert sol.stats["num_rejected_steps"] > 0
    ts, reached = _taken(sol)
    assert max_difference(diffrax_solve(flow, solver, ts, y0), reached) < _tight()


@pytest.mark.x64
@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, order", [("vp", 1), ("vp", 3), ("vp", 4), ("cld", 4), ("cld", 1), ("cld", 3)]
)
def test_the_error_of_adaptive_steps_follows_the_tolerance(name, order):
    flow, solver = flow_of(name, scale=0.5), gd.GDDIM(order)
    y0 = prior_state(flow.process)
    exact = accurate(flow, 1.0, 1e-2, y0)

    @eqx.filter_jit
    def run(tol):
        sol = adaptive(flow, solver, 1.0, 1e-2, None, y0, tol, max_steps=100_000)
        return last(sol.ys)

    # The error of a step is kept at the tolerance. That of order 1 is of second order in
    # the step size, so that that of the solution goes with the root of the tolerance.
    tolerances = np.array([1e-4, 1e-5, 1e-6])
    errors = [max_difference(run(jnp.asarray(tol)), exact) for tol in tolerances]
    if order == 1:
        slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
        assert slope > 0.4 and errors[-1] < 1e-2, errors
    else:
        assert (np.array(errors) < 10 * tolerances).all(), errors


@pytest.mark.x64
@pytest.mark.thorough
def test_wrapped_in_a_half_solver():
    flow = flow_of("vp", scale=0.5)
    y0 = prior_state(flow.process)
    sol = adaptive(flow, dfx.HalfSolver(gd.GDDIM(2)), 1.0, 0.2, None, y0, 1e-4)
    expected = accurate(flow, 1.0, 0.2, y0, rtol=1e-9)
    assert max_difference(last(sol.ys), expected) < 1e-2


@pytest.mark.thorough
def test_constant_step_size_whose_last_steps_are_uneven():
    flow = flow_of("vp", scale=0.5)
    y0 = prior_state(flow.process)
    sol = dfx.diffeqsolve(flow, gd.GDDIM(4), 1.0, 0.1, -0.007, y0, adjoint=forward)
    expected = accurate(flow, 1.0, 0.1, y0, rtol=_rtol())
    assert max_difference(last(sol.ys), expected) < 2e-3


# Evaluations and compilation


def _counted(name="vp"):
    process = processes[name]()
    model = CountedModel(mixture_for(process).model(process))
    return gd.ProbabilityFlow(process, model), model


def _evaluations(run, model):
    sol = jax.block_until_ready(run())
    jax.effects_barrier()
    return sol, model.count


@pytest.mark.parametrize("adjoint", (forward, *thorough(dfx.RecursiveCheckpointAdjoint())))
def test_one_evaluation_a_step(adjoint):
    flow, model = _counted("cld")
    ts, y0 = gd.time_grid(flow.process, 9), prior_state(flow.process, (4,))
    saveat = dfx.SaveAt(t0=True, t1=True, steps=True, dense=True)
    run = lambda: _go(flow, gd.GDDIM(), ts, y0, saveat=saveat, adjoint=adjoint)
    assert _evaluations(run, model)[1] == 9


@pytest.mark.parametrize("batched", (False, True))
def test_one_evaluation_an_attempted_step(batched):
    flow, model = _counted()
    y0 = prior_state(flow.process, (3,) if batched else ())
    one = lambda y: adaptive(flow, gd.GDDIM(), 1.0, 0.1, -0.3, y)
    sol, count = _evaluations(lambda: (jax.vmap(one) if batched else one)(y0), model)
    assert count == np.max(sol.stats["num_steps"])


@pytest.mark.thorough
def test_no_evaluation_is_wasted_under_vmap():
    flow, model = _counted()
    ts, y0 = gd.time_grid(flow.process, 6), prior_state(flow.process, (3,))
    run = lambda: jax.vmap(lambda y: _go(flow, gd.GDDIM(), ts, y))(y0)
    assert _evaluations(run, model)[1] == 6


# In float32 rounding errors decide which steps are rejected.
@pytest.mark.x64
def test_vmap_equals_a_loop_even_when_step_counts_differ():
    flow = flow_of("vp", scale=0.5)
    y0 = jnp.asarray(np.array([[0.1, 0.2, 0.3], [3.0, -8.0, 2.0]]))
    saveat = dfx.SaveAt(t1=True, dense=True)
    one = lambda y: adaptive(
        flow, gd.GDDIM(), 1.0, 0.1, -0.3, y, max_steps=128, saveat=saveat
    )
    batched = jax.vmap(one)(y0)
    counts = batched.stats["num_steps"]
    assert counts[0] != counts[1]
    for i in range(2):
        alone = one(y0[i])
        assert alone.stats["num_steps"] == counts[i]
        np.testing.assert_allclose(batched.ys[i], alone.ys, atol=_tight())


def test_other_times_do_not_recompile_and_can_be_batched():
    flow = flow_of("vp")
    y0 = prior_state(flow.process)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(ts):
        return _go(flow, gd.GDDIM(), ts, y0).ys

    ts = jnp.stack([gd.time_grid(flow.process, 8, p) for p in (1.0, 2.0, 5.0)])
    alone = jnp.stack([run(t) for t in ts])
    together = jax.vmap(lambda t: _go(flow, gd.GDDIM(), t, y0).ys)(ts)
    np.testing.assert_allclose(together, alone, atol=_tight())


@pytest.mark.x64
@pytest.mark.thorough
def test_runs_without_jit():
    flow = flow_of("vp")
    y0, ts = prior_state(flow.process), gd.time_grid(flow.process, 2)
    compiled = diffrax_solve(flow, gd.GDDIM(2), ts, y0)
    with jax.disable_jit():
        plain = diffrax_solve(flow, gd.GDDIM(2), ts, y0)
    np.testing.assert_allclose(plain, compiled, atol=_tight())


@pytest.mark.x64
@pytest.mark.thorough
def test_progress_meter_and_events():
    flow = flow_of("vp", scale=0.5)
    y0 = jnp.asarray(np.array([[0.1, 0.2, 0.3], [0.5, -0.5, 0.2]]))
    # Diffrax passes events its own increasing time, here minus ours.
    event = dfx.Event(lambda t, y, args, **kwargs: t + 0.5)
    meter = dfx.TextProgressMeter()
    one = lambda y: dfx.diffeqsolve(
        flow, gd.GDDIM(), 1.0, 0.1, -0.02, y, event=event, progress_meter=meter
    )
    sol = jax.vmap(one)(y0)
    assert (sol.ts[:, 0] <= 0.5 + 1e-6).all() and (sol.ts[:, 0] > 0.47).all()
    gradient = jax.jit(jax.grad(lambda y: jax.vmap(one)(y).ys.sum()))(y0)
    assert jnp.isfinite(gradient).all()


def test_errors_of_the_model_come_through():
    class Oops(Exception):
        pass

    def model(t, u, args):
        raise Oops

    flow = gd.ProbabilityFlow(gd.VP((3,)), model)
    with pytest.raises(Oops):
        diffrax_solve(
            flow, gd.GDDIM(), gd.time_grid(flow.process, 3), prior_state(flow.process)
        )
