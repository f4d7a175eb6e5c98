"""The loss, the steps of training, and how they are divided over devices."""

import collections
import functools as ft
import math
import re

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import gddim_eqx as gd
from examples import data
from gddim_eqx.training import (
    Batches,
    DataWeighting,
    DenoisingLoss,
    fit,
    ImportanceTimes,
    NoisedBatch,
    StratifiedTimes,
    Trainer,
    UniformTimes,
)

from ..helpers import every_family, max_difference, processes


# What a model should predict for one data point, by dense linear algebra.


def _quantities(process, x, t, u):
    t0, t = jnp.asarray(0.0), jnp.asarray(t)
    dense = lambda operator: np.asarray(operator.as_matrix())
    join = lambda u: np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(u)])
    mean = dense(process.transition(t, t0)) @ join(process.encode(x))
    root = dense(process.factor(t))
    noise = np.linalg.solve(root, join(u) - mean)
    drift, diffusion = dense(process.drift(t)), dense(process.diffusion(t))
    return dict(
        noise=noise,
        data=join(process.encode(x)) / process.data_scale,
        score=-np.linalg.solve(root @ root.T, join(u) - mean),
        v=np.diag(dense(process.transition(t, t0))) * process.data_scale * noise
        - np.diag(root) * join(process.encode(x)) / process.data_scale,
        flow=(
            drift @ join(u) + 0.5 * diffusion @ diffusion.T @ np.linalg.solve(root.T, noise)
        )
        / float(process.flow_speed(t)),
        whitened=dense(process.diffusion(t)).T @ np.linalg.inv(root).T,
    )


def _batch_of_one(state):
    return jtu.tree_map(lambda x: x[None], state)


def _state(process, vector):
    parts = np.split(np.asarray(vector), process.num_components)
    parts = [jnp.asarray(part.reshape(process.shape)) for part in parts]
    return process.to_data(gd._linear.join_components(parts))


@pytest.mark.x64
@every_family
def test_loss_is_of_the_difference_to_what_should_be_predicted(name):
    process = processes[name]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, *process.shape)))
    targets = ["noise", "data", "score"]
    if process.num_components == 1:
        targets += ["v", "flow"]
    for k, predicts in enumerate(targets):
        loss = DenoisingLoss(process, predicts, times=UniformTimes(0.2))
        batch = loss.noised(jr.key(1), x)
        i = k % 3
        sample = jtu.tree_map(lambda leaf: leaf[i : i + 1], batch)
        right = _quantities(
            process, x[i], batch.t[i], jtu.tree_map(lambda y: y[i], batch.u)
        )
        size = len(right["noise"])
        model = lambda t, u, args, error=0.0: _batch_of_one(
            _state(process, right[predicts] + error)
        )
        assert float(loss(model, sample)[0]) < 1e-18
        error = np.linspace(-1, 2, size)
        got = loss(ft.partial(model, error=error), sample)[0]
        # The basis is orthonormal, so it does not matter for squares.
        np.testing.assert_allclose(got, np.mean(error**2), rtol=1e-9)


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "cld", "bdm"))
def test_weightings(name):
    process = processes[name]()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, *process.shape)))
    batch = DenoisingLoss(process, times=UniformTimes(0.2)).noised(jr.key(1), x)
    right = _quantities(process, x[0], batch.t[0], jtu.tree_map(lambda y: y[0], batch.u))
    noise = right["noise"] + rng.normal(size=right["noise"].shape)
    first = lambda tree: jtu.tree_map(lambda y: y[0], tree)

    def model(predicts):
        flow = gd.ProbabilityFlow(process, lambda t, u, args: u, predicts)
        state = process.from_data(_state(process, noise))
        prediction = flow.prediction(batch.t[0], first(batch.u), state)
        return lambda t, u, args: _batch_of_one(prediction)

    error = noise - right["noise"]
    expected = dict(
        noise=np.mean(error**2), likelihood=np.mean((right["whitened"] @ error) ** 2)
    )
    for weighting, value in expected.items():
        for predicts in ("noise", "data", "score"):
            loss = DenoisingLoss(process, predicts, weighting=weighting)
            got = loss(model(predicts), batch)
            np.testing.assert_allclose(got, [value], rtol=1e-7)
    loss = DenoisingLoss(process, weighting=lambda t: 3 * t)
    got = loss(model("noise"), batch)
    np.testing.assert_allclose(got, 3 * batch.t * expected["noise"], rtol=1e-7)


