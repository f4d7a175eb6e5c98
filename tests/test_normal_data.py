"""Normal data and mixtures of them, against dense linear algebra in NumPy."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import every_process, max_difference, processes


X64 = jnp.result_type(float) == np.float64
cast = lambda x, dtype: jtu.tree_map(lambda y: y.astype(dtype), x)


@ft.cache
def normals_for(shape):
    """Of every kind, with their dense covariances."""
    random, size = np.random.default_rng(0), math.prod(shape)
    mean = random.normal(size=shape)
    vectors = np.linalg.qr(random.normal(size=(size, size)))[0]
    values = np.geomspace(1e-2, 1, size)
    matrix = (vectors * values) @ vectors.T
    variances = random.uniform(0.1, 2, shape)
    rank = size // 2 + 1
    some, rest = vectors[:, -rank:], 0.005
    low = (some * (values[-rank:] - rest)) @ some.T + rest * np.eye(size)
    kinds = {
        "number": (0.09, None, 0.09 * np.eye(size)),
        "variances": (variances, None, np.diag(variances.ravel())),
        "matrix": (matrix, None, matrix),
        "low rank": ((values[-rank:], some, rest), None, low),
    }
    if len(shape) == 3:
        kinds["cosine"] = variances, gd.CosineBasis(), None
    found = {}
    for name, (covariance, basis, dense) in kinds.items():
        if dense is None:
            turn = dense_of(gd.CosineBasis(), shape)
            dense = (turn.T * variances.ravel()) @ turn
        found[name] = gd.NormalData(mean, covariance, basis=basis), dense
    return found


def dense_of(basis, shape):
    size = math.prod(shape)
    return (
        np.asarray(basis.forward(jnp.eye(size).reshape(size, *shape))).reshape(size, -1).T
    )


def rows(state, number):
    parts = [np.asarray(x, float).reshape(number, -1) for x in jtu.tree_leaves(state)]
    return np.concatenate(parts, 1)


def dense_law(process, t, u, mean, covariance):
    """Posterior mean, score and log density, in the basis of states."""
    size, number = math.prod(process.shape), len(u)
    noise = np.asarray(process.covariance(t).as_matrix())
    signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
    turn = dense_of(process.basis, process.shape)
    signal = np.asarray(signal.as_matrix())[:, :size] @ turn
    total = signal @ covariance @ signal.T + noise
    residual = u - signal @ np.ravel(mean)
    pull = np.linalg.solve(total, residual.T).T
    data = np.ravel(mean) + pull @ signal @ covariance
    volume = np.linalg.slogdet(2 * np.pi * total)[1]
    return data @ turn.T, -pull, -0.5 * ((residual * pull).sum(1) + volume)


@ft.cache
def _evaluate(name):
    """All that is known of a state: of the included kinds of data at once."""
    process = processes[name]()

    @jax.jit
    def evaluate(t, u, data):
        # States and predictions in the basis of states.
        ask = lambda x, kind: process.from_data(
            x.model(process, kind)(t, process.to_data(u), None)
        )
        density = lambda x: x.log_density(u, process, t)
        return {
            key: (ask(x, "data"), ask(x, "score"), ask(x, "noise"), density(x))
            for key, x in data.items()
        }

    return evaluate


def states_of(process, t, mean, number=3):
    x = mean[None] + 0.7 * jr.normal(jr.key(0), (number, *mean.shape))
    return process.perturb(jr.key(1), x, t)[0]


def check(name, t, u, found, expected, tolerance):
    """Compare with the dense law of each kind."""
    process, number = processes[name](), len(jtu.tree_leaves(u)[0])
    turn = np.asarray(process.factor(t).as_matrix(), float)
    for key, (data, score, noise, density) in found.items():
        wanted = expected[key]
        data = rows(jtu.tree_leaves(data)[0], number)
        got = (data, rows(score, number), rows(noise, number), np.asarray(density))
        for x, y in zip(got, (*wanted[:2], -wanted[1] @ turn, wanted[2]), strict=True):
            error = np.abs(x - y).max() / max(1, np.abs(y).max())
            assert error <= tolerance, (key, float(t), error)


# Two normals of equal form, which overlap.
def mixture_of(x, covariance):
    wider = gd.NormalData(x.mean + 0.3, 0.5 * covariance)
    normals = [gd.NormalData(x.mean, covariance), wider]
    return gd.GaussianMixture(normals, weights=[0.3, 0.7])


def dense_mixture(process, t, u, mixture, covariance):
    laws = [
        dense_law(process, t, u, mean, scale * covariance)
        for mean, scale in zip(mixture.means, (1, 0.5), strict=True)
    ]
    joint = np.log(mixture.weights)[:, None] + np.stack([x[2] for x in laws])
    density = np.logaddexp(*joint)
    shares = np.exp(joint - density)[:, :, None]
    return *[(shares * np.stack([x[i] for x in laws])).sum(0) for i in (0, 1)], density


@pytest.mark.x64
@every_process
def test_predictions_and_log_density(name):
    """To the accuracy of the dense solution, and in float32 to that of float32."""
    process = processes[name]()
    kinds = normals_for(process.shape)
    data: dict = {kind: x for kind, (x, _) in kinds.items()}
    normal, covariance = kinds["matrix"]
    data["mixture"] = mixture_of(normal, covariance)
    for t in (process.t_min, 0.3 * process.t_max, process.t_max):
        t = jnp.asarray(t)
        u = states_of(process, t, normal.mean)
        at = process, t, rows(u, 3)
        wanted = {kind: dense_law(*at, x.mean, c) for kind, (x, c) in kinds.items()}
        wanted["mixture"] = dense_mixture(*at, data["mixture"], covariance)
        check(name, t, u, _evaluate(name)(t, u, data), wanted, 1e-10)

        single = cast((t, u, data), jnp.float32)
        exact = _evaluate(name)(*cast(single, jnp.float64))
        found = _evaluate(name)(*single)
        for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(exact), strict=True):
            assert x.dtype == jnp.float32
            error = max_difference(x.astype(float), y) / max(1, jnp.abs(y).max())
            assert error <= 1e-5
