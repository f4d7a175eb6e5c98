"""What Diffrax asks of a solver."""

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
    CountedModel,
    diffrax_solve,
    every_kind_of_saving,
    forward,
    last,
    max_difference,
    mixture_for,
    prior_state,
    processes,
    slow,
)


def _term(name="vp", **kwargs):
    process = processes[name]()
    return gd.ProbabilityFlow(process, mixture_for(process, **kwargs).model(process))


def _tight():
    return 1e-10 if jax.config.jax_enable_x64 else 3e-4


def _go(term, solver, ts, y0, **kwargs):
    kwargs = dict(max_steps=len(ts) - 1) | kwargs
    controller = dfx.StepTo(ts)
    return dfx.diffeqsolve(
        term, solver, ts[0], ts[-1], None, y0, stepsize_controller=controller, **kwargs
    )


# Time and its direction


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "cld"))
def test_encoding_and_sampling_undo_each_other(name):
    term = _term(name, scale=0.5)
    y0 = prior_state(term.process, (2,))
    down = gd.time_grid(term.process, 400, t1=0.02)
    x = diffrax_solve(term, gd.GDDIM(4), down, y0)
    back = diffrax_solve(term, gd.GDDIM(4), down[::-1], x)
    assert max_difference(back, y0) < 2e-3


@pytest.mark.parametrize("name", ("vp", "cld"))
def test_agrees_with_a_runge_kutta_method_on_the_same_term(name):
    term = _term(name, scale=0.5)
    y0 = prior_state(term.process, (2,))
    ts = gd.time_grid(term.process, 400)
    rtol = 1e-10 if jax.config.jax_enable_x64 else 1e-5
    expected = accurate(term, ts[0], ts[-1], y0, rtol=rtol)
    assert max_difference(diffrax_solve(term, gd.GDDIM(4), ts, y0), expected) < 1e-3


# Saving


@pytest.mark.x64
def test_saved_states_of_all_kinds_agree():
    term = _term("cld")
    y0 = prior_state(term.process)
    ts = gd.time_grid(term.process, 12)
    inner = 0.5 * (ts[1:] + ts[:-1])
    saveat = every_kind_of_saving(ts, inner)
    sol = _go(term, gd.GDDIM(3), ts, y0, saveat=saveat)
    assert sol.ts is not None and sol.ys is not None
    steps, at_ts, between, final, skipped = sol.ys
    np.testing.assert_allclose(sol.ts[0], ts)
    # At the end of a step the interpolation may round otherwise than the step.
    assert max_difference(steps, at_ts) < _tight()
    assert max_difference(jtu.tree_map(lambda y: y[0], steps), y0) == 0
    np.testing.assert_allclose(final[0], ts[-1] * last(steps).x, rtol=1e-6)
    assert max_difference(skipped, jtu.tree_map(lambda y: y[3::3], steps)) == 0
    dense = jax.vmap(sol.evaluate)(inner)
    assert max_difference(dense, between) < _tight()


@pytest.mark.x64
def test_dense_output_is_as_accurate_as_the_steps():
    term = _term("vp", scale=0.5)
    y0 = prior_state(term.process)
    ts = gd.time_grid(term.process, 200, t1=0.05)
    sol = _go(term, gd.GDDIM(4), ts, y0, saveat=dfx.SaveAt(dense=True))
    t = 0.3 * ts[100] + 0.7 * ts[101]
    rtol = 1e-10 if jax.config.jax_enable_x64 else 1e-6
    assert max_difference(sol.evaluate(t), accurate(term, ts[0], t, y0, rtol)) < 1e-5
    velocity = term.vf(t, sol.evaluate(t), None)
    np.testing.assert_allclose(sol.derivative(t), velocity, rtol=1e-3, atol=1e-3)
    difference = sol.evaluate(t, ts[-1])
    expected = sol.evaluate(ts[-1]) - sol.evaluate(t)
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_no_time_passes_between_equal_times():
    term = _term()
    y0 = prior_state(term.process)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(),
        0.5,
        0.5,
        -0.1,
        y0,
        saveat=dfx.SaveAt(t0=True, t1=True),
        adjoint=forward,
    )
    assert max_difference(sol.ys, jnp.stack([y0, y0])) == 0


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *slow("cld")])
def test_a_resumed_solve_equals_an_unbroken_one(name):
    term = _term(name)
    y0 = prior_state(term.process)
    ts = gd.time_grid(term.process, 20)
    whole = diffrax_solve(term, gd.GDDIM(4), ts, y0)
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    first = _go(term, gd.GDDIM(4), ts[:11], y0, saveat=saveat)
    kwargs = dict(solver_state=first.solver_state, made_jump=first.made_jump)
    second = diffrax_solve(term, gd.GDDIM(4), ts[10:], last(first.ys), **kwargs)
    assert max_difference(second, whole) < _tight()
    without = diffrax_solve(term, gd.GDDIM(4), ts[10:], last(first.ys))
    assert max_difference(without, whole) > 100 * max_difference(second, whole)