@pytest.mark.x64
def test_noise_in_the_frame_of_the_cholesky_factor():
    process = gd.CLD((2,))
    loss = DenoisingLoss(process, frame="cholesky", times=UniformTimes(0.2))
    x = jnp.asarray([[0.5, -1.0]])
    batch = loss.noised(jr.key(0), x)
    t, first = batch.t[0], lambda tree: jtu.tree_map(lambda y: y[0], tree)
    mean = process.transition(t, jnp.asarray(0.0)).mv(process.encode(x[0]))
    rest = jtu.tree_map(jnp.subtract, first(batch.u), mean)
    noise = process.cholesky(t).inverse().mv(rest)
    assert float(loss(lambda t, u, args: _batch_of_one(noise), batch)[0]) < 1e-18
    other = process.factor(t).inverse().mv(rest)
    assert float(loss(lambda t, u, args: _batch_of_one(other), batch)[0]) > 1e-2


@pytest.mark.x64
@hypothesis.settings(max_examples=8)
@hypothesis.given(
    density=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    seed=st.integers(0, 2**31 - 1),
)
def test_times_are_weighted_by_their_density(density, seed):
    times = ImportanceTimes(tuple(density))
    where, weights = times.fractions(jr.key(seed), 4096, jnp.float32)
    assert where.dtype == weights.dtype == jnp.float32
    assert float(where.min()) >= 0 and float(where.max()) <= 1
    for power in (0, 1, 2):
        mean = float((where**power * weights).mean())
        assert abs(mean - 1 / (power + 1)) < 5e-3
    counts, _ = np.histogram(where, len(density), (0, 1))
    np.testing.assert_allclose(counts / 4096, density / np.sum(density), atol=1e-3)


def test_stratified_times_are_one_in_each_interval():
    where, weights = StratifiedTimes().fractions(jr.key(0), 64, jnp.float32)
    np.testing.assert_array_equal(np.floor(np.asarray(where) * 64), np.arange(64))
    assert (weights == 1).all()
    where, _ = UniformTimes().fractions(jr.key(0), 4096, jnp.float32)
    assert abs(float(where.mean()) - 0.5) < 0.02
    assert abs(float(where.std()) - 12**-0.5) < 0.02


def test_times_lie_between_start_and_end():
    process = gd.VP((2,))
    for times, low, high in (
        (UniformTimes(), 1e-3, 1.0),
        (UniformTimes(1e-5), 1e-5, 1.0),
        (UniformTimes(0.3, 0.4), 0.3, 0.4),
        (StratifiedTimes(0.3, 0.4), 0.3, 0.4),
        (ImportanceTimes((1, 5), 0.3, 0.4), 0.3, 0.4),
    ):
        t = DenoisingLoss(process, times=times).noised(jr.key(0), jnp.zeros((512, 2))).t
        low, high = (np.asarray(x, t.dtype) for x in (low, high))
        assert low <= t.min() < low + 0.01 * (high - low) + 0.01
        assert high - 0.01 * (high - low) - 0.01 < t.max() <= high


_few = np.linspace(0.05, 0.6, 10)


@pytest.mark.precision
@pytest.mark.parametrize("times", (UniformTimes, StratifiedTimes, ImportanceTimes))
@pytest.mark.parametrize(
    "process",
    (
        gd.VP.from_betas((2,), _few),
        gd.VP.from_alphas_cumprod((2,), np.cumprod(1 - _few)),
        gd.process_from_config(
            dict(_class_name="DDPMScheduler", num_train_timesteps=10), (2,)
        ).process,
    ),
    ids=("betas", "alphas_cumprod", "config"),
)
def test_discrete_models_are_trained_at_times_that_have_an_index(process, times):
    times = times((3.0, 1.0)) if times is ImportanceTimes else times()
    loss = DenoisingLoss(process, times=times)
    t = loss.noised(jr.key(0), jnp.zeros((4096, 2))).t
    index = np.asarray(process.index(t))
    assert 0 <= index.min() < 0.02 and 8.98 < index.max() <= 9
    # Ten equal intervals of indices are equally frequent, or as the density has it.
    counts = np.histogram(index, 10, (0, 9))[0] / len(t)
    density = np.array([1.5] * 5 + [0.5] * 5) if isinstance(times, ImportanceTimes) else 1
    np.testing.assert_allclose(counts, density / 10, atol=0.02)


