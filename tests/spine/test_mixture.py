import functools as ft
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gddim_eqx as gd

from ..helpers import (
    every_process,
    max_difference,
    mixture_for,
    processes,
)


X64 = jnp.result_type(float) == np.float64

# Wide components, and for a few processes points.
every_case = pytest.mark.parametrize(
    "name, scale",
    [*((name, 0.3) for name in processes), ("sub_vp", 0.0), ("cld", 0.0), ("bdm", 0.0)],
)


@ft.cache
def mixture_of(name, scale):
    return mixture_for(processes[name](), scale=scale)


def rows(states):
    """A batch of states as vectors."""
    return jax.vmap(lambda u: ravel_pytree(u)[0])(states)


@ft.cache
def _dense(name):
    process = processes[name]()

    def matrices(t):
        operators = (
            process.transition(t, jnp.zeros_like(t)),
            process.covariance(t),
            process.factor(t),
        )
        return [operator.as_matrix() for operator in operators]

    return jax.jit(jax.vmap(matrices))


@jax.jit
@jax.vmap
@jax.grad
def score_of_density(u, centres, precision, log_weights):
    residual = u[None] - centres
    exponents = -0.5 * jnp.einsum("ki,ij,kj->k", residual, precision, residual)
    return jax.nn.logsumexp(exponents + log_weights)


def exact_noise(name, scale, t, u):
    """-R^T grad log p, from the density of the mixture, as rows."""
    process, mixture = processes[name](), mixture_of(name, scale)
    to_t, covariance, factor = (np.asarray(m, float) for m in _dense(name)(t))
    centres = np.asarray(rows(process.encode(mixture.means)), float)
    size = math.prod(process.shape)
    units = process.encode(jnp.eye(size).reshape(size, *process.shape))
    # Independent noise in the data, carried along, and that of the process.
    spread = scale * np.asarray(rows(units), float) @ np.swapaxes(to_t, 1, 2)
    precision = np.linalg.inv(covariance + np.swapaxes(spread, 1, 2) @ spread)
    log_weights = np.tile(np.log(mixture.weights), (len(t), 1))
    arguments = (centres @ np.swapaxes(to_t, 1, 2), precision, log_weights)
    score = score_of_density(rows(u), *(jnp.asarray(a, float) for a in arguments))
    return -jnp.einsum("bji,bj->bi", jnp.asarray(factor, float), score)


@ft.cache
def _predicted(name, scale):
    """The model's noise, in the basis of states, for a batch of times and states."""
    process, model = processes[name](), mixture_of(name, scale).model(processes[name]())
    predict = lambda t, u: process.from_data(model(t, process.to_data(u), None))
    return jax.jit(jax.vmap(predict))


@ft.cache
def _perturb(name):
    return jax.jit(jax.vmap(processes[name]().perturb))


NUMBER = 16


def states_of(name, scale, fractions):
    """Times and noised data, as training would meet them."""
    process = processes[name]()
    span = process.t_max - process.t_min
    t = process.t_min + span * jnp.asarray(np.resize(fractions, NUMBER)) ** 2
    x = mixture_of(name, scale).sample(jr.key(1), NUMBER)
    u, _ = _perturb(name)(jr.split(jr.key(0), NUMBER), x, t)
    return t, u


@every_case
def test_noise_is_minus_the_turned_score_of_the_density(name, scale):
    # Near t_min the reference needs double precision.
    fractions = np.linspace(0 if X64 else 0.1, 1, 9)
    t, u = states_of(name, scale, fractions)
    error = rows(_predicted(name, scale)(t, u)) - exact_noise(name, scale, t, u)
    assert np.abs(error).max() <= (1e-11 if X64 else 1e-3)


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, scale",
    [("vp_cosine", 0.3), ("ve", 0.3), ("cld", 0.3)]
    + [("sub_vp", 0.0), ("cld", 0.0), ("bdm", 0.0)],
)
def test_noise_in_float32(name, scale):
    """As rounding of the state allows: its size over the standard deviation."""
    process = processes[name]()
    cast = lambda x, dtype: jtu.tree_map(lambda y: y.astype(dtype), x)
    single = cast(states_of(name, scale, np.linspace(0, 1, 9)), jnp.float32)
    result = _predicted(name, scale)(*single)
    assert all(y.dtype == jnp.float32 for y in jtu.tree_leaves(result))
    exact = _predicted(name, scale)(*cast(single, jnp.float64))
    covariance = jax.jit(process.covariance)(process.t_min).blocks
    smallest = np.linalg.eigvalsh(np.moveaxis(covariance, (0, 1), (-2, -1))).min()
    allowed = 4e-7 * np.abs(rows(single[1])).max() / max(smallest**0.5, scale)
    assert max_difference(cast(result, jnp.float64), exact) <= allowed


def test_one_point_gives_back_the_noise_that_was_drawn():
    process = gd.CLD((3,))
    point = jnp.array([[0.5, -1.0, 2.0]])
    model = gd.GaussianMixture(point).model(process)

    @jax.jit
    def both(t):
        u, noise = process.perturb(jr.key(0), point, t)
        return noise, model(t, u, None)

    assert max_difference(*both(jnp.array(0.3))) <= (1e-12 if X64 else 1e-5)


