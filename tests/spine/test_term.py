import functools as ft
import math
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    every_family,
    forward,
    last,
    max_difference,
    mixture_for,
    processes,
)


pytestmark = pytest.mark.precision


X64 = jnp.result_type(float) == np.float64


def add(a, b, factor=1.0):
    return jtu.tree_map(lambda x, y: x + factor * y, a, b)


def size_of(state):
    return max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(state))


def predictions_by_hand(process, noise, t, u) -> dict[tuple[Any, Any], Any]:
    """What exact models of every kind return, in the basis of states, from the noise
    prediction with respect to R_t."""
    R, L = process.factor(t), process.cholesky(t)
    score = (-R.inverse().T).mv(noise)
    # The mean of the initial state given u, as data.
    start = process.transition(jnp.zeros_like(t), t).mv(add(u, R.mv(noise), -1.0))
    start = jtu.tree_map(lambda x: x / process.data_scale, start)
    kinds = {
        ("noise", "R"): noise,
        ("noise", "cholesky"): (-L.T).mv(score),
        ("score", "R"): score,
        ("score", "cholesky"): score,
        ("data", "R"): start,
        ("data", "cholesky"): start,
    }
    if process.num_components == 1:
        mean = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        kinds["v", "R"] = add(mean.mv(noise), R.mv(start), -1.0)
        kinds["v", "cholesky"] = kinds["v", "R"]
        F, G = process.drift(t), process.diffusion(t)
        flow = add(F.mv(u), (G @ G.T).mv(score), -0.5) / process.flow_speed(t)
        kinds |= {("flow", "R"): flow, ("flow", "cholesky"): flow}
    return kinds


@ft.cache
def _evaluated(name):
    process = processes[name]()
    exact = mixture_for(process).model(process)

    def fn(t, u):
        noise = process.from_data(exact(t, process.to_data(u), None))
        kinds = predictions_by_hand(process, noise, t, u)
        F, G = process.drift(t), process.diffusion(t)
        pull = (G @ G.T).mv(kinds["score", "R"])
        expected = noise, add(F.mv(u), pull, -0.5)
        results = {}
        for (predicts, frame), prediction in kinds.items():
            output = process.to_data(prediction)
            model = lambda t, u, args: output
            term = gd.ProbabilityFlow(process, model, predicts, frame)
            results[predicts, frame] = term.noise(t, u, None), term.vf(t, u, None)
        return expected, results, kinds["data", "R"]

    return jax.jit(fn)


@pytest.mark.x64
@every_family
def test_every_kind_of_prediction_gives_the_same_probability_flow(name):
    process = processes[name]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *process.shape)))
    perturb = jax.jit(process.perturb)
    # The state minus the mean has few digits in float32 near t_min.
    for fraction in (0.0 if X64 else 0.2, 0.6, 1.0):
        t = process.t_min + fraction * (process.t_max - process.t_min)
        u, _ = perturb(jr.key(0), x, jnp.asarray(t))
        expected, results, _ = _evaluated(name)(jnp.asarray(t), u)
        assert len(results) == (10 if process.num_components == 1 else 6)
        for kind, result in results.items():
            for got, want in zip(result, expected):
                error = max_difference(got, want) / size_of(want)
                assert error <= (1e-9 if X64 else 1e-3), kind


def test_predicted_data_of_a_process_with_velocity_rest():
    process = gd.CLD((3,))
    _, _, data = _evaluated("cld")(jnp.array(0.4), process.prior(jr.key(0), (4,)))
    assert isinstance(data, gd.Phase)
    assert np.abs(data.v).max() <= (1e-11 if X64 else 1e-3)
    assert np.abs(data.x).max() > 0.1


def test_vf_does_not_depend_on_the_frame_of_the_noise():
    """A model in its own words: the score of data from one point, on VP."""
    process, point = gd.VP((2,)), jnp.array([1.0, -2.0])
    t, u = jnp.array(0.5), jnp.array([0.3, 0.4])
    alpha = math.exp(-(0.1 * 0.5 + 9.95 * 0.25))
    score = -(u - alpha**0.5 * point) / (1 - alpha)
    beta = 0.1 + 19.9 * 0.5
    term = gd.ProbabilityFlow(process, lambda t, u, args: score, "score")
    expected = -0.5 * beta * (u + score)
    np.testing.assert_allclose(term.vf(t, u, None), expected, rtol=1e-5)