@pytest.mark.parametrize("name", ("vp", "cld"))
def test_models_are_called_as_in_sampling(name):
    process, seen = processes[name](), []

    def model(t, u, args):
        leaf = jtu.tree_leaves(u)[0]
        seen.append((jnp.ndim(t), leaf.ndim, leaf.shape[1:]))
        return u

    loss = DenoisingLoss(process)
    loss(model, loss.noised(jr.key(0), jnp.zeros((3, *process.shape))))
    u = process.prior(jr.key(0), (3,))
    gd.generate(gd.ProbabilityFlow(process, model), u, num_steps=1)
    assert set(seen) == {(0, 1 + len(process.shape), process.shape)}
    # A model of one sample alone is refused at once, not only in sampling.
    one = lambda t, u, args: jtu.tree_map(lambda x: x[0], u)
    with pytest.raises(
        ValueError, match="must return the structure and shape of its state"
    ):
        loss(one, loss.noised(jr.key(0), jnp.zeros((3, *process.shape))))
    two = lambda t, u, args: jnp.ones((2, 3)) @ jtu.tree_leaves(u)[0]
    with pytest.raises(TypeError) as error:
        loss(two, loss.noised(jr.key(0), jnp.zeros((3, *process.shape))))
    assert "The model was called" in error.value.__notes__[0]


# Steps


def _points():
    network = gd.nn.TimeMLP(2, width=32, key=jr.key(0))
    return gd.nn.NetworkModel(gd.VP((2,)), network)


_data = lambda number: jr.normal(jr.key(9), (number, 2), jnp.float32) * 0.3 + 1


def _train(trainer, model, steps, batch=16, put=lambda x: x):
    state, losses = trainer.init(model, jr.key(1)), []
    x = put(_data(batch))
    for _ in range(steps):
        state, info = trainer.step(state, x)
        losses.append(float(info.loss))
    return state, losses


@pytest.mark.float32
def test_training_finds_the_best_prediction():
    # For normal data the best prediction of noise is linear.
    process, std = gd.VP((2,)), 0.5
    trainer = Trainer(
        DenoisingLoss(process, times=StratifiedTimes()),
        optax.adam(3e-3),
        ema_decay=0.99,
        debias=True,
    )
    state = trainer.init(_points(), jr.key(1))
    for step in range(400):
        x = std * jr.normal(jr.key(step), (256, 2), jnp.float32)
        state, info = trainer.step(state, x)
    exact = gd.GaussianMixture(jnp.zeros((1, 2)), std).model(process)
    for t in (0.1, 0.3, 0.7):
        u, t = jr.normal(jr.key(3), (256, 2)), jnp.asarray(t)
        best, got = exact(t, u, None), state.averaged(t, u)
        assert float(jnp.sqrt(jnp.mean((best - got) ** 2))) < 0.15
    assert int(state.step) == 400 and bool(jnp.isfinite(info.gradient_norm))


@pytest.mark.float32
def test_a_step_is_that_of_optax():
    options = dict(ema_decay=0.75, debias=False)
    trainer = Trainer(DenoisingLoss(gd.VP((2,))), optax.sgd(0.1), **options)
    model, x = _points(), _data(8)
    state, info = trainer.step(trainer.init(model, jr.key(1)), x)
    loss_key = jr.split(jr.fold_in(jr.key(1), 0))[1]
    mean = lambda model: trainer.loss(model, trainer.loss.noised(loss_key, x)).mean()
    value, gradient = eqx.filter_value_and_grad(mean)(model)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)
    np.testing.assert_allclose(info.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)
    parameters = eqx.filter(model, eqx.is_inexact_array)
    expected = jtu.tree_map(lambda p, g: p - 0.1 * g, parameters, gradient)
    assert max_difference(eqx.filter(state.model, eqx.is_inexact_array), expected) < 1e-6
    ema = jtu.tree_map(lambda p, e: 0.75 * p + 0.25 * e, parameters, expected)
    assert max_difference(state.ema, ema) < 1e-6


