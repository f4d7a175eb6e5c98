"""`ExponentialAdams` against closed forms and the solvers of Diffrax."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.linalg

import gddim_eqx as gd
from gddim_eqx.solvers import AdamsBashforth, SemilinearSplitting

from ..helpers import accurate, every_kind_of_saving, forward, max_difference, solve


pytestmark = pytest.mark.x64

_matrix = np.array([[-1.0, 3.0], [-2.0, 0.5]])


def _blocks(scale=1.0):
    return gd.BlockLinearOperator(jnp.asarray(_matrix) * scale, (3,))


def _coupled(t, u, args):
    return gd.Phase(jnp.sin(u.v) + t, jnp.cos(u.x) * u.v)


_phase = gd.Phase(jnp.array([1.0, 0.5, -0.2]), jnp.array([0.3, 0.0, 1.0]))
_array = jnp.array([[1.0, 0.5, -0.2], [0.3, 2.0, 0.0]])
_equations = {
    "scalar": (-2.0, lambda t, u, args: jnp.sin(u + t), _array),
    "diagonal": (
        jnp.array([-5.0, 1.0, 0.0]),
        lambda t, u, args: jnp.cos(u + jnp.roll(u, 1, -1)),
        _array,
    ),
    "diagonal in time": (
        lambda t: jnp.array([-3.0, 1.0, 0.0], t.dtype) * (1 + t),
        lambda t, u, args: jnp.cos(u + jnp.roll(u, 1, -1)),
        _array,
    ),
    "scalar on a phase": (-2.0, _coupled, _phase),
    "blocks": (_blocks(), _coupled, _phase),
    "blocks in time": (lambda t: _blocks(jnp.cos(t)), _coupled, _phase),
}


def _solve(term, solver, y0, t0=0.0, t1=1.0, number=10, **kwargs):
    ts = jnp.linspace(t0, t1, number + 1)
    options = dict(stepsize_controller=dfx.StepTo(ts), max_steps=number, adjoint=forward)
    kwargs = options | kwargs
    y1 = dfx.diffeqsolve(term, solver, t0, t1, None, y0, **kwargs).ys
    return jtu.tree_map(lambda y: y[-1], y1)


@pytest.mark.parametrize("name", _equations)
def test_orders(name):
    linear, nonlinear, y0 = _equations[name]
    term = gd.Semilinear(linear, nonlinear)
    # Forward in time; and backward, as the same grid is compiled once.
    for t0, t1 in ((0.0, 1.0), (1.0, 0.4)) if name == "blocks" else ((0.0, 1.0),):
        exact = accurate(term, t0, t1, y0)
        for order in (1, 2, 3, 4) if name == "blocks" else (4,):
            solver = gd.ExponentialAdams(order)
            errors = [
                max_difference(solve(term, solver, np.linspace(t0, t1, n + 1), y0), exact)
                for n in (80, 160)
            ]
            observed = np.log2(errors[0] / errors[1])
            assert abs(observed - order) < 0.6, (order, errors)


def test_a_stiff_equation():
    term = gd.Semilinear(-50.0, lambda t, u, args: 50 * jnp.cos(t) + 0.5 * jnp.sin(u))
    y0 = jnp.asarray(0.0)
    exact = dfx.diffeqsolve(
        term,
        dfx.Kvaerno5(),
        0.0,
        1.0,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-12, atol=1e-12),
        adjoint=forward,
    ).ys[0]
    # The formula's own errors, to which the first step adds nothing.
    for number, most in ((5, 4.4e-3), (20, 6e-5), (80, 7e-7)):
        found = _solve(term, gd.ExponentialAdams(3), y0, number=number)
        assert max_difference(found, exact) < most


@pytest.mark.parametrize("order", (1, 2, 3, 4))
@pytest.mark.parametrize("scale", (1.0, -1e5))
def test_one_step_is_exact_for_a_constant_force(order, scale):
    eigenvalues = scale * jnp.array([1.0, 1e-9, 3.0])
    term = gd.Semilinear(eigenvalues, lambda t, u, args: args)
    force, y0 = jnp.array([2.0, -1.0, 0.5]), jnp.array([0.1, 0.2, 0.3])
    found = _solve(term, gd.ExponentialAdams(order), y0, number=1, args=force)
    exact = jnp.exp(eigenvalues) * y0 + jnp.expm1(eigenvalues) / eigenvalues * force
    np.testing.assert_allclose(found, exact, rtol=1e-12)


def _phi(number, z):
    """The functions phi_1, ..., from the exponential of a matrix (Sidje 1998)."""
    n = len(z)
    matrix = np.eye(n * (number + 1), k=n)
    matrix[:n, :n] = z
    top = scipy.linalg.expm(matrix)[:n]
    return [top[:, n * k : n * (k + 1)] for k in range(1, number + 1)]


def test_moments_are_the_phi_functions():
    integrate = lambda linear, y: SemilinearSplitting().integrate(
        gd.Semilinear(linear, lambda t, u, args: u).linear_part(y),
        jnp.asarray(0.2),
        jnp.asarray(0.7),
        4,
        number_for_error=4,
    )
    constant = integrate(_blocks(2.0), _phase)
    collocated = integrate(lambda t: _blocks(2.0), _phase)
    factorials = np.array([1, 1, 2, 6]).reshape(4, 1, 1)
    exact = 0.5 * factorials * np.stack(_phi(4, _matrix))
    for c in (constant, collocated):
        np.testing.assert_allclose(c.linear, scipy.linalg.expm(_matrix), rtol=1e-13)
        np.testing.assert_allclose(c.moments, exact, rtol=1e-12)
    # Both sides of where the formula for a diagonal changes, and far from it.
    for z in (0.0, 1e-8, -3.99, -4.01, 3.99, 4.01, -700.0, -1e6):
        c = integrate(z / 0.5, jnp.ones(()))
        exact = [0.5 * f * p[0, 0] for f, p in zip((1, 1, 2, 6), _phi(4, np.array([[z]])))]
        if abs(z) > 100:
            # Integrated by parts, without the exponential.
            exact = [0.5 / -z]
            for k in (1, 2, 3):
                exact.append((0.5 - k * exact[-1]) / -z)
        np.testing.assert_allclose(c.moments[:, 0, 0], exact, rtol=1e-12)


@pytest.mark.parametrize("decay", (1e2, 1e4, 1e8))
def test_collocation_is_stable_for_any_decay(decay):
    y, times = jnp.ones(()), (jnp.asarray(0.0), jnp.asarray(1.0))
    integrate = lambda linear: SemilinearSplitting().integrate(
        gd.Semilinear(linear, lambda t, u, args: u).linear_part(y), *times, 4
    )
    in_time, constant = integrate(lambda t: -decay), integrate(-decay)
    assert abs(float(in_time.linear[0, 0])) < 16 / decay
    np.testing.assert_allclose(in_time.moments, constant.moments, rtol=2e-3)


@pytest.mark.parametrize("order", (1, 2, 3, 4))
def test_adaptive_steps(order):
    linear, nonlinear, y0 = _equations["blocks"]
    term = gd.Semilinear(linear, nonlinear)
    exact = accurate(term, 0.0, 3.0, y0)
    errors = []
    for tolerance in (1e-3, 1e-6):
        sol = dfx.diffeqsolve(
            term,
            gd.ExponentialAdams(order),
            0.0,
            3.0,
            None,
            y0,
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=20_000,
            adjoint=forward,
        )
        errors.append(max_difference(jtu.tree_map(lambda y: y[0], sol.ys), exact))
    assert errors[0] < 0.2 and errors[1] < errors[0] / 20, errors


def test_a_first_step_that_is_too_long_is_forgotten():
    term = gd.Semilinear(-1.0, lambda t, u, args: 30 * jnp.sin(20 * u))
    solver, y0 = gd.ExponentialAdams(4), jnp.asarray(0.3)
    state = solver.init(term, 0.0, 1.0, y0, None)
    assert not state.stored.any()
    assert solver.init(term, 0.0, 1e-6, y0, None).stored.all()
    found = dfx.diffeqsolve(
        term,
        solver,
        0.0,
        0.1,
        0.1,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-8),
        adjoint=forward,
    ).ys[0]
    assert abs(float(found - accurate(term, 0.0, 0.1, y0))) < 1e-5


def test_dense_output():
    linear, nonlinear, y0 = _equations["blocks"]
    term = gd.Semilinear(linear, nonlinear)
    sol = dfx.diffeqsolve(
        term,
        gd.ExponentialAdams(),
        0.0,
        1.0,
        0.02,
        y0,
        saveat=dfx.SaveAt(dense=True),
        adjoint=forward,
    )
    for t in (0.0, 0.01, 0.333, 1.0):
        exact = accurate(term, 0.0, t, y0) if t else y0
        assert max_difference(sol.evaluate(t), exact) < 1e-4


@pytest.mark.parametrize(
    "adjoint",
    [dfx.RecursiveCheckpointAdjoint(), dfx.ForwardMode(), dfx.DirectAdjoint()],
    ids=lambda x: type(x).__name__,
)
def test_gradients(adjoint):
    def end(scale, solver, number):
        term = gd.Semilinear(
            jnp.array([-3.0, 1.0]), lambda t, u, args: args * jnp.sin(u + t)
        )
        y0 = jnp.array([1.0, 0.5])
        y1 = _solve(term, solver, y0, number=number, args=scale, adjoint=adjoint)
        return y1.sum()

    derivative = jax.jacfwd if isinstance(adjoint, dfx.ForwardMode) else jax.grad
    found = derivative(lambda x: end(x, gd.ExponentialAdams(), 20))(1.5)
    step = 1e-5
    exact = [
        end(1.5 + sign * step, gd.ExponentialAdams(), 20) / (2 * step) for sign in (1, -1)
    ]
    np.testing.assert_allclose(found, exact[0] - exact[1], rtol=1e-8)


def test_gradients_with_respect_to_the_operator():
    @jax.jit
    def end(linear):
        term = gd.Semilinear(linear, lambda t, u, args: jnp.sin(u + t))
        y0, adjoint = jnp.array([1.0, 0.5]), dfx.RecursiveCheckpointAdjoint()
        return _solve(term, gd.ExponentialAdams(), y0, adjoint=adjoint).sum()

    linear = jnp.array([-3.0, 0.0])
    found = jax.grad(end)(linear)
    for i, step in enumerate(np.eye(2) * 1e-5):
        difference = (end(linear + step) - end(linear - step)) / 2e-5
        np.testing.assert_allclose(found[i], difference, rtol=1e-7)


# What Diffrax asks of a solver, as in test_contract.py


def _term(name="diagonal"):
    linear, nonlinear, y0 = _equations[name]
    return gd.Semilinear(linear, nonlinear), y0


def test_saved_states_of_all_kinds_agree():
    term, y0 = _term("blocks")
    ts = jnp.linspace(0, 1, 9)
    inner = 0.5 * (ts[1:] + ts[:-1])
    saveat = every_kind_of_saving(ts, inner)
    sol = dfx.diffeqsolve(
        term,
        gd.ExponentialAdams(3),
        0.0,
        1.0,
        None,
        y0,
        stepsize_controller=dfx.StepTo(ts),
        saveat=saveat,
        max_steps=8,
        adjoint=forward,
    )
    assert sol.ys is not None
    steps, at_ts, between, final, skipped = sol.ys
    assert max_difference(steps, at_ts) < 1e-10
    assert max_difference(jtu.tree_map(lambda y: y[0], steps), y0) == 0
    np.testing.assert_allclose(final[0], steps.x[-1])
    assert max_difference(skipped, jtu.tree_map(lambda y: y[3::3], steps)) == 0
    assert max_difference(jax.vmap(sol.evaluate)(inner), between) < 1e-10


def test_a_resumed_solve_equals_an_unbroken_one():
    term, y0 = _term()
    ts = jnp.linspace(0, 2, 21)

    def go(ts, y0, **kwargs):
        controller = dfx.StepTo(ts)
        return dfx.diffeqsolve(
            term,
            gd.ExponentialAdams(),
            ts[0],
            ts[-1],
            None,
            y0,
            stepsize_controller=controller,
            **kwargs,
        )

    whole = go(ts, y0).ys[-1]
    first = go(ts[:11], y0, saveat=dfx.SaveAt(t1=True, solver_state=True))
    state = dict(solver_state=first.solver_state, made_jump=first.made_jump)
    second = go(ts[10:], first.ys[-1], **state).ys[-1]
    assert max_difference(second, whole) < 1e-13
    assert max_difference(go(ts[10:], first.ys[-1]).ys[-1], whole) > 1e-10
    # And back in time, where errors grow by a factor of 150.
    assert max_difference(go(ts[10::-1], first.ys[-1]).ys[-1], y0) < 0.05


def test_vmap_equals_a_loop_with_events_and_a_progress_meter(capfd):
    term, y0 = _term()
    y0 = y0 * jnp.array([[1.0], [20.0]])

    def crossing(t, y, args, **kwargs):
        return y[1] - 1.5 * jnp.abs(y0[0, 1])

    def one(y):
        return dfx.diffeqsolve(
            term,
            gd.ExponentialAdams(3),
            0.0,
            1.0,
            0.2,
            y,
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
            event=dfx.Event(crossing),
            progress_meter=dfx.TextProgressMeter(),
        )

    batched = jax.vmap(one)(y0)
    for i in range(2):
        alone = one(y0[i])
        assert alone.stats["num_steps"] == batched.stats["num_steps"][i]
        np.testing.assert_allclose(batched.ys[i], alone.ys, atol=1e-12)
    assert 0 < batched.ts[0, 0] < 1
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().out


def test_jumps_uneven_steps_and_no_steps():
    term, y0 = _term()
    linear = np.array([-5.0, 1.0, 0.0])
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-8, atol=1e-8), jump_ts=jnp.array([0.6])
    )
    jumping = gd.Semilinear(
        jnp.asarray(linear),
        lambda t, u, args: jnp.where(t < 0.6, 1.0, -1.0) * jnp.ones_like(u),
    )
    run = lambda term, t1, dt0, **kwargs: dfx.diffeqsolve(
        term, gd.ExponentialAdams(), 0.0, t1, dt0, y0, **kwargs
    )
    found = run(jumping, 1.0, 0.1, stepsize_controller=controller).ys[-1]
    decay, later = np.exp(linear), np.exp(0.4 * linear)
    force = np.where(linear == 0, 0.2, (decay - 2 * later + 1) / (linear + (linear == 0)))
    np.testing.assert_allclose(found, decay * np.asarray(y0) + force, atol=1e-10)
    uneven = run(term, 1.0, 0.007).ys[-1]
    assert max_difference(uneven, accurate(term, 0.0, 1.0, y0)) < 1e-6
    saveat = dfx.SaveAt(t0=True, t1=True)
    assert max_difference(run(term, 0.0, 0.1, saveat=saveat).ys, jnp.stack([y0, y0])) == 0


@pytest.mark.slow
def test_runs_without_jit():
    term, y0 = _term()
    compiled = _solve(term, gd.ExponentialAdams(2), y0, number=2)
    with jax.disable_jit():
        plain = _solve(term, gd.ExponentialAdams(2), y0, number=2)
    np.testing.assert_allclose(plain, compiled, atol=1e-12)


def test_vmap_and_batches_agree():
    linear, nonlinear, y0 = _equations["diagonal"]
    run = lambda y: _solve(gd.Semilinear(linear, nonlinear), gd.ExponentialAdams(), y)
    assert max_difference(jax.vmap(run)(y0), run(y0)) < 1e-13


def test_single_precision_and_empty_batches():
    linear, nonlinear, y0 = _equations["blocks"]
    term = gd.Semilinear(linear, nonlinear)
    exact = _solve(term, gd.ExponentialAdams(), y0)
    narrow = jtu.tree_map(lambda x: x.astype(jnp.float32), y0)
    ts = jnp.linspace(0, 1, 11, dtype=jnp.float32)
    found = _solve(
        term, gd.ExponentialAdams(), narrow, ts[0], stepsize_controller=dfx.StepTo(ts)
    )
    assert found.x.dtype == jnp.float32
    wide = jtu.tree_map(lambda x: x.astype(jnp.float64), found)
    assert max_difference(wide, exact) < 1e-5
    empty = jtu.tree_map(lambda x: jnp.zeros((0, 3)), y0)
    assert _solve(term, gd.ExponentialAdams(), empty).x.shape == (0, 3)


def test_in_a_basis():
    # The heat equation with a source, whose solution is known for every wave number.
    n = 16
    x = 2 * np.pi * np.arange(n) / n
    basis = gd.FourierBasis()
    source = jnp.asarray(np.cos(2 * x))
    term = gd.Semilinear(
        -(basis.frequencies(n) ** 2.0), lambda t, u, args: source, basis=basis
    )
    y0 = basis.forward(jnp.asarray(np.sin(3 * x)))
    found = basis.inverse(_solve(term, gd.ExponentialAdams(2), y0, number=1))
    exact = np.exp(-9) * np.sin(3 * x) + (1 - np.exp(-4)) / 4 * np.cos(2 * x)
    np.testing.assert_allclose(found, exact, atol=1e-14)


@pytest.mark.parametrize("size", (1, 2, 3, 8, 9))
@pytest.mark.parametrize("axes", ((-1,), (-2,), (-3, -2)))
def test_the_fourier_basis_is_orthonormal(size, axes):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3))
    basis = gd.FourierBasis(axes)
    coefficients = basis.forward(jnp.asarray(x))
    np.testing.assert_allclose(basis.inverse(coefficients), x, atol=1e-13)
    np.testing.assert_allclose((coefficients**2).sum(), (x**2).sum())


def test_the_derivatives_of_fourier_coefficients():
    for n in (8, 9):
        x, basis = 2 * np.pi * np.arange(n) / n, gd.FourierBasis()
        k = basis.frequencies(n)
        f = basis.forward(jnp.asarray(np.sin(3 * x) + np.cos(2 * x) + 1))
        second = basis.inverse(-(k**2.0) * f)
        exact = -9 * np.sin(3 * x) - 4 * np.cos(2 * x)
        np.testing.assert_allclose(second, exact, atol=1e-13)


def test_bad_input(without_type_checks):
    nonlinear = lambda t, u, args: u
    for linear, match in (("a", "`linear` must be real"), (1j, "must be real")):
        with pytest.raises(ValueError, match=match):
            gd.Semilinear(linear, nonlinear)
    with pytest.raises(ValueError, match="`nonlinear` must be callable"):
        gd.Semilinear(1.0, 2.0)
    with pytest.raises(ValueError, match="`basis` must be"):
        gd.Semilinear(1.0, nonlinear, basis="fourier")
    with pytest.raises(ValueError, match="`axes` must be negative"):
        gd.FourierBasis((0,))
    for order in (0, 5, 2.5, True):
        with pytest.raises(ValueError, match="`order` must be 1, 2, 3 or 4"):
            gd.ExponentialAdams(order)
    term = gd.Semilinear(jnp.ones(3), nonlinear)
    with pytest.raises(ValueError, match=r"The state `y0` must be .*\(\*batch, 3\)"):
        gd.ExponentialAdams().init(term, 0.0, 1.0, jnp.ones(2), None)
    term = gd.Semilinear(jnp.ones(3), lambda t, u, args: u[:1])
    with pytest.raises(ValueError, match=r"shape of its state, \(3,\); .* \(1,\)"):
        term.vf(0.0, jnp.ones(3), None)
    term = gd.Semilinear(jnp.ones(3), lambda t, u, args: (u,))
    with pytest.raises(ValueError, match="structure and shape of its state"):
        term.vf(0.0, jnp.ones(3), None)


def test_the_solver_is_a_value():
    solver = gd.ExponentialAdams(2)
    assert solver == gd.ExponentialAdams(2) != gd.ExponentialAdams()
    third = eqx.tree_at(lambda s: s.predictor, solver, AdamsBashforth(3))
    assert third == gd.ExponentialAdams(3)
    assert not jtu.tree_leaves(eqx.filter(solver, eqx.is_array))