# What the model sees, and what Diffrax sees.


@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_model_is_called_in_data_coordinates_with_time_and_args(name):
    process, calls = processes[name](), []

    def model(t, u, args):
        calls.append((t, u, args))
        return u

    u = process.prior(jr.key(0), (2,))
    gd.ProbabilityFlow(process, model).vf(0.5, u, "arguments")
    ((t, seen, args),) = calls
    assert t.shape == () and t.dtype == jnp.result_type(float)
    assert float(t) == 0.5 and args == "arguments"
    assert max_difference(seen, process.to_data(u)) == 0


def test_product_with_the_control():
    process = gd.CLD((3,))
    term = gd.ProbabilityFlow(process, lambda t, u, args: u)
    u, t0, t1 = process.prior(jr.key(0), (2,)), jnp.array(0.5), jnp.array(0.4)
    control, vf = term.contr(t0, t1), term.vf(t0, u, None)
    assert control == t1 - t0
    product = term.prod(vf, control)
    assert max_difference(product, term.vf_prod(t0, u, None, control)) == 0
    assert max_difference(product, jtu.tree_map(lambda v: control * v, vf)) == 0


@every_family
def test_vf_has_the_structure_and_shape_of_the_state(name):
    process = processes[name]()
    term = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    for batch in [(0,), (2, 0), (2, 3)]:
        u = jax.eval_shape(lambda: process.prior(jr.key(0), batch))
        assert jax.eval_shape(term.vf, jnp.array(0.5), u, None) == u


def test_only_the_model_has_parameters():
    class Shift(eqx.Module):
        shift: jax.Array

        def __call__(self, t, u, args):
            return u + self.shift

    process = gd.VP((3,))
    term = gd.ProbabilityFlow(process, Shift(jnp.array(1.0)))
    assert len(jtu.tree_leaves(eqx.filter(term, eqx.is_array))) == 1
    u = process.prior(jr.key(0))
    gradient = eqx.filter_grad(lambda term: term.vf(0.5, u, None).sum())(term)
    assert gradient.process == process
    rate = process.diffusion(0.5).blocks ** 2 / process.factor(0.5).blocks
    np.testing.assert_allclose(gradient.model.shift, 1.5 * rate[0, 0], rtol=1e-5)


# Data from one point, whose flow is known: u_t = Psi(t, 0) encode(x) + R_t noise.


