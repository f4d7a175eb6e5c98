"""Solvers with learned corrections, and how they are learned."""

import functools as ft
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import gddim_eqx as gd

from ..helpers import (
    forward,
    max_difference,
    mixture_for,
    prior_state,
    processes,
    slow,
    solve,
)


_solvers = {
    "default": gd.GDDIM(),
    **{f"order {n}": gd.GDDIM(n) for n in (1, 2, 3)},
    "noise": gd.GDDIM(3, "noise"),
    "time": gd.GDDIM(3, coordinate="time"),
}


def _flow(process, scale=0.3):
    return gd.ProbabilityFlow(process, mixture_for(process, scale=scale).model(process))


def _learned(process, solver=gd.GDDIM(), steps=4, seed=None, size=1.0, **options):
    """With random corrections, for a seed."""
    ts = gd.time_grid(process, steps, **options)
    made = gd.LearnedGDDIM(solver, process, ts)
    if seed is None:
        return made
    where = lambda s: (s.predictor, s.corrector, s.log_rates)
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype)
    weights, more, rates = map(draw, where(made))
    return eqx.tree_at(where, made, (weights, more, 0.3 * rates))


@eqx.filter_jit
def _run(flow, solver, ts, u, args=None):
    return gd.generate(flow, u, solver=solver, ts=ts, args=args)


@pytest.mark.parametrize(
    "name, solver",
    [
        *(("cld", "default"), ("vp", "noise"), ("vp", "order 1")),
        *slow(("bdm", "default"), ("vp", "default"), ("cld", "time"), ("cld", "noise")),
    ],
)
def test_without_corrections_it_is_the_solver_bit_for_bit(name, solver):
    process = processes[name]()
    flow, u = _flow(process), prior_state(process, (3,))
    learned = _learned(process, _solvers[solver])
    expected = _run(flow, _solvers[solver], learned.ts, u)
    np.testing.assert_array_equal(_run(flow, learned, learned.ts, u), expected)


def test_it_encodes_too():
    process = processes["cld"]()
    ts = gd.time_grid(process, 4, t0=process.t_min, t1=process.t_max)
    x = jr.normal(jr.key(0), (3, *process.shape))
    got, expected = (
        gd.invert(_flow(process), x, solver=solver, ts=ts, check=False).latent
        for solver in (gd.LearnedGDDIM(gd.GDDIM(), process, ts), gd.GDDIM())
    )
    assert max_difference(got, expected) == 0


@pytest.mark.parametrize(
    "name, solver",
    [
        ("cld", "default"),
        *slow(*((name, "default") for name in sorted(processes) if name != "cld")),
        *slow(*(("vp", solver) for solver in _solvers)),
    ],
)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([0.1, 1.0]))
def test_data_from_one_point_stay_exact_whatever_was_learned(name, solver, seed, size):
    process = processes[name]()
    x = jnp.asarray(np.random.default_rng(2).normal(size=process.shape), float)
    if process.num_components == 1:
        model = lambda t, u, args: jnp.broadcast_to(x, u.shape)
        flow = gd.ProbabilityFlow(process, model, predicts="data")
    else:
        point = gd.GaussianMixture(x[None], 0.0)
        flow = gd.ProbabilityFlow(process, point.model(process))
    u = prior_state(process, (2,))
    learned = _learned(process, _solvers[solver], seed=seed, size=size)
    expected = _run(flow, gd.GDDIM(1), learned.ts, u)
    tolerance = 1e-12 if jax.config.read("jax_enable_x64") else 1e-5
    # What follows from a noise prediction at the start is rounded; corrections multiply it.
    rounded = process.decode(flow.denoised(learned.ts[0], u, None)) - x[None]
    tolerance += 10 * size * float(jnp.abs(rounded).max())
    assert max_difference(_run(flow, learned, learned.ts, u), expected) < tolerance