@pytest.mark.x64
def test_the_state_of_a_solve_that_ended_elsewhere_is_not_used():
    term = _term()
    y0 = prior_state(term.process)
    ts = gd.time_grid(term.process, 10)
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    first = _go(term, gd.GDDIM(), ts, y0, saveat=saveat)
    for grid in (ts[::-1], ts):
        fresh = diffrax_solve(term, gd.GDDIM(), grid, y0)
        given = diffrax_solve(term, gd.GDDIM(), grid, y0, solver_state=first.solver_state)
        # Other slots of the history, hence another order of sums.
        assert max_difference(fresh, given) < _tight()


# Step sizes


@pytest.mark.x64
def test_history_is_dropped_at_a_jump():
    term = _term("vp", scale=0.5)
    y0 = prior_state(term.process)
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-4, atol=1e-4), jump_ts=jnp.array([0.6])
    )
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(3),
        1.0,
        0.3,
        -0.05,
        y0,
        stepsize_controller=controller,
        saveat=dfx.SaveAt(steps=True, t0=True),
        max_steps=64,
        adjoint=forward,
    )
    assert sol.ts is not None
    taken = sol.ts[np.isfinite(sol.ts)]
    at_jump = int(np.argmin(np.abs(taken - 0.6)))
    y = y0
    for ts in (taken[: at_jump + 1], taken[at_jump:]):
        y = diffrax_solve(term, gd.GDDIM(3), ts, y)
    reached = jtu.tree_map(lambda ys: ys[len(taken) - 1], sol.ys)
    assert max_difference(y, reached) < _tight()


@pytest.mark.x64
def test_a_fixed_grid_reproduces_the_adaptive_solve():
    # Hence rejected steps leave no trace.
    term = _term("cld", scale=0.5)
    y0 = prior_state(term.process)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(3),
        1.0,
        0.1,
        -0.5,
        y0,
        # Longer strides from close nodes would amplify rounding errors in float32.
        stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3, factormax=2.0),
        saveat=dfx.SaveAt(t0=True, steps=True),
        max_steps=256,
        adjoint=forward,
    )
    assert sol.stats["num_rejected_steps"] > 0 and sol.ts is not None
    taken = sol.ts[np.isfinite(sol.ts)]
    reached = jtu.tree_map(lambda ys: ys[len(taken) - 1], sol.ys)
    again = diffrax_solve(term, gd.GDDIM(3), taken, y0)
    assert max_difference(again, reached) < _tight()


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, order",
    [("vp", 1), ("vp", 3), ("vp", 4), ("cld", 4), *slow(("cld", 1), ("cld", 3))],
)
def test_the_error_of_adaptive_steps_follows_the_tolerance(name, order):
    term = _term(name, scale=0.5)
    y0 = prior_state(term.process)
    exact = accurate(term, 1.0, 1e-2, y0)

    @eqx.filter_jit
    def error(tolerance):
        sol = dfx.diffeqsolve(
            term,
            gd.GDDIM(order),
            1.0,
            1e-2,
            None,
            y0,
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=100_000,
            adjoint=forward,
        )
        return last(sol.ys)

    # The error of a step is kept at the tolerance. That of order 1 is of second order in
    # the step size, so that that of the solution goes with the root of the tolerance.
    tolerances = np.array([1e-4, 1e-5, 1e-6])
    errors = [max_difference(error(jnp.asarray(tol)), exact) for tol in tolerances]
    if order == 1:
        slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
        assert slope > 0.4 and errors[-1] < 1e-2, errors
    else:
        assert (np.array(errors) < 10 * tolerances).all(), errors


@pytest.mark.x64
def test_wrapped_in_a_half_solver():
    term = _term("vp", scale=0.5)
    y0 = prior_state(term.process)
    sol = dfx.diffeqsolve(
        term,
        dfx.HalfSolver(gd.GDDIM(2)),
        1.0,
        0.2,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-4),
        adjoint=forward,
    )
    rtol = 1e-9 if jax.config.jax_enable_x64 else 1e-6
    expected = accurate(term, 1.0, 0.2, y0, rtol=rtol)
    assert max_difference(last(sol.ys), expected) < 1e-2