def one_point(process, batch=(2,)):
    """The term, a start, and the exact flow."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    model = gd.GaussianMixture(x[None]).model(process)
    noise = jtu.tree_map(
        lambda y: jr.normal(jr.key(1), (*batch, *y.shape), y.dtype), process.encode(x)
    )

    def flow(t):
        mean = process.transition(t, jnp.zeros_like(t)).mv(process.encode(x))
        spread = process.factor(t).mv(noise)
        return jtu.tree_map(lambda a, b: jnp.broadcast_to(a, b.shape) + b, mean, spread)

    return gd.ProbabilityFlow(process, model), flow, noise


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_noise_prediction_is_constant_along_the_flow_of_one_point(name):
    process = processes[name]()
    term, flow, noise = one_point(process)
    end = process.t_min if X64 else 0.05 * process.t_max
    ts = jnp.linspace(process.t_max**0.5, end**0.5, 6) ** 2
    tolerance = 1e-8 if X64 else 1e-6

    @jax.jit
    def along(ts):
        states = dfx.diffeqsolve(
            term,
            dfx.Dopri8(),
            ts[0],
            ts[-1],
            None,
            flow(ts[0]),
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=forward,
        ).ys
        return jax.vmap(lambda t, u: term.noise(t, u, None))(ts, states)

    predicted = along(ts)
    error = jtu.tree_map(lambda p, e: jnp.abs(p - e[None]).max(), predicted, noise)
    assert max(jtu.tree_leaves(error)) <= (1e-4 if X64 else 1e-2)


@pytest.mark.x64
@pytest.mark.parametrize(
    "solver, dt0, controller, tolerance",
    [
        (dfx.Euler(), -1e-3, dfx.ConstantStepSize(), 6e-2),
        (dfx.Heun(), -1e-3, dfx.ConstantStepSize(), 1e-4),
        (dfx.Tsit5(), None, dfx.PIDController(rtol=1e-6, atol=1e-6), 1e-5),
        (dfx.Kvaerno3(), None, dfx.PIDController(rtol=1e-4, atol=1e-4), 2e-3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_solvers_of_diffrax_follow_the_flow(solver, dt0, controller, tolerance):
    process = gd.CLD((3,))
    term, flow, _ = one_point(process)
    t0, t1 = jnp.array(1.0), jnp.array(0.3)

    @jax.jit
    def solved_and_exact(t0, t1):
        sol = dfx.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            dt0,
            flow(t0),
            stepsize_controller=controller,
            adjoint=forward,
        )
        return last(sol.ys), flow(t1)

    assert max_difference(*solved_and_exact(t0, t1)) <= tolerance


def test_backsolve_adjoint_gives_the_gradient_of_the_flow():
    """On VP, with the noise shifted by a constant: the solution is
    mean + (R_t / R_s) (u - mean) + R_t / 2 (log(e^B_t - 1) - log(e^B_s - 1)) shift."""
    process = gd.VP((3,))
    term, flow, _ = one_point(process)
    exact = term.model
    term = gd.ProbabilityFlow(process, lambda t, u, args: exact(t, u, None) + args)
    t0, t1 = jnp.array(0.9), jnp.array(0.2)

    @jax.jit
    @ft.partial(jax.grad, argnums=(0, 1))
    def gradients(u, shift):
        sol = dfx.diffeqsolve(
            term,
            dfx.Tsit5(),
            t0,
            t1,
            None,
            u,
            args=shift,
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8)
            if X64
            else dfx.PIDController(rtol=1e-5, atol=1e-5),
            adjoint=dfx.BacksolveAdjoint(),
        )
        return last(sol.ys).sum()

    u = flow(t0)
    to_state, to_shift = gradients(u, jnp.array(0.3))
    deviation = lambda t: float(process.factor(t).blocks[0, 0])
    clock = lambda t: 0.5 * math.log(math.expm1(0.1 * t + 9.95 * t**2))
    tolerance = 1e-6 if X64 else 1e-3
    np.testing.assert_allclose(
        to_state, np.full(u.shape, deviation(t1) / deviation(t0)), rtol=tolerance
    )
    expected = u.size * deviation(t1) * (clock(float(t1)) - clock(float(t0)))
    np.testing.assert_allclose(to_shift, expected, rtol=tolerance)


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, jnp.float16) for name in ("vp", "ve", "cld")), ("cld", jnp.bfloat16)],
)
def test_vf_in_half_precision_is_right_up_to_its_rounding(name, dtype):
    process, rng = processes[name](), np.random.default_rng(0)
    structure = jax.eval_shape(lambda: process.prior(jr.key(0), (2,)))
    draw = lambda y: jnp.asarray(rng.normal(size=y.shape), jnp.float32).astype(dtype)
    u, noise = (jtu.tree_map(draw, structure) for _ in range(2))
    cast = lambda state, like: jtu.tree_map(lambda a, b: a.astype(b.dtype), state, like)
    term = gd.ProbabilityFlow(process, lambda t, u, args: cast(noise, u))

    @jax.jit
    def evaluate(t):
        single = jtu.tree_map(lambda y: y.astype(jnp.float32), u)
        half, exact = term.vf(t, u, None), term.vf(t, single, None)
        assert all(y.dtype == dtype for y in jtu.tree_leaves(half))
        # The largest sum of absolute values that is added up.
        F, G, R = (f(t) for f in (process.drift, process.diffusion, process.factor))
        size = [jnp.abs(b.blocks).max() for b in (F, G @ G.T, R.inverse())]
        return cast(half, exact), exact, 8 * (size[0] + size[1] * size[2] / 2)

    for t in np.array([process.t_min, 0.3, process.t_max], np.float32):
        half, exact, size = evaluate(jnp.asarray(t))
        assert max_difference(half, exact) <= 4 * float(jnp.finfo(dtype).eps) * size


# Errors.


def flow_of(process, model=lambda t, u, args: u, **kwargs):
    return gd.ProbabilityFlow(process, model, **kwargs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(process="vp"), "`process` must be a forward process.*'vp'"),
        (dict(process=gd.VP((3,)), model=3), "`model` must be callable.*3"),
        (dict(process=gd.VP((3,)), predicts="eps"), "`predicts`.*'eps'"),
        (dict(process=gd.VP((3,)), frame="L"), "`frame`.*'L'"),
        (dict(process=gd.CLD((3,)), predicts="v"), "'v'.*not defined for CLD"),
        (dict(process=gd.CLD((3,)), predicts="flow"), "'flow'.*not defined for CLD"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_raise_and_are_named(arguments, message, monkeypatch):
    # Without the run-time type checks that only this test-suite has.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        flow_of(**arguments)


@pytest.mark.parametrize(
    "name, state, message",
    [
        ("vp", jnp.ones((2, 5)), r"\(\*batch, 3\).*\(2, 5\)"),
        ("vp", gd.Phase(jnp.ones(3), jnp.ones(3)), "an array.*Phase"),
        ("cld", jnp.ones(3), r"a `Phase\(x, v\)`"),
        ("cld", (jnp.ones(3), jnp.ones(3)), r"a `Phase\(x, v\)`"),
        ("cld", gd.Phase(jnp.ones(3), jnp.ones((2, 3))), r"x=\(3,\), v=\(2, 3\)"),
        ("bdm", jnp.ones((6, 4, 2)), r"\(\*batch, 4, 6, 2\).*\(6, 4, 2\)"),
    ],
)
def test_state_that_does_not_fit_the_process_raises(name, state, message):
    for method in ("vf", "noise", "score"):
        with pytest.raises(ValueError, match="The state must be .*" + message):
            getattr(flow_of(processes[name]()), method)(0.5, state, None)


@pytest.mark.parametrize(
    "name, model, message",
    [
        ("vp", lambda t, u, args: (u,), "shape"),
        ("vp", lambda t, u, args: u[:1], r"shape.*\(2, 3\).*returned \(1, 3\)"),
        ("vp", lambda t, u, args: u.sum(), r"shape.*\(2, 3\).*returned \(\)"),
        ("cld", lambda t, u, args: u.v, "shape"),
        ("cld", lambda t, u, args: tuple(u), "shape"),
        ("cld", lambda t, u, args: gd.Phase(u.x[0], u.v), "shape"),
    ],
)
def test_model_that_returns_something_else_raises(name, model, message):
    process = processes[name]()
    term = gd.ProbabilityFlow(process, model)
    with pytest.raises(
        ValueError, match="The model must return the structure and " + message
    ):
        term.vf(0.5, process.prior(jr.key(0), (2,)), None)


def test_v_and_flow_are_for_every_process_of_one_component():
    process = gd.VP((3,))
    solved = gd.LinearSDE((3,), process.drift, process.diffusion)
    model = lambda t, u, args: 0.3 * u + t
    u, t = process.prior(jax.random.key(0), (4,)), jnp.asarray(0.4)
    for predicts in ("v", "flow"):
        terms = [gd.ProbabilityFlow(p, model, predicts) for p in (solved, process)]
        for method in ("noise", "score", "denoised"):
            got, expected = (getattr(term, method)(t, u, None) for term in terms)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        back = terms[0].prediction(t, u, terms[0].noise(t, u, None))
        np.testing.assert_allclose(back, model(t, u, None), rtol=1e-4, atol=1e-4)