@pytest.mark.float32
@pytest.mark.parametrize("debias", (False, True))
def test_average_is_the_weighted_mean_of_all_parameters(debias):
    decay, steps = 0.6, 4
    trainer = Trainer(
        DenoisingLoss(gd.VP((2,))), optax.sgd(0.5), ema_decay=decay, debias=debias
    )
    state = trainer.init(_points(), jr.key(1))
    weight = lambda state: np.asarray(state.model.network.first.weight)
    seen = [weight(state)]
    for _ in range(steps):
        state, _ = trainer.step(state, _data(8))
        seen.append(weight(state))
    weights = np.array([(1 - decay) * decay ** (steps - n) for n in range(steps + 1)])
    weights[0] = 0 if debias else decay**steps
    expected = np.tensordot(weights / weights.sum(), np.stack(seen), 1)
    np.testing.assert_allclose(state.ema.network.first.weight, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.float32
@pytest.mark.parametrize("kind", (gd.VP, gd.CLD))
def test_what_a_newcomer_writes_first_works(kind):
    process, x = kind((2,)), data.rings()
    network = gd.nn.presets.points(2 * process.num_components, key=jr.key(0))
    trainer = Trainer(DenoisingLoss(process))
    state = trainer.init(gd.nn.NetworkModel(process, network), jr.key(1))
    state = fit(trainer, state, Batches(x, 128), 3000, progress=False)

    def distance(model):
        samples = gd.sample(
            gd.ProbabilityFlow(process, model), jr.key(2), 2000, num_steps=30
        ).x
        return gd.metrics.sliced_wasserstein(np.asarray(samples), x[:2000])

    average, last = distance(state.averaged), distance(state.model)
    print(kind.__name__, average, last)
    assert average < 0.3 and average < 1.2 * last


# Precision


def _in_precision(model, dtype):
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(cast, model)


def _vector(tree):
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


@pytest.mark.float32
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize(
    "decay, debias", [(0.9999, False), (0.9999, True), (0.999999, True), (0.0, True)]
)
def test_the_average_is_that_of_double_precision(dtype, decay, debias):
    dtype = jnp.dtype(dtype)
    options = dict(ema_decay=decay, debias=debias)
    trainer = Trainer(DenoisingLoss(gd.VP((2,))), optax.adam(1e-2), **options)
    state = trainer.init(_in_precision(_points(), dtype), jr.key(1))
    expected = _vector(state.model)
    for n in range(100):
        state, info = trainer.step(state, _data(16))
        share = (1 - decay) / (1 - decay ** (n + 1) if debias else 1)
        expected += share * (_vector(state.model) - expected)
    assert np.isfinite(info.gradient_norm)
    np.testing.assert_allclose(_vector(state.ema), expected, rtol=1e-5, atol=1e-6)
    # Of the model's precision at the end, and all of it is held in at least single.
    averaged = eqx.filter(state.averaged, eqx.is_inexact_array)
    assert {x.dtype for x in jtu.tree_leaves(averaged)} == {dtype}
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(_vector(averaged), expected, rtol=rounding, atol=1e-6)
    kept = eqx.filter((state.ema, state.optimiser), eqx.is_inexact_array)
    assert {x.dtype for x in jtu.tree_leaves(kept)} == {jnp.dtype("float32")}


@pytest.mark.float32
def test_half_precision_does_not_swallow_small_steps():
    # Each is a fortieth of what bfloat16 can tell from 1.
    step = optax.stateless(
        lambda gradient, _: jtu.tree_map(lambda x: jnp.full_like(x, 1e-4), gradient)
    )
    trainer = Trainer(DenoisingLoss(gd.VP((2,))), step)
    model = jtu.tree_map(
        lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else x,
        _in_precision(_points(), jnp.bfloat16),
    )
    state = trainer.init(model, jr.key(1))
    for _ in range(200):
        state, _ = trainer.step(state, _data(4))
    assert _vector(state.model) == pytest.approx(1.02, abs=2**-8)


@pytest.mark.float32
def test_parts_of_a_batch_are_summed_in_single_precision():
    # An optimiser that only keeps the gradient.
    zeros = ft.partial(jtu.tree_map, jnp.zeros_like)
    keep = optax.GradientTransformation(zeros, lambda g, state, params: (zeros(g), g))
    rounded = _in_precision(_points(), jnp.bfloat16)

    def gradient(dtype, parts):
        trainer = Trainer(DenoisingLoss(gd.VP((2,))), keep, accumulate=parts)
        state = trainer.init(_in_precision(rounded, dtype), jr.key(1))
        state, _ = trainer.step(state, _data(512))
        return _vector(state.optimiser)

    expected, got = gradient(jnp.float32, 1), gradient(jnp.bfloat16, 256)
    # Summed in bfloat16 it is 2e-2.
    assert np.linalg.norm(got - expected) < 4e-3 * np.linalg.norm(expected)


@pytest.mark.float32
def test_the_default_optimiser_clips_and_warms_up():
    trainer, (parameters, gradient) = Trainer(DenoisingLoss(gd.VP((2,)))), jnp.eye(2)
    state = trainer.optimiser.init(parameters)
    for n in range(3):
        with jax.numpy_dtype_promotion("standard"):
            update, state = trainer.optimiser.update(100 * gradient, state, parameters)
        # Adam moves by the learning rate at first, whatever the gradient.
        np.testing.assert_allclose(update, -5e-4 * n / 100 * gradient, rtol=1e-4)
    np.testing.assert_allclose(state[1][0].mu, (1 - 0.9**3) * gradient, rtol=1e-5)


def test_former_names_are_said():
    with pytest.raises(ImportError, match="optax.chain.*warmup_constant_schedule"):
        from gddim_eqx.training import adam as _  # noqa: F401  # pyright: ignore
    with pytest.raises(ImportError, match="renamed: use `StepInfo`"):
        from gddim_eqx.training import Metrics as _  # noqa: F401  # pyright: ignore


@pytest.mark.float32
def test_parts_of_a_batch_give_the_same_gradient():
    # Not Adam, which enlarges rounding errors of small gradients.
    make = lambda n: Trainer(DenoisingLoss(gd.VP((2,))), optax.sgd(1e-1), accumulate=n)
    (one, first), (four, second) = (_train(make(n), _points(), 5) for n in (1, 4))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert max_difference(one.ema, four.ema) < 1e-6
    start = _train(make(1), _points(), 0)[0]
    assert max_difference(one.ema, start.ema) > 1e-3


class _Forgetful(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, t, u, args, *, key=None):
        dropout = eqx.nn.Dropout(0.5, inference=key is None)
        return dropout(jax.vmap(self.layer)(u.astype(self.layer.weight.dtype)), key=key)


@pytest.mark.float32
def test_dropout_and_noise_are_others_in_each_step():
    process, x = gd.VP((2,)), jnp.zeros((4, 2), jnp.float32)
    losses = []
    for dropout, seed in ((False, 0), (True, 0), (True, 1)):
        loss = DenoisingLoss(process, dropout=dropout)
        trainer = Trainer(loss, optax.sgd(0.0))
        state = trainer.init(_Forgetful(eqx.nn.Linear(2, 2, key=jr.key(0))), jr.key(seed))
        for _ in range(2):
            state, info = trainer.step(state, x)
            losses.append(float(info.loss))
    assert len(set(losses)) == 6


# Devices

_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")


def _network(features=8):
    process = gd.CLD((8, 8, 1))
    network = gd.nn.presets.small((8, 8, 2), key=jr.key(0), features=features)
    return gd.nn.NetworkModel(process, network)


def _sharded(number, shard_parameters=False, **options):
    placement = gd.Placement(jax.devices()[:number], shard_parameters)
    loss = DenoisingLoss(gd.VP((2,)), times=StratifiedTimes())
    return Trainer(loss, optax.adam(1e-2), placement=placement, **options)


@_eight
def test_the_same_losses_on_any_number_of_devices():
    plain = Trainer(DenoisingLoss(gd.VP((2,)), times=StratifiedTimes()), optax.adam(1e-2))
    _, expected = _train(plain, _points(), 10)
    for number, shard, parts in (
        (1, False, 1),
        (2, False, 1),
        (2, True, 1),
        (4, True, 1),
        (8, False, 2),
        (8, True, 1),
    ):
        trainer = _sharded(number, shard, accumulate=parts)
        put = lambda x: jax.device_put(x, trainer.placement.batch)
        state, losses = _train(trainer, _points(), 10, put=put)
        # Sums over the batch are in another order, and ten steps let that grow.
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        shardings = trainer.placement.of(eqx.filter(state, eqx.is_array))
        for leaf, sharding in zip(
            jtu.tree_leaves(eqx.filter(state, eqx.is_array)), jtu.tree_leaves(shardings)
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@_eight
def test_a_part_of_the_parameters_on_each_device():
    bytes_of = lambda state: sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jtu.tree_leaves((state.ema, state.optimiser))
    )
    whole, parts = (
        _sharded(8, shard).init(_points(), jr.key(0)) for shard in (False, True)
    )
    # All arrays but scalars and the output's bias divide by eight.
    assert bytes_of(parts) < 0.14 * bytes_of(whole)
    state, _ = _sharded(8, True).step(parts, _data(16))
    assert bytes_of(state) < 0.14 * bytes_of(whole)


def _collectives(trainer, model, x):
    """The kinds of communication in a step, and how many numbers each kind moves."""
    state = trainer.init(model, jr.key(0))
    x = jax.device_put(x, trainer.placement.batch)
    text = trainer.lower(state, x).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    moved = collections.Counter()
    for results, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", results):
            moved[name] += math.prod(int(n) for n in shape.split(",") if n)
    return moved


@_eight
@pytest.mark.x64
def test_sums_over_devices_and_no_gathered_batch():
    for model, x in ((_points(), _data(16)), (_network(), jnp.zeros((8, 8, 8, 1)))):
        process = model.process
        trainer = Trainer(DenoisingLoss(process), placement=gd.Placement())
        moved = _collectives(trainer, model, x)
        assert set(moved) == {"all-reduce"}
        # Each gradient is as large as its parameter, and the loss is one number.
        parameters = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
        assert moved["all-reduce"] <= sum(x.size for x in parameters) + 1


@_eight
def test_a_model_is_made_in_parts():
    process = gd.VP((2,))
    make = lambda: gd.nn.NetworkModel(
        process, gd.nn.TimeMLP((2,), width=64, depth=2, key=jr.key(1))
    )
    plain = Trainer(DenoisingLoss(process)).init(make(), jr.key(0))
    for shard in (False, True):
        placement = gd.Placement(shard_parameters=shard)
        trainer = Trainer(DenoisingLoss(process), placement=placement)
        state = trainer.init(make, jr.key(0))
        expected = placement.put(plain)
        assert jtu.tree_structure(state) == jtu.tree_structure(expected)
        for a, b in zip(*map(jtu.tree_leaves, (state, expected))):
            if eqx.is_array(a):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            if eqx.is_inexact_array(a):
                np.testing.assert_array_equal(a, b)
    # With the last placement, which divides parameters.
    init = lambda key: eqx.filter(trainer._init_compiled(make, key), eqx.is_array)
    used = jax.jit(init).lower(jr.key(0)).compile().memory_analysis()
    leaves = [x for x in jtu.tree_leaves(plain) if eqx.is_inexact_array(x)]
    total, largest = sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves)
    peak = used.output_size_in_bytes + used.temp_size_in_bytes
    assert peak < total / 8 + 2 * largest < total / 2
    with pytest.raises(ValueError, match="function without arguments.*which raised"):
        trainer.init(lambda t, u, args: u, jr.key(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Trainer(DenoisingLoss(gd.VP((2,))), ema_decay=1.0), "got 1.0"),
        (lambda: Trainer(DenoisingLoss(gd.VP((2,))), accumulate=0), "`accumulate` must be"),
        (lambda: DenoisingLoss(gd.VP((2,)), weighting="snr"), "`weighting` must be one"),
        (lambda: DenoisingLoss(gd.CLD((2,)), "v"), "predicts='v'"),
        (lambda: DenoisingLoss(gd.VP((2,)), times=0.5), "`times` must be a"),
        (lambda: DenoisingLoss(gd.VP((2,)), times=UniformTimes(0.5, 2.0)), "0 and 1.0"),
        (
            lambda: DenoisingLoss(gd.VP.from_betas((2,), _few), times=UniformTimes(1e-5)),
            "lie between 0.1 and 1.0, .*DiscreteVP; got 1e-05 to 1.0. Leave out `start`",
        ),
        (
            lambda: DenoisingLoss(gd.VP((2,))).noised(jr.key(0), jnp.ones((4, 2), int)),
            "must be real floating-point numbers; got int.*`Augmentation",
        ),
        (lambda: UniformTimes(0.0), "Need 0 < `start`"),
        (lambda: StratifiedTimes(0.5, 0.4), "Need 0 < `start`"),
        (lambda: ImportanceTimes((1.0, 0.0)), "`density` must hold positive"),
        (lambda: ImportanceTimes(()), "`density` must hold positive"),
        (
            lambda: _train(Trainer(DenoisingLoss(gd.VP((3,)))), _points(), 1),
            r"shape \(\*batch, 3\)",
        ),
        (
            lambda: _train(Trainer(DenoisingLoss(gd.VP((2,))), accumulate=3), _points(), 1),
            "A batch of 16 cannot be divided into `accumulate=3`",
        ),
        (
            lambda: gd.Placement(jax.devices()[:2]).check_batch(5),
            "A batch of 5 cannot be divided over 2 devices. Use 4",
        ),
    ],
)
def test_bad_input_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()