def test_constant_step_size_whose_last_steps_are_uneven():
    term = _term("vp", scale=0.5)
    y0 = prior_state(term.process)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(4),
        1.0,
        0.1,
        -0.007,
        y0,
        saveat=dfx.SaveAt(t1=True),
        adjoint=forward,
    )
    rtol = 1e-9 if jax.config.jax_enable_x64 else 1e-6
    expected = accurate(term, 1.0, 0.1, y0, rtol=rtol)
    assert max_difference(last(sol.ys), expected) < 2e-3


# Evaluations and compilation


def _counted(name="vp"):
    process = processes[name]()
    model = CountedModel(mixture_for(process).model(process))
    return gd.ProbabilityFlow(process, model), model


def test_one_evaluation_a_step():
    term, model = _counted("cld")
    y0 = prior_state(term.process, (4,))
    ts = gd.time_grid(term.process, 9)
    saveat = dfx.SaveAt(t0=True, t1=True, steps=True, dense=True)
    jax.block_until_ready(_go(term, gd.GDDIM(), ts, y0, saveat=saveat))
    jax.effects_barrier()
    assert model.count == 9


def test_one_evaluation_an_attempted_step():
    term, model = _counted()
    y0 = prior_state(term.process)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(),
        1.0,
        0.1,
        -0.3,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
        adjoint=forward,
    )
    jax.block_until_ready(sol)
    jax.effects_barrier()
    assert model.count == sol.stats["num_steps"]


@pytest.mark.parametrize("adaptive", (False, True))
def test_no_evaluation_is_wasted_under_vmap(adaptive):
    term, model = _counted()
    y0 = prior_state(term.process, (3,))
    ts = gd.time_grid(term.process, 6)

    def one(y):
        if not adaptive:
            return _go(term, gd.GDDIM(), ts, y)
        return dfx.diffeqsolve(
            term,
            gd.GDDIM(),
            1.0,
            0.1,
            -0.3,
            y,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
            adjoint=forward,
        )

    sol = jax.vmap(one)(y0)
    jax.block_until_ready(sol)
    jax.effects_barrier()
    assert model.count == int(np.max(sol.stats["num_steps"]))


# In float32 rounding errors decide which steps are rejected.
@pytest.mark.x64
def test_vmap_equals_a_loop_even_when_step_counts_differ():
    term = _term("vp", scale=0.5)
    y0 = jnp.asarray(np.array([[0.1, 0.2, 0.3], [3.0, -8.0, 2.0]]))

    def one(y):
        return dfx.diffeqsolve(
            term,
            gd.GDDIM(),
            1.0,
            0.1,
            -0.3,
            y,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
            saveat=dfx.SaveAt(t1=True, dense=True),
            max_steps=128,
            adjoint=forward,
        )

    batched = jax.vmap(one)(y0)
    counts = batched.stats["num_steps"]
    assert counts[0] != counts[1]
    for i in range(2):
        alone = one(y0[i])
        assert alone.stats["num_steps"] == counts[i]
        np.testing.assert_allclose(batched.ys[i], alone.ys, atol=_tight())


def test_vmap_over_grids():
    term = _term()
    y0 = prior_state(term.process)
    ts = jnp.stack([gd.time_grid(term.process, 8, p) for p in (1.0, 2.0, 5.0)])
    together = jax.vmap(lambda t: diffrax_solve(term, gd.GDDIM(), t, y0))(ts)
    for i in range(3):
        alone = diffrax_solve(term, gd.GDDIM(), ts[i], y0)
        np.testing.assert_allclose(together[i], alone, atol=_tight())


def test_other_times_do_not_recompile():
    term = _term()
    y0 = prior_state(term.process)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(ts, y0):
        return _go(term, gd.GDDIM(), ts, y0).ys

    for power in (1.0, 2.0, 3.0):
        run(gd.time_grid(term.process, 5, power), y0)


def test_what_diffrax_can_know_statically_stays_static():
    term = _term()
    y0 = prior_state(term.process)
    saveat = dfx.SaveAt(t1=True, made_jump=True)
    sol = _go(term, gd.GDDIM(), gd.time_grid(term.process, 3), y0, saveat=saveat)
    assert sol.made_jump is False