@pytest.mark.x64
@pytest.mark.parametrize("name", ["cld", *slow("vp")])
def test_a_step_is_what_its_formula_says(name):
    # The second step of order 2 in data space, from the coefficients of GDDIM.
    process = processes[name]()
    flow, u = _flow(process), prior_state(process, (2,))
    solver = gd.GDDIM(2, corrector=0)
    learned = _learned(process, solver, steps=2)
    change = jnp.array([[0.3, -0.2], [0.1, 0.4]])
    both = jnp.stack([jnp.ones((2, 2)), change])
    learned = eqx.tree_at(lambda s: s.predictor, learned, both)
    got, plain = (_run(flow, s, learned.ts, u) for s in (learned, solver))
    # Half the difference of the corrections, times the moments, times the difference of
    # the data predictions.
    half = (change[0] - change[1]) / 2
    c = solver.splitting.integrate(process, *learned.ts[1:], 2, solver.coordinate)
    moment = gd.BlockLinearOperator(
        half[0] * c.moments[0] + half[1] * c.moments[1], process.shape
    )
    first = flow.denoised(learned.ts[0], u, None)
    # The state after the first step, in which corrections have no effect.
    middle = solve(flow, solver, learned.ts[:2], u)
    second = flow.denoised(learned.ts[1], middle, None)
    shift = moment.mv(jax.tree.map(lambda a, b: a - b, second, first))
    np.testing.assert_allclose(got - plain, process.decode(shift), atol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *slow("cld")])
def test_derivatives_are_those_of_finite_differences(name):
    process = processes[name]()
    flow, u = _flow(process), prior_state(process, (2,))
    start = _learned(process, seed=0, size=0.1)

    @jax.jit
    def total(values):
        solver = gd.LearnedGDDIM(start.solver, process, start.ts, *values)
        return (_run(flow, solver, start.ts, u) ** 2).sum()

    # Smooth only while no time is moved to the end of the time axis.
    shifts = start.shifts - 0.05
    values = start.predictor, start.corrector, start.log_rates, shifts
    directions = [jr.normal(jr.key(i), x.shape) for i, x in enumerate(values)]
    gradient = jax.jit(jax.grad(total))(values)
    for i, direction in enumerate(directions):
        at = lambda h, i=i, d=direction: total(
            tuple(x + h * d if j == i else x for j, x in enumerate(values))
        )
        slope = (gradient[i] * direction).sum()
        np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6)
        assert abs(slope) > 1e-6


def test_jit_vmap_dense_output_and_sample():
    process = processes["vp"]()
    flow, solver = _flow(process), _learned(process, seed=1, size=0.1)
    u = prior_state(process, (4,))

    def solve(u, saveat=dfx.SaveAt(t1=True)):
        return dfx.diffeqsolve(
            flow,
            solver,
            solver.ts[0],
            solver.ts[-1],
            None,
            u,
            stepsize_controller=dfx.StepTo(solver.ts),
            saveat=saveat,
            adjoint=forward,
        )

    whole = solve(u).ys[-1]
    one_by_one = jax.jit(jax.vmap(lambda u: solve(u).ys[-1]))(u)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)
    dense = solve(u, dfx.SaveAt(dense=True))
    np.testing.assert_allclose(dense.evaluate(solver.ts[-1]), whole, atol=1e-6)
    middle = 0.5 * (solver.ts[1] + solver.ts[2])
    assert jnp.isfinite(dense.evaluate(middle)).all()
    # Its times are the default.
    x, evaluations = gd.sample(flow, jr.key(0), 8, solver=solver)
    assert evaluations == 4
    again = gd.sample(flow, jr.key(0), 8, solver=solver, ts=solver.ts).x
    np.testing.assert_array_equal(x, again)
    sharded = gd.sample(flow, jr.key(0), 8, solver=solver, placement=gd.Placement()).x
    np.testing.assert_allclose(sharded, x, atol=1e-5)


def test_it_is_saved_alone_and_with_its_model(tmp_path):
    process = gd.CLD((2,))
    solver = _learned(process, seed=1, size=0.1)
    gd.checkpoints.save(tmp_path / "solver.npz", solver)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "solver.npz"), solver)
    network = gd.nn.TimeMLP(4, width=8, depth=1, key=jr.key(0))
    flow = gd.ProbabilityFlow(process, gd.nn.NetworkModel(process, network))
    gd.checkpoints.save(tmp_path / "both.npz", (flow, solver))
    loaded = gd.checkpoints.load(tmp_path / "both.npz")
    assert eqx.tree_equal(loaded, (flow, solver))


# With a start in closed form


def _normal():
    return gd.NormalData(jnp.linspace(-0.5, 0.5, 2), jnp.array([[1.0, 0.3], [0.3, 0.5]]))


def _of_start(start, process, number):
    ts = start.time_grid(process, number)
    options = dict(data=start.data, num_free=start.num_free, slope=start.slope)
    return gd.LearnedGDDIM(gd.GDDIM(), process, ts, **options)


