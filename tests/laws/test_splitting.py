"""Laws that the coefficients of every splitting obey, for every process."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.solvers import Clock, DataSplitting, NoiseSplitting, Time

from ..helpers import (
    every_process,
    processes,
)


pytestmark = pytest.mark.x64

_splittings = {
    "data": (DataSplitting(), Clock()),
    "noise": (NoiseSplitting(), Time()),
    "cholesky": (NoiseSplitting("cholesky"), Time()),
}
every_splitting = pytest.mark.parametrize("splitting", _splittings)


@ft.cache
def _coefficients(name, splitting):
    """The coefficients of steps from some times to others, compiled once."""
    process, (split, coordinate) = processes[name](), _splittings[splitting]

    @jax.jit
    @jax.vmap
    def coefficients(s, t):
        c = split.integrate(process, s, t, 3, coordinate, 3)
        return c.linear, c.moments, c.error_moments

    def some(s, t):
        times = (jnp.asarray(x) * process.t_max for x in (s, t))
        return tuple(map(np.asarray, coefficients(*times)))

    return some


def _product(a, b):
    return np.einsum("kij...,kjl...->kil...", a, b)


def _eye(like):
    eye = np.eye(like.shape[1])
    return eye.reshape(1, *eye.shape, *[1] * (like.ndim - 3))


@every_process
@every_splitting
def test_a_step_without_length_changes_nothing(name, splitting):
    times = np.array([0.9, 0.5, 0.1])
    linear, *moments = _coefficients(name, splitting)(times, times)
    np.testing.assert_allclose(linear, _eye(linear) + 0 * linear, atol=1e-9)
    for values in moments:
        assert (values == 0).all()


@every_process
@every_splitting
def test_there_and_back_is_the_identity(name, splitting):
    s, t = np.array([0.9, 0.5, 0.2]), np.array([0.5, 0.45, 0.1])
    steps = _coefficients(name, splitting)
    there, back = steps(s, t), steps(t, s)
    both = _product(back[0], there[0])
    np.testing.assert_allclose(both, _eye(both) + 0 * both, atol=1e-8)
    # Of a constant prediction too: what it adds on the way there, the way back takes.
    rest = _product(back[0], there[1][:, 0]) + back[1][:, 0]
    size = np.abs(_product(back[0], there[1][:, 0])).max()
    np.testing.assert_allclose(rest, 0, atol=1e-8 * size)


@every_process
@pytest.mark.parametrize("splitting", ["data", "noise"])
def test_two_steps_are_one_for_one_data_point(name, splitting):
    """A constant prediction is integrated exactly, however the way is divided."""
    steps = _coefficients(name, splitting)
    first, second, whole = (
        steps(np.array([a]), np.array([b])) for a, b in ((0.9, 0.4), (0.4, 0.1), (0.9, 0.1))
    )
    linear = _product(second[0], first[0])
    np.testing.assert_allclose(linear, whole[0], rtol=1e-8, atol=1e-10)
    constant = _product(second[0], first[1][:, 0]) + second[1][:, 0]
    np.testing.assert_allclose(constant, whole[1][:, 0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "sub_vp"])
def test_the_last_step_to_time_zero_extrapolates_to_its_end(name):
    """Without noise at time 0 nothing is left there but the data prediction at the end,
    where all powers of the coordinate are one."""
    _, moments, in_time = _coefficients(name, "data")([1e-3], [0.0])
    np.testing.assert_allclose(moments.ravel(), 1, atol=0.02)
    np.testing.assert_allclose(in_time.ravel(), 1, atol=1e-6)


@every_process
def test_predictions_amount_to_the_data_and_the_noise_that_they_were_made_of(name):
    process = processes[name]()
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, *process.shape))
    t = jnp.asarray(0.4 * process.t_max)
    u, noise = process.perturb(keys[1], x, t)
    kinds = [("noise", "R"), ("noise", "cholesky"), ("data", "R"), ("score", "R")]
    if process.num_components == 1:
        kinds += [("v", "R"), ("flow", "R")]
    for predicts, frame in kinds:
        flow = gd.ProbabilityFlow(process, lambda t, u, args: args, predicts, frame)
        value = flow.prediction(t, u, noise)
        got = [flow.noise(t, u, value), flow.denoised(t, u, value)]
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves([noise, process.encode(x)])):
            np.testing.assert_allclose(a, b, atol=1e-9)
