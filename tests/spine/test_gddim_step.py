"""What one step of GDDIM computes."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

import gddim_eqx as gd
from gddim_eqx._process import AbstractLangevin

from ..helpers import (
    every_family,
    forward,
    last,
    max_difference,
    mixture_for,
    prior_state,
    processes,
    slow,
    solve,
)


def _soft_log_snr(process, times):
    log_snr = jax.vmap(process.log_snr)(jnp.asarray(times))
    return np.log1p(np.exp(1 + np.asarray(log_snr)))


def _paper_step(process, times, noises, u, t, frame, coordinate=lambda _, t: np.array(t)):
    """Equation 19 as printed: Psi(t, s) u + sum_j C_j eps_j with C_j the integral of
    1/2 Psi(t, tau) G G^T K^-T l_j, by brute force in NumPy. The polynomials are in time,
    or in another coordinate."""
    s, nodes = times[0], coordinate(process, times)
    edges = np.linspace(s, t, 201)
    x, w = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    tau = (edges[:-1, None] + half * (1 + x)).ravel()
    weight = (half * w).ravel()

    @jax.vmap
    def integrand(tau):
        g = process.diffusion(tau)
        k = process.factor(tau) if frame == "R" else process.cholesky(tau)
        return 0.5 * (process.transition(t, tau) @ g @ g.T @ k.inverse().T).blocks

    values = np.asarray(integrand(jnp.asarray(tau)))
    out = np.einsum("ij,jd->id", process.transition(t, s).blocks, u)
    for j, noise in enumerate(noises):
        others = np.delete(nodes, j)
        at = coordinate(process, tau)[:, None]
        basis = np.prod((at - others) / (nodes[j] - others), axis=1)
        coefficient = np.tensordot(weight * basis, values, 1)
        out = out + np.einsum("ij,jd->id", coefficient, noise)
    return out


@pytest.mark.x64
@pytest.mark.parametrize("order", (1, 4, *slow(2, 3)))
@pytest.mark.parametrize("name, frame", [("vp", "R"), ("cld", "R"), ("cld", "cholesky")])
def test_steps_by_hand_are_those_of_the_paper(name, frame, order):
    process = processes[name]()
    term = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    solver = gd.GDDIM(order, "noise", frame=frame)
    ts = [0.9, 0.7, 0.62, 0.4, 0.3]
    y = prior_state(process)
    state = solver.init(term, ts[0], ts[1], y, None)
    times, noises = [], []
    step = eqx.filter_jit(solver.step)
    for s, t in zip(ts[:-1], ts[1:]):
        times = [s, *times][:order]
        noise = np.stack(jtu.tree_leaves(term.noise(s, y, None, frame)))
        noises = [noise, *noises][:order]
        before = np.stack(jtu.tree_leaves(y))
        expected = _paper_step(process, times, noises, before, t, frame)
        y, error, _, state, _ = step(
            term, jnp.asarray(s), jnp.asarray(t), y, None, state, False
        )
        got = np.stack(jtu.tree_leaves(y))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)
        lower = 1 if order == 1 and len(times) < 2 else len(times) - 1
        if lower >= 1 and order > 1:
            fewer = times[:lower], noises[:lower], before, t, frame, _soft_log_snr
            fewer = _paper_step(process, *fewer)
            difference = np.stack(jtu.tree_leaves(error)) - (expected - fewer)
            np.testing.assert_allclose(difference, 0, atol=1e-9)


def _size(operator):
    return float(np.abs(operator.blocks).max())


@eqx.filter_jit
def _first_step(term, solver, s, t, y):
    state = solver.init(term, s, t, y, None)
    return solver.step(term, s, t, y, None, state, False)[0]


@every_family
def test_one_step_is_exact_for_one_data_point(name):
    process = processes[name]()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=process.shape))
    model = gd.GaussianMixture(x[None]).model(process)
    term = gd.ProbabilityFlow(process, model)
    noise = jtu.tree_map(lambda y: jnp.asarray(rng.normal(size=y.shape)), process.encode(x))

    @jax.jit
    def exact(t):
        mean = process.transition(t, jnp.zeros_like(t)).mv(process.encode(x))
        spread = process.factor(t).mv(noise)
        return jtu.tree_map(lambda a, b: a + b, mean, spread)

    span = process.t_max - process.t_min
    fraction = st.floats(0, 1)

    @given(fraction, fraction, st.sampled_from(("noise", "data")))
    def check(a, b, space):
        s, t = (jnp.asarray(process.t_min + span * f**3) for f in (a, b))
        if abs(a - b) < 0.02:
            return
        got = _first_step(term, gd.GDDIM(4, space), s, t, exact(s))
        # Rounding errors grow backward from where little of the data is left, and forward
        # from where there is little noise.
        growth = _size(process.transition(t, s)) * _size(process.factor(s))
        growth += _size(process.factor(t)) * _size(process.factor(s).inverse())
        tolerance = 30 * jnp.finfo(s.dtype).eps * (1 + growth)
        # Those that are solved by collocation.
        solved = isinstance(process, (gd.LinearSDE, AbstractLangevin))
        tolerance *= 6 if solved else 1
        assert max_difference(got, exact(t)) < tolerance

    check()


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

    term = gd.ProbabilityFlow(Trivial((2,)), field)
    y0, h = jnp.array([1.0, 0.5]), 0.1
    ts = 1 + h * np.arange(21)
    got = solve(term, gd.GDDIM(3, "noise"), jnp.asarray(ts), y0, args=jnp.asarray(2.0))
    rules = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    y, history = np.asarray(y0), []
    for t in ts[:-1]:
        history = [np.array([y[1], -2 * y[0]]), *history][:3]
        y = y + h * sum(b * f for b, f in zip(rules[len(history) - 1], history))
    np.testing.assert_allclose(got, y, rtol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("order", (2, 4))
def test_solves_nonlinear_problems_adaptively(order):
    # Two problems of the DETEST set, with closed-form solutions.
    def field(t, y, args):
        return jnp.stack([-0.5 * y[0] ** 3, y[1] * jnp.cos(t - 1)])

    term = gd.ProbabilityFlow(Trivial((2,)), field)
    controller = dfx.PIDController(rtol=1e-8, atol=1e-8)
    sol = dfx.diffeqsolve(
        term,
        gd.GDDIM(order, "noise"),
        1.0,
        6.0,
        1e-4,
        jnp.array([1.0, 1.0]),
        stepsize_controller=controller,
        max_steps=200_000,
        adjoint=forward,
    )
    exact = [1 / np.sqrt(6.0), np.exp(np.sin(5.0))]
    np.testing.assert_allclose(last(sol.ys), exact, rtol=1e-5)


@pytest.mark.x64
def test_the_cholesky_frame_is_the_same_without_a_velocity_and_far_worse_with_one():
    angle = np.pi / 4 * np.arange(8)
    ring = gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    for process in (gd.VP((2,)), gd.CLD((2,))):
        term = gd.ProbabilityFlow(process, ring.model(process))
        u = process.prior(jax.random.key(0), (128,))

        def draw(solver, ts):
            return process.decode(solve(term, solver, ts, u))

        ts = gd.time_grid(process, 10, "quadratic")
        ys = [draw(gd.GDDIM(3, "noise", frame=f), ts) for f in ("R", "cholesky")]
        if isinstance(process, gd.VP):
            np.testing.assert_allclose(*ys, rtol=1e-10, atol=1e-10)
            continue
        exact = draw(gd.GDDIM(), gd.time_grid(process, 500))
        errors = [jnp.median(jnp.linalg.norm(y - exact, axis=-1)) for y in ys]
        assert errors[1] > 100 * errors[0]


def test_the_frame_must_be_known(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="`frame` must be 'R' or 'cholesky'; got 'L'"):
        gd.GDDIM(3, "noise", frame="L")


def test_order_must_be_one_to_four():
    for order in (0, 5, True):
        message = rf"must be 1, 2, 3 or 4; got {order}\.(.|\n)*count from 0.*one more"
        with pytest.raises(ValueError, match=message):
            gd.GDDIM(order)
