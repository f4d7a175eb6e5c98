"""Gradients through a solve with GDDIM, against finite differences on a fixed grid."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import adaptive, last


_process = gd.VP((2,))
_backsolve = dfx.BacksolveAdjoint(
    solver=dfx.Tsit5(), stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8)
)


def _model(t, u, args):
    return jnp.tanh(args * u) + 0.1 * t


def _loss(inputs, ts, adjoint):
    y0, args = inputs
    sol = dfx.diffeqsolve(
        gd.ProbabilityFlow(_process, _model),
        gd.GDDIM(3),
        ts[0],
        ts[-1],
        None,
        y0,
        args,
        stepsize_controller=dfx.StepTo(ts),
        adjoint=adjoint,
        max_steps=len(ts) - 1,
    )
    return (last(sol.ys) ** 2).sum()


def _inputs():
    return jnp.asarray(np.array([0.4, -0.3])), jnp.asarray(0.7)


def _finite_differences(fn, x, delta=1e-6):
    flat, unravel = jax.flatten_util.ravel_pytree(x)
    eye = jnp.eye(len(flat)) * delta
    return unravel(
        jnp.stack([(fn(unravel(flat + e)) - fn(unravel(flat - e))) for e in eye])
        / (2 * delta)
    )


_ts = gd.time_grid(_process, 8, t1=0.1)
_value = eqx.filter_jit(lambda x: _loss(x, _ts, dfx.RecursiveCheckpointAdjoint()))


@pytest.mark.x64
def test_discrete_adjoints_equal_finite_differences():
    expected = _finite_differences(_value, _inputs())
    for adjoint in (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint()):
        gradient = jax.jit(jax.grad(lambda x: _loss(x, _ts, adjoint)))(_inputs())
        for got, want in zip(gradient, expected):
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.x64
def test_forward_mode_equals_finite_differences():
    y0, args = _inputs()
    fn = lambda a: _loss((y0, a), _ts, dfx.ForwardMode())
    _, tangent = jax.jit(lambda a: jax.jvp(fn, (a,), (jnp.ones_like(a),)))(args)
    expected = _finite_differences(lambda a: _value((y0, a)), args)
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)


@pytest.mark.x64
def test_backsolve_gives_the_gradient_of_the_flow():
    ts = gd.time_grid(_process, 1000, t1=0.1)
    gradient = jax.jit(jax.grad(lambda x: _loss(x, ts, _backsolve)))(_inputs())
    loss = eqx.filter_jit(lambda x: _loss(x, ts, dfx.RecursiveCheckpointAdjoint()))
    for got, want in zip(gradient, _finite_differences(loss, _inputs())):
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.x64
def test_gradient_in_the_times():
    @jax.jit
    def loss(inner):
        grid = jnp.concatenate([_ts[:1], inner, _ts[-1:]])
        return _loss(_inputs(), grid, dfx.RecursiveCheckpointAdjoint())

    gradient = jax.jit(jax.grad(loss))(_ts[1:-1])
    expected = _finite_differences(loss, _ts[1:-1])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.x64
def test_vmap_of_grad_and_grad_of_vmap():
    y0 = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    adjoint = dfx.RecursiveCheckpointAdjoint()
    loss = lambda y: _loss((y, jnp.asarray(0.7)), _ts, adjoint)
    gradient = jax.jit(jax.grad(loss))
    one_by_one = jnp.stack([gradient(y) for y in y0])
    inside = jax.jit(jax.vmap(jax.grad(loss)))(y0)
    outside = jax.jit(jax.grad(lambda y: jax.vmap(loss)(y).sum()))(y0)
    for found in (inside, outside):
        np.testing.assert_allclose(found, one_by_one, rtol=1e-10)


@pytest.mark.x64
def test_gradients_are_finite_under_vmap_with_finished_lanes():
    # Lanes that are done keep being stepped, over intervals of no length.
    y0 = jnp.asarray(np.array([[0.1, 0.2], [5.0, -9.0]]))

    def loss(y):
        flow, args = gd.ProbabilityFlow(_process, _model), jnp.asarray(0.7, y.dtype)
        kwargs = dict(args=args, max_steps=128, adjoint=dfx.RecursiveCheckpointAdjoint())
        sol = adaptive(flow, gd.GDDIM(3), 1.0, 0.1, -0.3, y, **kwargs)
        return last(sol.ys).sum()

    gradient = jax.jit(jax.grad(lambda y: jax.vmap(loss)(y).sum()))(y0)
    assert jnp.isfinite(gradient).all()


def test_backsolve_without_its_own_solver_is_refused():
    gradient = jax.grad(lambda x: _loss(x, _ts, dfx.BacksolveAdjoint()))
    with pytest.raises(
        ValueError, match="got AdjointTerm. Give `BacksolveAdjoint` a solver"
    ):
        gradient(_inputs())
