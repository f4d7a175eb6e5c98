"""Networks of arrays as models of states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import (
    every_family,
    max_difference,
    processes,
)


pytestmark = pytest.mark.precision


def _network(t, x, key=None):
    """Tells channels apart."""
    weights = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    y = x * weights[(None,) * (x.ndim - 1)] + t.astype(x.dtype)
    return y if key is None else y + jax.random.normal(key, x.shape, x.dtype)


def test_all_channels_of_the_data_come_first():
    model = gd.nn.NetworkModel(gd.CLD((4, 4, 2)), _network)
    x, v = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2))
    got = model(jnp.asarray(0.5), gd.Phase(jnp.asarray(x), jnp.asarray(v)))
    np.testing.assert_allclose(got.x, x * [1, 2] + 0.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.v, v * [3, 4] + 0.5, rtol=1e-6, atol=1e-6)


def test_a_mixed_score_is_for_every_process_with_a_velocity():
    cld = gd.CLD((3,))
    initial = np.diag([1e-6, 0.01 + 1e-6])
    solved = gd.LinearSDE((3,), cld.drift, cld.diffusion, initial)
    u, t = cld.prior(jax.random.key(0), (2,)), jnp.asarray(0.3)
    got, expected = (
        gd.nn.NetworkModel(process, _network, mixed_score=True)(t, u)
        for process in (solved, cld)
    )
    assert max_difference(got, expected) < 1e-4
    # In the frame of a basis of its own.
    kernel = lambda value: lambda t: jnp.asarray(value, t.dtype)
    process = gd.LinearSDE(
        (4, 4, 1),
        kernel([[0.0, 1.0], [-1.0, -2.0]]),
        kernel([[0.0, 0.0], [0.0, 2.0]]),
        basis=gd.CosineBasis(),
    )
    u = process.to_data(process.prior(jax.random.key(0), (2,)))
    mixed = gd.nn.NetworkModel(process, _network, mixed_score=True)(t, u)
    bare = gd.nn.NetworkModel(process, _network)(t, u)
    change = process.from_data(jtu.tree_map(jnp.subtract, mixed, bare))
    back = process.to_data(process.factor(t).mv(change))
    np.testing.assert_allclose(back.x, 0, atol=1e-4)
    np.testing.assert_allclose(back.v, u.v, atol=1e-4)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("process", [gd.VP((2,)), gd.BDM((4, 4, 1)), gd.CLD((2,))])
def test_any_batch(process, batch):
    model = gd.nn.NetworkModel(process, _network)
    u, t = process.to_data(process.prior(jax.random.key(0), batch)), jnp.asarray(0.5)
    got = jax.jit(model)(t, u)
    assert jtu.tree_map(jnp.shape, got) == jtu.tree_map(jnp.shape, u)
    if batch == (2, 3):
        one = model(t, jtu.tree_map(lambda x: x[1, 2], u))
        assert max_difference(one, jtu.tree_map(lambda x: x[1, 2], got)) < 1e-6
        # Dropout is another for each sample.
        noisy = model(t, u, key=jax.random.key(1))
        noise = jtu.tree_leaves(jtu.tree_map(jnp.subtract, noisy, got))[0]
        assert float(jnp.abs(noise[0, 0] - noise[0, 1]).min()) > 1e-4


def test_a_mixed_score_adds_the_noise_of_the_velocity_alone():
    process = gd.CLD((3,))
    model = gd.nn.NetworkModel(process, _network, mixed_score=True)
    bare = gd.nn.NetworkModel(process, _network)
    u, t = process.prior(jax.random.key(0), (2,)), jnp.asarray(0.3)
    # R (change) = (0, v).
    change = jtu.tree_map(jnp.subtract, model(t, u), bare(t, u))
    back = process.factor(t).mv(change)
    np.testing.assert_allclose(back.x, 0, atol=1e-5)
    np.testing.assert_allclose(back.v, u.v, atol=1e-5)


@every_family
def test_preconditioned_networks_only_add_to_normal_data(name):
    process, std = processes[name](), 0.4
    exact = gd.GaussianMixture(jnp.zeros((1, *process.shape)), std).model(process)
    model = gd.nn.NetworkModel(
        process, lambda t, x: jnp.zeros(process.shape, x.dtype), data_std=std
    )
    u = process.to_data(process.prior(jax.random.key(0), (2,)))
    for t in (process.t_min, 0.3, process.t_max):
        # In single precision a quotient of small numbers is not known better.
        assert max_difference(model(t, u), exact(t, u, None)) < 1e-4


@every_family
def test_preconditioned_networks_predict_any_noise(name):
    process, std = processes[name](), 0.4
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    for t in (0.01, 0.3, process.t_max):
        t = jnp.asarray(t)
        u, noise = process.perturb(jax.random.key(1), x, t)
        # The mean and the variance of normal data given the state, from what is left of
        # them in it, in units of the noise.
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        share = (process.factor(t).inverse() @ signal).blocks[:, 0]
        seen = jtu.tree_leaves(process.factor(t).inverse().mv(u))
        variance = 1 / (1 / std**2 + (share**2).sum(0))
        mean = variance * sum(a * y for a, y in zip(share, seen))
        answer = (process.basis.forward(x) - mean) / jnp.sqrt(variance)
        network = lambda t, x: process.basis.inverse(answer)
        model = gd.nn.NetworkModel(process, network, data_std=std)
        got = process.from_data(model(t, process.to_data(u)))
        assert max_difference(got, noise) < (1e-6 if x.dtype == jnp.float64 else 5e-3)


@pytest.mark.x64
def test_sampling_with_a_network():
    process = gd.CLD((8, 8, 1))
    network = gd.nn.presets.small((8, 8, 2), key=jax.random.key(0), features=8)
    model = gd.nn.NetworkModel(process, network)
    # It is not trained.
    with pytest.warns(UserWarning, match="far larger|plausible"):
        samples = gd.sample(process, model, jax.random.key(1), 3, 4)
    assert samples.x.shape == (3, 8, 8, 1) and samples.evaluations == 4


def test_bad_input_is_refused(without_type_checks):
    with pytest.raises(ValueError, match="`mixed_score` is for .*; got VP"):
        gd.nn.NetworkModel(gd.VP((2,)), _network, mixed_score=True)
    with pytest.raises(ValueError, match="`mixed_score` or `data_std`, not both"):
        gd.nn.NetworkModel(gd.CLD((2,)), _network, mixed_score=True, data_std=0.5)
    with pytest.raises(ValueError, match="`data_std` must be positive; got 0"):
        gd.nn.NetworkModel(gd.CLD((2,)), _network, data_std=0.0)
    with pytest.raises(ValueError, match="`network` must be callable; got 3"):
        gd.nn.NetworkModel(gd.VP((2,)), 3)
    model = gd.nn.NetworkModel(gd.VP((2,)), lambda t, x: x[:1])
    with pytest.raises(ValueError, match=r"an array of shape \(2,\); it returned \(1,\)"):
        model(jnp.asarray(0.5), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"must be an array of shape \(\*batch, 2\)"):
        eqx.filter_jit(model)(jnp.asarray(0.5), jnp.zeros((3, 3)))


@pytest.mark.parametrize("dropout", (False, True))
def test_a_preconditioned_network_predicts_noise_only(dropout):
    process = gd.RectifiedFlow((2,))
    model = gd.nn.NetworkModel(process, _network, data_std=0.5)
    with pytest.raises(
        ValueError, match="With `data_std`, a NetworkModel predicts 'noise'"
    ):
        gd.ProbabilityFlow(process, model, "flow")
    loss = gd.training.DenoisingLoss(process, predicts="flow", dropout=dropout)
    with pytest.raises(ValueError, match="Leave out `data_std`, or predict 'noise'"):
        loss(model, loss.noised(jax.random.key(0), jnp.zeros((4, 2))))
