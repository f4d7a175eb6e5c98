"""Data to latent codes and back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from sklearn.datasets import load_digits

import gddim_eqx as gd

from ..helpers import accurate, max_difference, mixture_for, processes


def _flow(name, scale=0.5):
    process = processes[name]()
    mixture = mixture_for(process, scale=scale)
    return gd.ProbabilityFlow(process, mixture.model(process)), mixture


@pytest.mark.parametrize("kind", (gd.VP, gd.CLD, gd.BDM))
def test_codes_of_images_decode_to_them(kind):
    images = load_digits().images[:200, :, :, None] / 8 - 1
    process, mixture = kind((8, 8, 1)), gd.GaussianMixture(images, 0.02)
    flow = gd.ProbabilityFlow(process, mixture.model(process))
    x = mixture.sample(jax.random.key(0), 5)
    latent, error = gd.invert(flow, x, 100)
    assert error.shape == (5,) and float(error.max()) < 1e-4
    decoded = gd.generate(flow, latent, 100)
    distance = jnp.sqrt(((decoded - x) ** 2).reshape(5, -1).mean(1))
    size = jnp.sqrt((x**2).reshape(5, -1).mean(1))
    np.testing.assert_allclose(error, distance / size, atol=1e-6)


@pytest.mark.x64
def test_codes_are_the_ends_of_the_flow():
    flow, mixture = _flow("vp")
    process, x = flow.process, mixture.sample(jax.random.key(0), 3)
    u = process.encode(x)
    exact = accurate(flow, process.t_min, process.t_max, u)
    errors = [
        max_difference(gd.invert(flow, x, n, check=False)[0], exact) for n in (50, 100)
    ]
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 4


@pytest.mark.x64
def test_other_solvers_and_times():
    flow, mixture = _flow("vp")
    process, x = flow.process, mixture.sample(jax.random.key(0), 3)
    ts = gd.time_grid(process, 30, t0=2 * process.t_min, t1=0.9)
    code = gd.invert(flow, x, solver=gd.GDDIM(3, "noise"), ts=ts, check=False)
    assert code.error is None
    exact = accurate(flow, ts[0], ts[-1], x)
    assert max_difference(code.latent, exact) < 0.02


@pytest.mark.x64
def test_gradients_with_respect_to_the_noise():
    flow, _ = _flow("vp")
    u = flow.process.prior(jax.random.key(0), (2,))

    @jax.jit
    def loss(u):
        return (gd.generate(flow, u, 8) ** 2).sum()

    direction = flow.process.prior(jax.random.key(1), (2,))
    move = lambda h: jtu.tree_map(lambda a, b: a + h * b, u, direction)
    difference = (loss(move(1e-5)) - loss(move(-1e-5))) / 2e-5
    gradient = jax.jit(jax.grad(loss))(u)
    products = jtu.tree_map(lambda a, b: (a * b).sum(), gradient, direction)
    np.testing.assert_allclose(sum(jtu.tree_leaves(products)), difference, rtol=1e-5)


def test_an_empty_batch_and_a_single_sample():
    flow, mixture = _flow("vp")
    run = eqx.filter_jit(lambda x: gd.invert(flow, x, 5))
    assert run(mixture.sample(jax.random.key(0), 0)).error.shape == (0,)
    assert run(mixture.sample(jax.random.key(0), 1)[0]).error.shape == ()


def test_data_of_another_shape_are_refused():
    flow, _ = _flow("vp")
    with pytest.raises(ValueError, match="The data `x` must be an array of shape"):
        gd.invert(flow, jnp.zeros((3, 4)))
