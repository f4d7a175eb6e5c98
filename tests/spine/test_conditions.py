"""Conditional models from the data to the samples."""

import pathlib
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import gddim_eqx as gd
from gddim_eqx.training import (
    Augmentation,
    Batches,
    Checkpoints,
    DenoisingLoss,
    fit,
    Trainer,
)

from ..helpers import max_difference, prior_state, slow


_rng = np.random.default_rng(0)
_points = _rng.normal(size=(20, 2)).astype(np.float32)
_labels = np.arange(20) % 3


# Data


class _Source:
    """Samples that are read one by one, as from files."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        assert type(index) is int
        return tuple(array[index] for array in self.arrays)


@pytest.mark.parametrize("devices", [None, 1, 4])
def test_all_leaves_of_a_batch_are_of_the_same_samples(devices, tmp_path):
    placement = None if devices is None else gd.Placement(jax.devices()[:devices])
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (20, 2))
    mapped[:] = _points
    condition = {"label": _labels, "context": _points[:, :1]}
    plain = Batches(_points, 8, seed=3, placement=placement)
    for data in (
        (_points, condition),
        (mapped, condition),
        _Source(_points, _labels),
        (_points, _Source(_labels)),
    ):
        batches = Batches(data, 8, seed=3, placement=placement)
        stream = batches.iterate_from(1, ahead=3)
        for n in (1, 2, 3, 4):
            x, c = next(stream)
            np.testing.assert_array_equal(x, plain[n])
            order = plain.indices(n)
            label = jtu.tree_leaves(c)[-1]
            np.testing.assert_array_equal(label, _labels[order])
        stream.close()
        if placement is not None:
            assert label.sharding == placement.batch


def test_data_that_change_their_length_are_refused():
    labels = list(_labels)
    batches = Batches((_points, _Source(labels)), 8)
    batches[0]
    labels.pop()
    with pytest.raises(ValueError, match=r"had 20 samples .*now have \[20, 19\]"):
        next(batches.iterate_from(1))


def test_images_are_prepared_and_conditions_kept():
    images = np.array([[0, 255], [51, 102]], np.uint8)
    x, c = Augmentation()(jr.key(0), (jnp.asarray(images), jnp.array([3, 7])))
    np.testing.assert_allclose(x, images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(c, [3, 7])


# The loss


def test_every_sample_is_seen_with_its_own_condition():
    process = gd.VP((2,))
    x = jnp.asarray(_points)
    model = lambda t, u, args: args["x"]
    loss = DenoisingLoss(process, "data")
    batch = loss.noised(jr.key(0), x, {"x": x})
    assert float(jnp.abs(loss(model, batch)).max()) < 1e-12
    batch = loss.noised(jr.key(0), x, {"x": jnp.roll(x, 1, 0)})
    expected = ((x - jnp.roll(x, 1, 0)) ** 2).mean(-1)
    np.testing.assert_allclose(loss(model, batch), expected, rtol=1e-5)


def test_conditions_are_dropped_at_random():
    process, number = gd.VP((1,)), 4000
    x, labels = jnp.zeros((number, 1)), jnp.arange(number) % 10
    condition = (labels, jnp.ones((number, 2)))
    none = (10, jnp.full(2, jnp.inf))
    for rate in (0.0, 0.2, 1.0):
        loss = DenoisingLoss(process, condition_dropout=rate, no_condition=none)
        label, context = loss.noised(jr.key(0), x, condition).condition
        dropped = label == 10
        np.testing.assert_array_equal(label, np.where(dropped, 10, labels))
        # All of the condition of a sample.
        np.testing.assert_array_equal(dropped, jnp.isinf(context).all(-1))
        np.testing.assert_array_equal(~dropped, (context == 1).all(-1))
        error = np.sqrt(rate * (1 - rate) / number)
        assert abs(float(dropped.mean()) - rate) <= 4 * error
    # Noise and times are those of a loss without.
    plain = DenoisingLoss(process).noised(jr.key(0), x)
    assert max_difference(plain.u, loss.noised(jr.key(0), x, condition).u) == 0


# Training


def _conditional(size=2, **options):
    network = gd.nn.TimeMLP(size, width=16, depth=1, key=jr.key(0), **options)
    return gd.nn.NetworkModel(gd.VP((size,)), network, data_std=1.0)


def _trainer(placement=None):
    model = _conditional(num_classes=3)
    loss = DenoisingLoss(
        model.process,
        "data",
        weighting="noise",
        condition_dropout=0.2,
        no_condition=model.network.no_condition,
    )
    trainer = Trainer(loss, optax.adam(1e-2), ema_decay=0.9, placement=placement)
    return trainer, trainer.init(model, jr.key(1))


def _fit(number, placement=None, **options):
    batches = Batches((_points, _labels), 8, placement=placement)
    return fit(*_trainer(placement), batches, number, progress=False, **options)


def _arrays(state):
    return [np.asarray(x) for x in jtu.tree_leaves(eqx.filter(state.ema, eqx.is_array))]


@pytest.mark.float32
def test_an_interrupted_run_with_conditions_comes_to_the_same(tmp_path):
    whole = _arrays(_fit(6))
    with Checkpoints(tmp_path, {}) as checkpoints:
        _fit(4, checkpoints=checkpoints)
    with Checkpoints(tmp_path, {}) as checkpoints:
        resumed = _arrays(_fit(6, checkpoints=checkpoints))
    for a, b in zip(whole, resumed):
        np.testing.assert_array_equal(a, b)
    for number in (1, 2, 8):
        on_devices = _arrays(_fit(6, gd.Placement(jax.devices()[:number])))
        for a, b in zip(whole, on_devices):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.float32
def test_a_linear_measurement_has_the_posterior_in_closed_form():
    # x is standard normal, and y = x + n with variance 1 / 4.
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20_000, 1)).astype(np.float32)
    y = (x + 0.5 * rng.normal(size=x.shape)).astype(np.float32)
    process = gd.VP((1,))
    network = gd.nn.TimeMLP(1, width=64, key=jr.key(0), context_size=1)
    model = gd.nn.NetworkModel(process, network, data_std=1.0)
    loss = DenoisingLoss(
        process,
        "data",
        weighting="noise",
        condition_dropout=0.2,
        no_condition=network.no_condition,
    )
    trainer = Trainer(loss, optax.adam(optax.cosine_decay_schedule(2e-3, 1500)))
    state = trainer.init(model, jr.key(1))
    trained = fit(trainer, state, Batches((x, y), 256), 1500, progress=False).averaged
    for value in (-1.0, 0.5, 2.0):
        context = jnp.full((4000, 1), value)
        flow = gd.ProbabilityFlow(process, trained)
        samples = gd.sample(flow, jr.key(2), 4000, 20, args=context).x
        assert abs(float(samples.mean()) - 0.8 * value) < 0.08
        np.testing.assert_allclose(samples.var(), 0.2, rtol=0.15)
    alone = gd.with_args(flow, network.no_condition)
    samples = gd.sample(alone, jr.key(3), 4000, 20).x
    assert abs(float(samples.mean())) < 0.08
    np.testing.assert_allclose(samples.var(), 1.0, rtol=0.15)


# Networks


def _dit(shape, **options):
    network = gd.nn.DiT(shape, patch=2, width=16, depth=1, num_heads=2, **options)
    # It starts as the zero function of any condition.
    weight = lambda n: n.blocks.modulation.weight
    return eqx.tree_at(weight, network, jnp.ones_like(weight(network)))


@pytest.mark.parametrize(
    "make, kind",
    [
        *(("points", "context"), ("small", "label")),
        *slow(
            ("dit", "context"), ("points", "label"), ("small", "context"), ("mlp", "label")
        ),
    ],
)
def test_networks_take_conditions(make, kind, tmp_path):
    options = dict(num_classes=3) if kind == "label" else dict(context_size=2)
    shape = 2 if make == "points" else (8, 8, 1)
    function = _dit if make == "dit" else getattr(gd.nn.presets, make)
    network = function(shape, key=jr.key(0), **options)
    if make in ("small", "dit"):
        # It starts as the zero function.
        weight = lambda n: n.last.weight
        network = eqx.tree_at(weight, network, jnp.ones_like(weight(network)))
    larger = jtu.tree_map(lambda x: 30 * x if eqx.is_array(x) else x, network.condition)
    network = eqx.tree_at(lambda n: n.condition, network, larger)
    process = gd.VP((2,) if make == "points" else shape)
    model = gd.nn.NetworkModel(process, network)
    u = prior_state(process, (2, 2))
    given = (
        jnp.arange(4).reshape(2, 2) if kind == "label" else jr.normal(jr.key(1), (2, 2, 2))
    )
    call = eqx.filter_jit(lambda model, u, c: model(0.5, u, c))
    y = call(model, u, given)
    for i, j in ((0, 0), (1, 0)):
        alone = call(model, u[i, j], given[i, j])
        np.testing.assert_allclose(y[i, j], alone, rtol=2e-5, atol=2e-5)
    none = jnp.broadcast_to(network.no_condition, given.shape)
    without = call(model, u, none)
    assert jnp.isfinite(without).all() and max_difference(without, y) > 1e-4
    alone = gd.with_args(gd.ProbabilityFlow(process, model), network.no_condition)
    np.testing.assert_allclose(call(alone.model, u, None), without)
    total = lambda model: call(model, u, none).sum()
    gradient = eqx.filter_jit(eqx.filter_grad(total))(model)
    assert all(jnp.isfinite(x).all() for x in jtu.tree_leaves(gradient))
    if make == "points":
        gd.checkpoints.save(tmp_path / "model.npz", model)
        loaded = gd.checkpoints.load(tmp_path / "model.npz")
        np.testing.assert_array_equal(call(loaded, u, given), y)
    # What is not a condition is initialised as without one.
    plain = function(shape, key=jr.key(0))
    np.testing.assert_array_equal(plain.first.weight, network.first.weight)
    assert plain.no_condition is None


# Guidance


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", "cld", "bdm"])
def test_guidance_between_the_exact_models_of_a_mixture(name):
    process = {"vp": gd.VP((4, 4, 1)), "cld": gd.CLD((4, 4, 1)), "bdm": gd.BDM((4, 4, 1))}
    process = process[name]
    means = _rng.normal(size=(3, 4, 4, 1))
    whole = gd.GaussianMixture(means, 0.3)
    parts = [gd.GaussianMixture(m[None], 0.3).model(process) for m in means]
    every = lambda t, u: jtu.tree_map(
        lambda *x: jnp.stack(x), *(part(t, u, None) for part in parts)
    )

    def model(t, u, args):
        each = jnp.arange(args.size)
        return jtu.tree_map(lambda x: x[args, each], every(t, u))

    flows = [gd.ProbabilityFlow(process, m) for m in (model, whole.model(process))]
    at = lambda scale, **options: (
        gd.classifier_free_guidance(*flows, scale, **options).model
    )
    labels, u = jnp.array([0, 1, 2, 1]), prior_state(process, (4,))
    t = 0.3 * process.t_max
    assert max_difference(at(1.0)(t, u, labels), model(t, u, labels)) < 1e-12
    assert max_difference(at(0.0)(t, u, labels), whole.model(process)(t, u, None)) < 1e-12
    # One scale per sample.
    several = at(jnp.array([0.0, 1.0, 2.0, 3.0]))(t, u, labels)
    for i, scale in enumerate((0.0, 1.0, 2.0, 3.0)):
        alone = at(scale)(t, u, labels)
        pick = lambda x: x[i]
        got, expected = jtu.tree_map(pick, several), jtu.tree_map(pick, alone)
        assert max_difference(got, expected) < 1e-12
    # Whatever the models predict, it is the same guidance of the score.
    flow = gd.ProbabilityFlow(process, at(3.0))
    scores = [
        gd.ProbabilityFlow(process, m).score(t, process.from_data(u), labels)
        for m in (model, lambda t, u, args: whole.model(process)(t, u, None))
    ]
    expected = jtu.tree_map(lambda a, b: b + 3 * (a - b), *scores)
    assert max_difference(flow.score(t, process.from_data(u), labels), expected) < 1e-8
    early = at(3.0, interval=(0.2, 0.4))
    assert max_difference(early(t, u, labels), at(3.0)(t, u, labels)) == 0
    assert max_difference(early(0.5, u, labels), model(0.5, u, labels)) < 1e-12


def test_rescaled_guidance_has_the_spread_of_the_conditional_model():
    model = _conditional(num_classes=3)
    flow = gd.ProbabilityFlow(model.process, model)
    without = gd.with_args(flow, model.network.no_condition)
    u, labels = prior_state(model.process, (4,)), jnp.array([0, 1, 2, 0])
    guide = lambda rescale: (
        gd.classifier_free_guidance(flow, without, 40.0, rescale=rescale).model
    )
    given = model(0.5, u, labels)
    whole, half = guide(1.0)(0.5, u, labels), guide(0.5)(0.5, u, labels)
    plain = guide(0.0)(0.5, u, labels)
    np.testing.assert_allclose(whole.std(-1), given.std(-1), rtol=1e-4)
    np.testing.assert_allclose(half, 0.5 * (whole + plain), rtol=1e-5, atol=1e-6)


@pytest.mark.x64
def test_bounds_of_the_likelihood_given_conditions():
    process, means = gd.CLD((1,)), jnp.array([-1.0, 2.0])
    parts = [gd.GaussianMixture(m[None, None], 0.5).model(process) for m in means]

    def model(t, u, args):
        one, other = (part(t, u, None) for part in parts)
        return jtu.tree_map(lambda a, b: jnp.where(args[..., None] == 0, a, b), one, other)

    x, labels = jnp.array([[-1.2], [1.5], [0.3]]), jnp.array([0, 1, 0])
    bound = lambda model, **options: (
        gd.log_likelihood_bound(
            gd.ProbabilityFlow(process, model), x, jr.key(0), num_draws=2, **options
        ).value
    )
    got, alone = bound(model, args=labels), jnp.stack([bound(part) for part in parts])
    # The same draws, but other adaptive steps.
    np.testing.assert_allclose(got, alone[labels, jnp.arange(3)], atol=1e-3)


def test_samples_with_conditions_are_the_same_on_all_devices():
    model = _conditional(num_classes=3)
    labels = np.arange(8) % 3
    draw = lambda **options: (
        gd.sample(
            gd.ProbabilityFlow(model.process, model, "data"),
            *(jr.key(0), 8, 4),
            args=labels,
            **options,
        ).x
    )
    np.testing.assert_allclose(draw(placement=gd.Placement()), draw(), atol=1e-5)


_example = str(pathlib.Path(__file__).parents[2] / "examples" / "posterior.py")


def test_what_the_example_calls_the_exact_posterior():
    example = runpy.run_path(_example)
    random = np.random.default_rng(0)
    parameters = random.uniform(-1, 1, (400_000, 2))
    close = np.abs(example["simulate"](random, parameters)).max(-1) < 0.02
    accepted, exact = parameters[close], example["exact_posterior"](random, (0, 0), 4000)
    assert len(accepted) > 100
    for power in (1, 2, 4):
        means = [(x**power).mean(0) for x in (accepted, exact)]
        error = 4 * (accepted**power).std() / np.sqrt(len(accepted))
        np.testing.assert_allclose(*means, rtol=0.02, atol=error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(as_users_have_it, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", [_example, "--quick", "--output", str(tmp_path)])
    runpy.run_path(_example, run_name="__main__")
    assert "| GDDIM() | 20 |" in capsys.readouterr().out
    assert (tmp_path / "posterior.png").exists()


# Errors


@pytest.mark.parametrize(
    "case, message",
    [
        (
            lambda m: m["label"](0.5, m["u"], jnp.zeros(3, int)),
            r"one entry per sample.*\(4, ",
        ),
        (lambda m: m["label"](0.5, m["u"]), "This network needs a condition"),
        (lambda m: m["none"](0.5, m["u"], jnp.zeros(4, int)), "takes no condition"),
        (
            lambda m: m["lambda"](0.5, m["u"], jnp.zeros(4, int)),
            "`network.t, x, condition.",
        ),
        (lambda m: m["label"](0.5, m["u"], jnp.zeros(4)), "one integer label per sample"),
        (lambda m: m["context"](0.5, m["u"], jnp.zeros((4, 3))), "a vector of size 2"),
        (lambda m: m["draw"]("label", np.array([0, 1, 2, 4])), "from 0 to 3.*got 4"),
        (lambda m: m["draw"]("label", np.array([0, 1, -1, 2])), "from 0 to 3.*got -1"),
        (lambda m: m["draw"]("context", np.full((4, 2), np.nan)), "holds NaN"),
        (lambda m: m["draw"]("label", [0, 1, 2, 0]), "Pass an array in place of a list"),
        (lambda m: m["draw"]("label", ["boot"] * 4), "arrays of numbers; got 'boot'"),
        (lambda m: m["fit"]((_points, _labels + 2)), "from 0 to 3.*got 4"),
        (lambda m: m["fit"]({"x": _points}), "a pair .* got a dict"),
        (lambda m: m["fit"]([_points, _labels]), "pass a tuple"),
        (
            lambda m: Batches((_points, _labels[:5]), 4),
            r"equally long; got lengths \[20, 5",
        ),
        (lambda m: m["fit"]((_points, np.full(20, np.nan))), "condition `args` holds NaN"),
        (lambda m: Batches((_points, "abc"), 4), "equally long"),
        (lambda m: Batches((_points, 3), 4), "must hold samples.*got 3"),
        (lambda m: Batches((_points, np.array(3)), 4), "must hold samples.*got array.3"),
        (lambda m: m["loss"](0.1, None), "pass `no_condition`"),
        (lambda m: m["loss"](1.5, 3), r"in \[0, 1\]; got 1.5"),
        (
            lambda m: DenoisingLoss(gd.VP((2,))).noised(
                jr.key(0), jnp.asarray(_points), jnp.zeros(3)
            ),
            "one entry per sample",
        ),
        (
            lambda m: m["loss"](0.1, (3, 4)).noised(
                jr.key(0), jnp.asarray(_points), jnp.asarray(_labels)
            ),
            "`no_condition` must have the structure",
        ),
        (
            lambda m: m["loss"](0.1, jnp.full(2, jnp.inf)).noised(
                jr.key(0), jnp.ones((4, 2)), jnp.ones((4, 2), jnp.uint8)
            ),
            "uint8, which cannot hold `no_condition`",
        ),
        (lambda m: gd.with_args(m["flow"]("label"), 7), "from 0 to 3.*got 7"),
        (lambda m: Augmentation()(jr.key(0), (m["u"],) * 3), "a tuple of 3"),
        (
            lambda m: gd.classifier_free_guidance(m["flow"]("label"), interval=(1, 0)),
            "the earlier first",
        ),
        (
            lambda m: gd.classifier_free_guidance(m["flow"]("label"), rescale=1.5),
            r"`rescale` must be in \[0, 1\]; got 1.5",
        ),
        (
            lambda m: gd.classifier_free_guidance(m["flow"]("none")),
            "Pass the `unconditional` flow",
        ),
        (
            lambda m: gd.classifier_free_guidance(m["flow"]("label"), m["flow"]("lambda")),
            "`unconditional` must predict the same, under the same process",
        ),
        (
            lambda m: gd.nn.TimeMLP(2, key=jr.key(0), num_classes=2, context_size=1),
            "not both",
        ),
        (lambda m: gd.nn.TimeMLP(2, key=jr.key(0), num_classes=0), "positive integer"),
    ],
)
def test_bad_conditions(case, message, without_type_checks):
    process = gd.VP((2,))
    models = {
        "label": _conditional(num_classes=3),
        "context": _conditional(context_size=2),
        "none": _conditional(),
        "lambda": gd.nn.NetworkModel(process, lambda t, x: x),
        "u": jnp.ones((4, 2)),
        "loss": lambda rate, none: DenoisingLoss(
            process, condition_dropout=rate, no_condition=none
        ),
    }
    models["fit"] = lambda data: fit(*_trainer(), Batches(data, 4), 2, progress=False)
    models["flow"] = lambda name: gd.ProbabilityFlow(process, models[name])
    models["draw"] = lambda name, args: gd.sample(
        models["flow"](name), jr.key(0), 4, 2, args=args
    )
    with pytest.raises(ValueError, match=message):
        case(models)


@pytest.mark.float32
def test_labels_of_no_class_are_told():
    with pytest.warns(UserWarning, match="are 3, which stands for no class"):
        fit(*_trainer(), Batches((_points, _labels + 1), 20), 1, progress=False)
    # A batch that is not the first.
    labels = np.where(np.arange(20) == Batches(_points, 4).indices(2)[0], 7, _labels)
    with pytest.raises(ValueError, match="from 0 to 3.*got 7"):
        fit(*_trainer(), Batches((_points, labels), 4), 5, progress=False)


def test_labels_of_every_integer_dtype():
    model = gd.nn.NetworkModel(
        gd.VP((2,)), gd.nn.TimeMLP(2, width=8, depth=1, key=jr.key(0), num_classes=200)
    )
    u, labels = jnp.ones((2, 2)), np.array([1, 100])
    expected = model(0.5, u, jnp.asarray(labels))
    for dtype in (np.int8, np.uint8, np.int16, np.uint32):
        np.testing.assert_array_equal(model(0.5, u, labels.astype(dtype)), expected)


@pytest.mark.x64
@pytest.mark.parametrize("make, t", [(gd.VP, 0.4), (gd.CLD, 0.1)])
def test_image_to_image(make, t):
    # For normal data the flow is linear. (That of CLD also turns: at time 0.3, correlations
    # are negative.)
    process, std = make((1,)), 0.5
    model = gd.GaussianMixture(jnp.array([[0.3]]), std).model(process)
    x = 0.3 + std * jr.normal(jr.key(0), (4000, 1))
    u, _ = process.perturb(jr.key(1), x, t)
    ts = gd.time_grid(process, 40, t0=t)
    y = gd.generate(gd.ProbabilityFlow(process, model), u, ts=ts)
    np.testing.assert_allclose((y.mean(), y.std()), (0.3, std), atol=0.02)
    correlation = np.corrcoef(x[:, 0], y[:, 0])[0, 1]
    assert 0.2 < correlation < 0.7
    if make is gd.VP:
        signal = std * process.transition(t, 0.0).blocks[0, 0]
        noise = process.factor(t).blocks[0, 0]
        expected = signal / (signal**2 + noise**2) ** 0.5
        np.testing.assert_allclose(correlation, expected, atol=0.02)


def test_labels_out_of_range_give_nan_under_jit():
    model = _conditional(num_classes=3)
    y = jax.jit(lambda c: model(0.5, jnp.ones((4, 2)), c))(jnp.array([0, 3, 4, -1]))
    np.testing.assert_array_equal(jnp.isnan(y).all(-1), [False, False, True, True])