@pytest.mark.precision
@pytest.mark.parametrize("family", [gd.VP, gd.CLD])
def test_without_corrections_it_is_the_solver_with_a_start(family, tmp_path):
    process = family((2,))
    flow, u = _flow(process), prior_state(process, (3,))
    start = gd.GaussianStart(_normal())
    solver = _of_start(start, process, 3)
    expected = _run(start.flow(flow, 3), gd.GDDIM(), solver.ts, u)
    tolerance = 1e-12 if jax.config.read("jax_enable_x64") else 1e-5
    assert _learned(process).num_evaluations == 4
    got = _run(flow, solver, solver.ts, u)
    assert max_difference(got, expected) < tolerance * float(jnp.abs(expected).max())
    for number in (None, 3):
        assert gd.sample(flow, jr.key(0), 4, number, solver).evaluations == 3
    gd.checkpoints.save(tmp_path / "solver.npz", solver)
    loaded = gd.checkpoints.load(tmp_path / "solver.npz")
    assert eqx.tree_equal(loaded, solver) and loaded.num_evaluations == 3


def test_with_a_start_the_model_is_not_evaluated_before():
    process = gd.VP((2,))
    solver = _of_start(gd.GaussianStart(_normal(), 0.4), process, 3)
    late = lambda t, u, args: jnp.where(t > 0.41, jnp.nan, 0.9 * u)
    flow = gd.ProbabilityFlow(process, late, "data")
    x, evaluations = gd.sample(flow, jr.key(0), 4, solver=solver)
    assert evaluations == 3 and jnp.isfinite(x).all()


class _WithStd(gd.AbstractModel):
    """A model that has the standard deviation of its data."""

    model: Any
    data_std: float

    def normal_data(self, process):
        return gd.NormalData(jnp.zeros(process.shape), self.data_std**2)

    def __call__(self, t, u, args):
        return self.model(t, u, args)


@pytest.mark.x64
@pytest.mark.parametrize("given", [True, False])
def test_a_start_is_learned_too(given):
    process = gd.VP((2,))
    angle = np.pi / 4 * np.arange(8)
    ring = gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    data = gd.NormalData(np.zeros(2), 0.5)
    model = ring.model(process)
    flow = gd.ProbabilityFlow(process, model if given else _WithStd(model, 0.5**0.5))
    start: Any = gd.GaussianStart(data) if given else "auto"
    u = process.prior(jr.key(1), (32,))
    fit = ft.partial(gd.fit_solver, flow, u, 4, num_iterations=40, progress=False)
    fitted, again = (fit(start=start, batch_size=8) for _ in range(2))
    assert eqx.tree_equal(fitted, again)
    assert isinstance(fitted.solver, gd.LearnedGDDIM)
    assert fitted.solver.num_evaluations == 4 and fitted.ts.shape == (11,)
    assert fitted.held_back_error < 0.8 * fitted.held_back_error_before
    initial = gd.GaussianStart(data).time_grid(process, 4)
    assert abs(fitted.ts[6] - initial[6]) > 1e-3
    if given:
        assert fitted.solver.slope != 0.7
    # The first steps are uniform in the default clock, whatever the time of the start is.
    grid = gd.time_grid(process, 400)
    places = np.interp(-fitted.ts[:7], -grid, np.arange(401))
    np.testing.assert_allclose(np.diff(places), places[6] / 6, rtol=5e-3)
    assert gd.sample(flow, jr.key(0), 2, solver=fitted.solver).evaluations == 4


# Learning


@pytest.mark.x64
@pytest.mark.parametrize("name", ["cld", *slow("vp")])
def test_other_samples_are_more_accurate(name):
    process = processes[name]()
    angle = np.pi / 4 * np.arange(8)
    ring = gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    process = type(process)((2,))
    flow = gd.ProbabilityFlow(process, ring.model(process))
    draw = lambda seed, number: process.prior(jr.key(seed), (number,))
    fitted = gd.fit_solver(flow, draw(1, 64), 5, num_iterations=150, progress=False)
    assert isinstance(fitted.solver, gd.LearnedGDDIM) and fitted.ts.shape == (6,)
    assert fitted.ts[0] == process.t_max and fitted.ts[-1] == process.t_min
    assert fitted.error < 0.3 * fitted.error_before
    assert fitted.held_back_error < 0.3 * fitted.held_back_error_before
    u = draw(0, 128)
    exact = _run(flow, gd.GDDIM(), gd.time_grid(process, 300), u)

    def error(solver, ts):
        square = ((_run(flow, solver, ts, u) - exact) ** 2).mean(-1)
        return np.exp(0.5 * np.log(square).mean()), square.mean() ** 0.5

    before = error(gd.GDDIM(), gd.time_grid(process, 5))
    after = error(fitted.solver, fitted.ts)
    assert after[0] < 0.35 * before[0] and after[1] < before[1]


