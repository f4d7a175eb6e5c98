"""Networks of arrays as models of states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
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
    mixture = gd.GaussianMixture(jnp.zeros((1, *process.shape)), std)
    exact = mixture.model(process, "data")
    model = gd.nn.NetworkModel(
        process, lambda t, x: jnp.zeros(process.shape, x.dtype), data_std=std
    )
    u = process.to_data(process.prior(jax.random.key(0), (2,)))
    for t in (process.t_min, 0.3, process.t_max):
        assert max_difference(model(t, u), exact(t, u, None)) < 2e-5


def _posterior(process, t, mean, covariance):
    """The gain, the covariance and the prediction without a state, of flattened data with
    this law given a state."""
    basis = lambda x: np.asarray(process.basis.forward(jnp.asarray(x)))
    size = mean.size
    to = basis(np.eye(size).reshape(size, *process.shape)).reshape(size, size).T
    signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
    signal = np.asarray(signal.as_matrix(), float)[:, :size] @ to
    spread = np.asarray(process.covariance(t).as_matrix(), float)
    total = signal @ covariance @ signal.T + spread
    gain = np.linalg.solve(total, signal @ covariance).T
    return signal, gain, covariance - gain @ signal @ covariance


def _root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


def _laws(process):
    """Every kind of law that such networks may have."""
    rng = np.random.default_rng(3)
    mean = rng.normal(size=process.shape)
    size = mean.size
    yield gd.NormalData(mean, 0.3), mean, 0.3 * np.eye(size)
    basis = process.basis
    variances = rng.uniform(0.1, 2, process.shape)
    to = np.asarray(basis.forward(jnp.eye(size).reshape(size, *process.shape)))
    to = to.reshape(size, size).T.astype(float)
    covariance = to.T @ np.diag(variances.ravel()) @ to
    yield gd.NormalData(mean, variances, basis=basis), mean, covariance
    if process.drift(0.5).blocks.ndim > 2:
        return
    vectors, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = rng.uniform(0.1, 2, size)
    full = vectors * values @ vectors.T
    yield gd.NormalData(mean, full), mean, full
    some = vectors[:, :2] * (values[:2] + 0.2) @ vectors[:, :2].T
    rest = 0.2 * (np.eye(size) - vectors[:, :2] @ vectors[:, :2].T)
    law = gd.NormalData(mean, (values[:2] + 0.2, vectors[:, :2], 0.2))
    yield law, mean, some + rest


@every_family
def test_preconditioned_networks_with_the_law_of_the_data(name):
    process = processes[name]()
    output = np.random.default_rng(1).normal(size=process.shape)
    u = process.to_data(process.prior(jax.random.key(0), (2,)))
    flat = [np.asarray(x).reshape(2, -1) for x in jtu.tree_leaves(process.from_data(u))]
    flat = np.concatenate(flat, -1)
    bound = 1e-8 if flat.dtype == np.float64 else 2e-3
    for data, mean, covariance in _laws(process):
        network = lambda t, x: jnp.asarray(output, x.dtype)
        model = gd.nn.NetworkModel(process, network, data=data)
        for t in (process.t_min, 0.3, process.t_max):
            t = jnp.asarray(t)
            signal, gain, left = _posterior(process, t, mean, covariance)
            expected = mean.ravel() + (flat - mean.ravel() @ signal.T) @ gain.T
            expected = expected + _root(left) @ output.ravel()
            got = jtu.tree_leaves(model(t, u))
            for rest in got[1:]:
                np.testing.assert_array_equal(rest, 0)
            np.testing.assert_allclose(got[0].reshape(2, -1), expected, atol=bound)


@every_family
def test_preconditioned_networks_predict_any_data(name):
    process, std = processes[name](), 0.4
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    for t in (process.t_min, 0.01, 0.3, process.t_max):
        t = jnp.asarray(t)
        u, _ = process.perturb(jax.random.key(1), x, t)
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
        got = jtu.tree_leaves(model(t, process.to_data(u)))
        assert max_difference(got[0], x) < (1e-9 if x.dtype == jnp.float64 else 1e-4)


@every_family
def test_preconditioned_networks_at_time_zero(name):
    process = processes[name]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    u = process.encode(x)
    network = lambda t, x: jnp.ones(process.shape, x.dtype)
    model = gd.nn.NetworkModel(process, network, data_std=0.5)

    def predicted(t):
        return jtu.tree_leaves(model(t, process.to_data(u)))[0]

    got, slope = jax.jvp(predicted, (jnp.asarray(0.0),), (jnp.asarray(1.0),))
    assert jnp.isfinite(slope).all()
    # Some processes have a little noise from the start.
    start = float(jnp.sqrt(process.covariance(0.0).blocks[0, 0].max()))
    assert abs(max_difference(got, x) - start) < 0.1 * start + 1e-6


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "cld", "bdm"))
def test_included_models_in_single_precision(name):
    """Of the network's output in float32, nothing is lost."""
    flow = gd.checkpoints.pretrained(f"fashion-mnist-{name}")
    process, model = flow.process, flow.model
    assert flow.predicts == "data" and model.predicts == "data"
    x = np.random.default_rng(0).uniform(-1, 1, (4, *process.shape)).astype(np.float32)
    for t in (process.t_min, 0.7 * process.t_max, process.t_max):
        t = jnp.asarray(t, jnp.float32)
        u, _ = process.perturb(jax.random.key(0), jnp.asarray(x), t)
        got = jtu.tree_leaves(flow.denoised(t, u, None))[0] / process.data_scale
        assert got.dtype == jnp.float32
        joined = jnp.concatenate(jtu.tree_leaves(process.to_data(u)), -1)
        output = jax.vmap(model.network, (None, 0))(t, joined).astype(float)
        t = t.astype(float)
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        signal = np.asarray(signal.blocks[:, 0]).reshape(process.num_components, -1)
        spread = np.asarray(process.covariance(t).blocks)
        spread = spread.reshape(*spread.shape[:2], -1)
        pull = np.linalg.solve(spread.T, signal.T[..., None])[..., 0].T
        variance = 1 / (1 / model.data_std**2 + (pull * signal).sum(0))
        states = [np.asarray(y, float).reshape(4, -1) for y in jtu.tree_leaves(u)]
        mean = sum(variance * a * y for a, y in zip(pull, states))
        output = np.asarray(process.basis.forward(output)).reshape(4, -1)
        expected = mean + np.sqrt(variance) * output
        np.testing.assert_allclose(got.reshape(4, -1), expected, atol=1e-5)