def _laws(process):
    """Arguments of preconditioned networks."""
    mean = jnp.asarray(np.random.default_rng(3).normal(size=process.shape))
    variances = 0.1 + mean**2
    yield dict(data_std=0.7)
    yield dict(data=gd.NormalData(mean, variances, basis=process.basis))


@pytest.mark.x64
@every_family
def test_outputs_of_preconditioned_networks_count_equally(name):
    process, rng = processes[name](), np.random.default_rng(0)
    x, output, change = (jnp.asarray(rng.normal(size=process.shape)) for _ in range(3))
    for law in _laws(process):
        weighting = DataWeighting(process, **law)
        loss = DenoisingLoss(process, "data", weighting=weighting)

        def of_output(output, t):
            u, noise = process.perturb(jr.key(1), x, t)
            one = jtu.tree_map(lambda y: y[None], (x, t, u, noise))
            batch = NoisedBatch(*one, jnp.ones(1), None)
            model = gd.nn.NetworkModel(process, lambda t, x: output, **law)
            return loss(model, batch)[0]

        def of_change(size, t):
            return of_output(output + size * change, t)

        for t in (process.t_min, 0.3, process.t_max):
            t = jnp.asarray(t)
            # A square of what is put out, whatever the target is; and 0 at the target.
            slope = jax.grad(of_output)(output, t)
            error = 0.5 * x.size * slope
            np.testing.assert_allclose(of_output(output, t), (error**2).mean(), rtol=1e-6)
            assert of_output(output - error, t) < 1e-9
            curvature = jax.grad(jax.grad(of_change))(jnp.asarray(0.0), t)
            np.testing.assert_allclose(curvature, 2 * (change**2).mean(), rtol=1e-6)


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "cld", "ve", "rectified"))
def test_errors_of_data_count_as_those_of_the_noise_that_follows(name):
    process, std = processes[name](), 0.7
    output = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    model = gd.nn.NetworkModel(process, lambda t, x: output, data_std=std)
    flow = gd.ProbabilityFlow(process, model, "data")
    in_basis = lambda t, u, args: flow.noise(t, u, args)
    as_noise = lambda t, u, args: process.to_data(in_basis(t, process.from_data(u), args))
    weighting = DataWeighting(process, std)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, *process.shape)))
    data, noise = (
        DenoisingLoss(process, p, weighting=weighting) for p in ("data", "noise")
    )
    batch = data.noised(jr.key(0), x)
    got = data(model, batch)
    np.testing.assert_allclose(noise(as_noise, batch), got, rtol=1e-6)
    # The number that multiplies the squared error of the noise, written out.
    plain = DenoisingLoss(process)(as_noise, batch)
    for t, one, weighted in zip(batch.t, plain, got):
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        share = np.linalg.solve(process.factor(t).blocks, signal.blocks[:, 0])
        factor = process.num_components * (1 + 1 / (std**2 * (share**2).sum()))
        np.testing.assert_allclose(weighted, factor * one, rtol=1e-6)


def test_bad_weightings_of_data_are_refused(without_type_checks):
    process = gd.VP((2,))
    law = gd.NormalData(jnp.zeros(2), jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="`data_std` must be positive"):
        DataWeighting(process, 0.0)
    with pytest.raises(ValueError, match="`data` must have a positive variance in every"):
        DataWeighting(process, data=law)
    weighting = DataWeighting(process, 1.0)
    with pytest.raises(ValueError, match="is for predictions of 'data', .*got .*'v'"):
        DenoisingLoss(process, "v", weighting=weighting)
    with pytest.raises(ValueError, match=r"is for VP.*, but the loss is for VE"):
        DenoisingLoss(gd.VE((2,)), "data", weighting=weighting)
    other = DataWeighting(process, data=gd.NormalData(jnp.zeros(2), jnp.ones(2)))
    with pytest.raises(ValueError, match="is for predictions of 'data', .*got .*'noise'"):
        DenoisingLoss(process, weighting=other)