@pytest.mark.float32
def test_pilots_in_parts_with_conditions():
    process = gd.VP((2,))
    means = jnp.array([[-1.0, 0.0], [1.0, 0.5]])

    def model(t, u, args):
        parts = [gd.GaussianMixture(m[None], 0.2).model(process)(t, u, None) for m in means]
        return jnp.where(args[..., None] == 0, *parts)

    flow = gd.ProbabilityFlow(process, model)
    u = process.prior(jr.key(0), (12,))
    labels = jnp.arange(12) % 2
    fit = lambda **options: gd.fit_solver(
        flow, u, 3, num_iterations=4, progress=False, args=labels, **options
    )
    whole, parts = fit(), fit(batch_size=3)
    assert whole.error_before == pytest.approx(parts.error_before, rel=1e-4)
    # The objective of a part has its own root mean square.
    assert parts.error == pytest.approx(whole.error, rel=0.2)
    only = fit(learn=("times",))
    assert isinstance(only.solver, gd.GDDIM)


@ft.cache
def _good():
    process = gd.VP((2,))
    return _flow(process), _learned(process)


_u = np.ones((9, 2), np.float32)
# Arguments are wrong on purpose.
_fit: Any = gd.fit_solver
_make: Any = gd.LearnedGDDIM
_sample: Any = gd.sample
_other = _flow(gd.VE((2,)))


def f_u(solver):
    return jnp.asarray(_u, solver.ts.dtype)


def _reversed(solver):
    return gd.LearnedGDDIM(solver.solver, solver.process, solver.ts[::-1])


@pytest.mark.parametrize(
    "case, message",
    [
        (lambda f, s: _fit(f, _u[:7], 3), r"at least 8 pilots.*\(7,\)"),
        (lambda f, s: _fit(f, np.nan * _u, 3), "`u` are not finite"),
        (
            lambda f, s: _fit(gd.GaussianStart(_normal()).flow(f, 3), _u, 3),
            "Pass the flow without it, and to `fit_solver` its `start`",
        ),
        (
            lambda f, s: gd.generate(
                gd.GaussianStart(_normal()).flow(f, 3), f_u(s), solver=s
            ),
            "A learned solver has its own start, or none",
        ),
        (
            lambda f, s: _fit(f, _u, 3, start=_normal()),
            "a `GaussianStart`, 'auto'",
        ),
        (
            lambda f, s: _fit(f, _u, 4, ts=s.ts, start=gd.GaussianStart(_normal())),
            "Pass `start` or `ts`, not both",
        ),
        (
            lambda f, s: _make(gd.GDDIM(), f.process, s.ts, num_free=1),
            "`num_free` must be .* without `data`",
        ),
        (
            lambda f, s: _make(gd.GDDIM(), f.process, s.ts, data=_normal(), num_free=4),
            "from 1 to 3.*got 4",
        ),
        (
            lambda f, s: _make(gd.GDDIM(), f.process, s.ts, slope=0.5),
            "`slope` is that of a start",
        ),
        (
            lambda f, s: _make(gd.GDDIM(), f.process, s.ts, data=3, num_free=1),
            "`data` must be a `NormalData",
        ),
        (
            lambda f, s: _make(
                gd.GDDIM(),
                f.process,
                s.ts,
                data=gd.NormalData(jnp.zeros(3), 1.0),
                num_free=1,
            ),
            "These data have shape",
        ),
        (lambda f, s: _fit(f, _u[:, :1], 3), "The states `u` must be"),
        (lambda f, s: _fit(f, _u[None], 3), "at least 8 pilots, .number"),
        (lambda f, s: _fit(f, _u, 0), "`num_steps` must be a positive"),
        (lambda f, s: _fit(f, _u, 3, dfx.Heun()), "Of other solvers, only the times"),
        (lambda f, s: _fit(f, _u, 3, learn=("time",)), r"got \('time',\)"),
        (
            lambda f, s: _fit(f, _u, 3, gd.GDDIM(coordinate="time")),
            "'rate' is that of the coordinate 'clock'",
        ),
        (lambda f, s: _fit(f, _u, 3, num_iterations=0), "`num_iterations`"),
        (lambda f, s: _make(gd.SSCS(), f.process, s.ts), "must be a `GDDIM"),
        (
            lambda f, s: _make(gd.GDDIM(reevaluate=True), f.process, s.ts),
            "without `reevaluate`",
        ),
        (
            lambda f, s: _make(s.solver, f.process, s.ts, s.predictor[1:]),
            r"`predictor` must have shape \(4, 4, 2\)",
        ),
        (
            lambda f, s: gd.sample(_flow(gd.VE((2,))), jr.key(0), 2, solver=s),
            "was learned for VP",
        ),
        (lambda f, s: gd.sample(f, jr.key(0), 2, solver=s, lam=1.0), "probability flow"),
        (
            lambda f, s: gd.sample(f, jr.key(0), 2, 5, solver=s),
            "learned for 4 evaluations.*num_steps=5",
        ),
        (
            lambda f, s: gd.generate(f, f_u(s), 5, solver=s),
            "learned for 4 evaluations.*num_steps=5",
        ),
        (lambda f, s: gd.generate(_other, f_u(s), solver=s), "was learned for VP.*got VE"),
        (
            lambda f, s: gd.generate(f, f_u(s), solver=s, ts=s.ts.at[1].multiply(0.99)),
            r"learned for the times \[1.0, .*got `ts` \[1.0, ",
        ),
        (
            lambda f, s: gd.generate(f, f_u(s), solver=s, ts=s.ts[::2]),
            "learned for the times",
        ),
        (
            lambda f, s: gd.generate(f, f_u(s), solver=s, ts=gd.time_grid(f.process, 5)),
            "learned for the times",
        ),
        (lambda f, s: gd.generate(f, f_u(s), 4, solver=s, ts=s.ts), "not both"),
        (lambda f, s: gd.invert(f, _u, 4, ts=s.ts[::-1]), "not both"),
        (lambda f, s: gd.invert(f, _u, solver=s), r"learned from t = 1.0 to .* other dir"),
        (lambda f, s: gd.invert(f, _u, solver=_reversed(s)), "Pass `check=False`"),
        (lambda f, s: gd.generate(f, f_u(s), solver=_reversed(s)), "the other direction"),
        (lambda f, s: _fit(f, _u, 3, s), "has its own times: pass `solver.solver`"),
        (lambda f, s: gd.log_likelihood(f, _u, solver=s), "`LearnedGDDIM` solves for sta"),
        (lambda f, s: gd.log_density(f, _u, solver=gd.SSCS()), "`SSCS` solves for states"),
        (
            lambda f, s: _sample(
                f, jr.key(0), 2, solver=gd.results.FittedSolver(s, s.ts, *[1.0] * 4)
            ),
            "A FittedSolver is no solver: pass `solver=x.solver, ts=x.ts`",
        ),
    ],
)
def test_bad_input_is_refused(case, message, without_type_checks):
    with pytest.raises(ValueError, match=message) as error:
        case(*_good())
    assert len(str(error.value).splitlines()) == 1