@pytest.mark.x64
def test_sampling_with_a_network():
    process = gd.CLD((8, 8, 1))
    network = gd.nn.presets.small((8, 8, 2), key=jax.random.key(0), features=8)
    model = gd.nn.NetworkModel(process, network)
    # It is not trained.
    with pytest.warns(UserWarning, match="far larger|plausible"):
        samples = gd.sample(gd.ProbabilityFlow(process, model), jax.random.key(1), 3, 4)
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
def test_a_preconditioned_network_predicts_data_only(dropout):
    process = gd.RectifiedFlow((2,))
    model = gd.nn.NetworkModel(process, _network, data_std=0.5)
    with pytest.raises(ValueError, match="This NetworkModel predicts 'data'; got .*'flow'"):
        gd.ProbabilityFlow(process, model, "flow")
    edm = gd.nn.EDMPreconditioned(lambda noise, x, args: x)
    with pytest.raises(
        ValueError, match="EDMPreconditioned predicts 'data'; got .*'noise'"
    ):
        gd.ProbabilityFlow(gd.EDM((2,)), edm, "noise")
    assert gd.ProbabilityFlow(gd.EDM((2,)), edm).predicts == "data"
    loss = gd.training.DenoisingLoss(process, dropout=dropout)
    match = (
        r"NetworkModel predicts 'data'.*DenoisingLoss\(process, 'data', weighting='noise'\)"
    )
    with pytest.raises(ValueError, match=match):
        loss(model, loss.noised(jax.random.key(0), jnp.zeros((4, 2))))


def test_laws_that_cannot_precondition_are_refused(without_type_checks):
    shape, network = (4, 4, 1), lambda t, x: x
    law = gd.NormalData(jnp.zeros(shape), jnp.ones(shape))
    make = gd.nn.NetworkModel
    with pytest.raises(ValueError, match=r"NormalData\(mean, variances, basis=CosineBas"):
        make(gd.BDM(shape), network, data=law)
    with pytest.raises(ValueError, match="NormalData.mean, variances, basis"):
        make(gd.BDM(shape), network, data=gd.NormalData(jnp.zeros(shape), jnp.eye(16)))
    with pytest.raises(ValueError, match="`data_std` or `data`, not both"):
        make(gd.VP(shape), network, data_std=1.0, data=law)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\), but .* of shape \(16,\)"):
        make(gd.VP((16,)), network, data=law)
    with pytest.raises(ValueError, match="`data` must be a `NormalData.*; got 0.5"):
        make(gd.VP(shape), network, data=0.5)