@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_batches_are_leading_axes(name):
    t, u = states_of(name, 0.3, 0.4)
    one_by_one = _predicted(name, 0.3)(t, u)
    fold = lambda y: jtu.tree_map(lambda leaf: leaf.reshape(2, 8, *leaf.shape[1:]), y)
    process, model = processes[name](), mixture_of(name, 0.3).model(processes[name]())
    predict = lambda t, u: process.from_data(model(t, process.to_data(u), None))
    together = jax.jit(predict)(t[0], fold(u))
    assert max_difference(together, fold(one_by_one)) <= (1e-12 if X64 else 1e-5)


@every_process
def test_batches_may_be_empty(name):
    process, model = processes[name](), mixture_of(name, 0.3).model(processes[name]())
    for batch in [(), (0,), (2, 0)]:
        empty = jax.eval_shape(lambda: process.prior(jr.key(0), batch))
        out = jax.eval_shape(lambda t, u: model(t, u, None), jnp.array(0.4), empty)
        assert out == empty


def test_unlikely_components_do_not_count():
    process = gd.VP((3,))
    near, far = jnp.ones((1, 3)), -jnp.ones((1, 3))
    both = gd.GaussianMixture(jnp.concatenate([near, far]), 0.1, np.array([1.0, 1e-6]))
    t, u = jnp.array(0.5), process.prior(jr.key(0), (8,))
    with_far, alone = (
        m.model(process)(t, u, None) for m in (both, gd.GaussianMixture(near, 0.1))
    )
    assert max_difference(with_far, alone) <= 1e-3


def test_weights_are_normalised_and_equal_by_default():
    means = jnp.zeros((4, 2))
    weighted = gd.GaussianMixture(means, weights=np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(weighted.weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(gd.GaussianMixture(means).weights, 0.25, rtol=1e-6)


def test_integer_means_become_floats():
    mixture = gd.GaussianMixture(np.array([[0, 1], [2, 3]]))
    assert mixture.means.dtype == jnp.result_type(float)


NUM_DRAWS = 20_000


def test_samples_have_the_moments_of_the_mixture():
    means = np.array([[-1.0, 0.0, 3.0], [2.0, 0.5, 1.0], [0.0, 0.0, -1.0]])
    weights, scale = np.array([0.5, 0.3, 0.2]), 0.4
    x = np.asarray(gd.GaussianMixture(means, scale, weights).sample(jr.key(0), NUM_DRAWS))
    mean = weights @ means
    assert (np.abs(x.mean(0) - mean) <= 5 * x.std(0) / NUM_DRAWS**0.5).all()
    centred, around = x - mean, means - mean
    covariance = (weights[:, None] * around).T @ around + scale**2 * np.eye(3)
    products = centred[:, :, None] * centred[:, None]
    error = np.abs(products.mean(0) - covariance)
    assert (error <= 5 * products.std(0) / NUM_DRAWS**0.5).all()


def test_samples_without_scale_are_the_points_in_their_proportions():
    means, weights = jnp.array([[-1.0, 0.0], [2.0, 0.5]]), np.array([0.8, 0.2])
    x = gd.GaussianMixture(means, weights=weights).sample(jr.key(0), NUM_DRAWS)
    is_point = np.asarray((x[:, None] == means[None]).all(-1))
    assert (is_point.sum(1) == 1).all()
    error = np.abs(is_point.mean(0) - weights)
    assert (error <= 5 * (weights * (1 - weights) / NUM_DRAWS) ** 0.5).all()


@every_process
def test_samples_have_the_shape_of_data(name):
    mixture, shape = mixture_of(name, 0.3), processes[name]().shape
    for n in (0, 1, 5):
        x = jax.eval_shape(lambda: mixture.sample(jr.key(0), n))
        assert x.shape == (n, *shape) and x.dtype == mixture.means.dtype


bad_arguments = {
    "no axis": (lambda: gd.GaussianMixture(jnp.array(1.0)), r"got \(\)"),
    "no component": (lambda: gd.GaussianMixture(jnp.ones((0, 2))), r"got \(0, 2\)"),
    "scale": (lambda: gd.GaussianMixture(jnp.ones((1, 2)), -0.5), "`scale`.*-0.5"),
    "nan": (lambda: gd.GaussianMixture(jnp.ones((1, 2)), math.nan), "`scale`.*nan"),
    "inf": (lambda: gd.GaussianMixture(jnp.ones((1, 2)), math.inf), "`scale`.*inf"),
    **{
        f"weights {weights}": (
            ft.partial(gd.GaussianMixture, jnp.ones((2, 2)), 0.1, np.array(weights)),
            "`weights` must be 2 positive numbers",
        )
        for weights in [
            [1.0, 1.0, 1.0],
            [1.0, 0.0],
            [1.0, -1.0],
            [1.0, math.nan],
            [1.0, math.inf],
        ]
    },
    "another shape": (
        lambda: gd.GaussianMixture(jnp.ones((1, 2))).model(gd.VP((3,))),
        r"\(2,\).*\(3,\)",
    ),
}


@pytest.mark.parametrize("case", bad_arguments)
def test_bad_arguments_raise_and_are_named(case):
    build, message = bad_arguments[case]
    with pytest.raises(ValueError, match=message):
        build()


@every_process
def test_states_that_do_not_fit_raise(name):
    model = mixture_of(name, 0.3).model(processes[name]())
    for state in (jnp.ones((2, 5)), (jnp.ones(3),) * 4):
        with pytest.raises(ValueError, match=r"The state must be .*\*batch, "):
            model(jnp.array(0.5), state, None)