def test_its_times_are_used_wherever_a_solver_is_taken():
    flow, solver = _good()
    solver = _learned(flow.process, seed=1, size=0.1)
    u = f_u(solver)
    expected = _run(flow, solver, solver.ts, u)
    run = eqx.filter_jit(lambda u, n, ts: gd.generate(flow, u, n, solver, ts=ts))
    for number, ts in ((None, None), (4, None), (None, solver.ts.astype(jnp.float32))):
        np.testing.assert_allclose(run(u, number, ts), expected, rtol=1e-5, atol=1e-6)
    key = jr.key(0)
    x = [gd.sample(flow, key, 4, number, solver).x for number in (None, 4)]
    np.testing.assert_array_equal(*x)
    # A part of its times, up to an intermediate state.
    part = run(u, None, solver.ts[:3])
    assert part.shape == u.shape and float(jnp.abs(part - expected).max()) > 1e-3


@pytest.mark.x64
def test_other_times_are_refused():
    process = gd.VP((2,))
    solver = _learned(process)
    # With the right beginning, for the first step.
    ts = solver.ts.at[1].multiply(0.99)
    u = jnp.ones((2, 2))
    # Also where the model ignores the time. Traced times are looked at in the solve.
    for model in (_flow(process).model, lambda t, u, args: 0.1 * u):
        with pytest.raises(Exception, match="other times than its own"):
            _run(gd.ProbabilityFlow(process, model), solver, ts, u)


def test_its_times_may_be_rounded():
    process = gd.VP((2,))
    solver = _learned(process)
    x = gd.sample(_flow(process), jr.key(0), 2, solver=solver, dtype=jnp.float16).x
    assert x.dtype == jnp.float16 and jnp.isfinite(x).all()