@pytest.mark.x64
def test_runs_without_jit():
    term = _term()
    y0 = prior_state(term.process)
    ts = gd.time_grid(term.process, 2)
    compiled = diffrax_solve(term, gd.GDDIM(2), ts, y0)
    with jax.disable_jit():
        plain = diffrax_solve(term, gd.GDDIM(2), ts, y0)
    np.testing.assert_allclose(plain, compiled, atol=_tight())


@pytest.mark.x64
def test_progress_meter_and_events():
    term = _term("vp", scale=0.5)
    y0 = jnp.asarray(np.array([[0.1, 0.2, 0.3], [0.5, -0.5, 0.2]]))

    def crossing(t, y, args, **kwargs):
        # Diffrax hands events its own increasing time, here minus ours.
        return t + 0.5

    def one(y):
        return dfx.diffeqsolve(
            term,
            gd.GDDIM(),
            1.0,
            0.1,
            -0.02,
            y,
            event=dfx.Event(crossing),
            progress_meter=dfx.TextProgressMeter(),
        )

    sol = jax.vmap(one)(y0)
    assert (sol.ts[:, 0] <= 0.5 + 1e-6).all() and (sol.ts[:, 0] > 0.47).all()
    gradient = jax.jit(jax.grad(lambda y: jax.vmap(one)(y).ys.sum()))(y0)
    assert jnp.isfinite(gradient).all()


# Errors


def test_other_terms_are_refused():
    ode = dfx.ODETerm(lambda t, y, args: -y)
    path = dfx.UnsafeBrownianPath((2,), jax.random.key(0))
    sde = dfx.MultiTerm(ode, dfx.ControlTerm(lambda t, y, args: 1.0, path))
    semilinear = gd.Semilinear(-1.0, lambda t, y, args: y)
    for term, match in (
        (ode, r"got ODETerm. .* pass that process: `GDDIM\(process="),
        (semilinear, "got Semilinear. .* use `ExponentialAdams`"),
        (sde, "got MultiTerm. Use another"),
    ):
        with pytest.raises(ValueError, match=match):
            gd.GDDIM().init(term, 1.0, 0.1, jnp.ones(2), None)


def test_a_state_that_does_not_fit_is_refused():
    ts = gd.time_grid(gd.CLD((3,)), 4)
    cld, vp = _term("cld"), _term("vp")
    with pytest.raises(ValueError, match=r"Phase.*\(\*batch, 3\)"):
        diffrax_solve(cld, gd.GDDIM(), ts, jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(\*batch, 3\).*got \(2,\)"):
        diffrax_solve(vp, gd.GDDIM(), ts, jnp.ones(2))
    with pytest.raises(ValueError, match=r"got Phase\(x=\(1, 3\), v=\(2, 3\)\)"):
        phase = gd.Phase(jnp.ones((1, 3)), jnp.ones((2, 3)))
        diffrax_solve(cld, gd.GDDIM(), ts, phase)


def test_a_model_that_returns_something_else_is_refused():
    process = gd.CLD((3,))
    ts, y0 = gd.time_grid(process, 4), prior_state(process)
    term = gd.ProbabilityFlow(process, lambda t, u, args: u.v)
    with pytest.raises(
        ValueError, match="must return the structure and shape of its state"
    ):
        diffrax_solve(term, gd.GDDIM(), ts, y0)
    model = lambda t, u, args: gd.Phase(u.x, u.v[:2])
    with pytest.raises(
        ValueError, match="must return the structure and shape of its state"
    ):
        diffrax_solve(gd.ProbabilityFlow(process, model), gd.GDDIM(), ts, y0)


def test_errors_of_the_model_come_through():
    class Oops(Exception):
        pass

    def model(t, u, args):
        raise Oops

    process = gd.VP((3,))
    term = gd.ProbabilityFlow(process, model)
    with pytest.raises(Oops):
        diffrax_solve(term, gd.GDDIM(), gd.time_grid(process, 3), prior_state(process))


@pytest.mark.parametrize("t0,t1", ((1.2, 0.5), (0.5, -0.1)))
def test_times_outside_are_refused(t0, t1):
    term = _term("vp")
    ts = jnp.linspace(t0, t1, 4)
    with pytest.raises(RuntimeError, match=r"outside \[0, 1.0\]"):
        diffrax_solve(term, gd.GDDIM(), ts, prior_state(term.process))


def test_a_grid_that_is_not_monotone_is_refused():
    term = _term("vp")
    ts = jnp.array([1.0, 0.5, 0.7, 0.1])
    with pytest.raises(RuntimeError, match="strictly increasing"):
        diffrax_solve(term, gd.GDDIM(), ts, prior_state(term.process))
