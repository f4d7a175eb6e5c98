"""The authors' checkpoints, and our own files."""

import collections
import functools
import json
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jaxtyping import PyTree

import gddim_eqx as gd
from examples import authors_config

from .. import helpers
from ..helpers import slow
from ..ncsnpp_oracle import authors_network, config, Oracle, write_checkpoint


_fixture = pathlib.Path(__file__).parents[1] / "fixtures" / "ncsnpp_fourier_fir"


def test_a_checkpoint_of_the_authors_gives_their_predictions():
    # Random parameters; inputs and outputs were computed by the authors' network.
    settings = json.loads((_fixture / "config.json").read_text())
    network = authors_config.network(settings, 6, 32)
    network = gd.checkpoints.load_authors(_fixture / "checkpoint_7", network)
    with np.load(_fixture / "io.npz") as arrays:
        u, times, eps = (jnp.asarray(arrays[name]) for name in ("u", "t", "eps"))
    model = gd.nn.NetworkModel(gd.CLD((32, 32, 3)), network)
    run = eqx.filter_jit(lambda t, u: model(t, u))
    for i, t in enumerate(times):
        got = run(t, gd.Phase(u[i, ..., 0], u[i, ..., 1]))
        difference = jnp.stack([got.x, got.v], -1) - eps[i]
        assert jnp.linalg.norm(difference) < 2e-6 * jnp.linalg.norm(eps[i])
        assert float(jnp.abs(difference).max()) < 2e-5 * float(jnp.abs(eps[i]).max())


@pytest.fixture(scope="module")
def oracle():
    oracle = Oracle(config)
    oracle(0.5, np.zeros((16, 16, 2)))
    return oracle


@pytest.mark.x64
def test_the_size_of_images_is_in_a_whole_configuration():
    whole = dict(model=config, data=dict(image_size=16, centered=True), seed=42)
    assert authors_config.network(whole, 2).shape == (16, 16, 2)
    with pytest.raises(ValueError, match=r"lacks the entries \['image_size'\].*`size`"):
        authors_config.network(config, 2)


@pytest.mark.x64
def test_configurations_as_the_authors_write_them():
    # Capitals, and entries that are of the process.
    blur = dict(resblock_type="BigGAN", embedding_type="Fourier", sigma_blur_max=10.0)
    cld = dict(m_inv=4.0, beta_0=4.0, vv_gamma=0.04, is_R_rk=True, name="ncsnpp")
    network = lambda config: authors_config.network(config, 2, (16, 16))
    for entries in (blur, cld):
        assert eqx.tree_equal(network(config | entries), network(config))


@pytest.mark.x64
def test_what_is_no_network_is_refused(tmp_path, oracle, without_type_checks):
    write_checkpoint(tmp_path / "checkpoint", oracle.parameters)
    for other in ("cifar10_cld", config, functools.partial(gd.nn.presets.points, 2)):
        with pytest.raises(ValueError, match="`network` must be .*authors_config.*got "):
            gd.checkpoints.load_authors(tmp_path / "checkpoint", other)
    for name, value in (("config", config), ("size", 16)):
        with pytest.raises(ValueError, match=f"`{name}` was renamed"):
            gd.checkpoints.load_authors(tmp_path / "checkpoint", **{name: value})
    shifting = dict(model=config, data=dict(centered=False, image_size=16))
    with pytest.raises(ValueError, match="centered=False; only True"):
        authors_config.network(shifting, 2)


def _changed(parameters, **changes):
    changed = dict(parameters)
    for name, value in changes.items():
        if value is None:
            del changed[name]
        else:
            changed[name] = value
    return changed


@pytest.mark.x64
@pytest.mark.parametrize(
    "change, message",
    [
        ({"Dense_1/bias": None}, r"'Dense_1/bias' is missing, .* float32 of shape \(32,\)"),
        (
            {"Dense_2/bias": np.zeros(3, "f4")},
            r"'Dense_2/bias' is float32 of shape \(3,\), .* none",
        ),
        (
            {"Conv_1/kernel": np.zeros((3, 3, 8, 3), "f4")},
            r"'Conv_1/kernel' is float32 of shape \(3, 3, 8, 3\).*\(3, 3, 8, 2\)",
        ),
        ({"Conv_1/bias": np.zeros(2, "i4")}, "'Conv_1/bias' is int32"),
        ({"Conv_0/kernel": None}, "'Conv_0/kernel' is missing"),
        ({"AttnBlockpp_0/NIN_2/W": None}, "'AttnBlockpp_0/NIN_2/W' is missing"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, oracle, change, message):
    path = tmp_path / "checkpoint_3"
    write_checkpoint(path, _changed(oracle.parameters, **change))
    for size in (16, (16, 16)):
        with pytest.raises(ValueError, match=message) as error:
            gd.checkpoints.load_authors(path, authors_config.network(config, 2, size))
        assert str(path) in str(error.value)


@pytest.mark.x64
def test_broken_files_are_refused(tmp_path, oracle):
    path, network = tmp_path / "checkpoint", authors_config.network(config, 2, 16)
    write_checkpoint(path, oracle.parameters)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="checkpoint is not a complete checkpoint"):
            gd.checkpoints.load_authors(path, network)
    for text in (b"not a checkpoint", b"\x93\x01\x02\x03", whole + b"more"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="checkpoint "):
            gd.checkpoints.load_authors(path, network)
    write_checkpoint(path, oracle.parameters, params_ema=None)
    with pytest.raises(ValueError, match="no averaged parameters.*'rng', 'step'"):
        gd.checkpoints.load_authors(path, network)


@pytest.mark.x64
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"progressive": "output_skip"}, "progressive='output_skip'; only 'none'"),
        ({"nonlinearity": "relu"}, "nonlinearity='relu'; only 'swish'"),
        ({"depth": 3}, r"unknown entries: \['depth'\]"),
        ({"num_res_blocks": 2}, "of another network than `network`"),
        ({"ch_mult": [1, 2, 2]}, "of another network than `network`"),
        ({"resblock_type": "ddpm"}, "of another network than `network`"),
        ({"embedding_type": "positional"}, "of another network than `network`"),
    ],
)
def test_another_architecture_is_refused(tmp_path, oracle, changes, message):
    write_checkpoint(tmp_path / "checkpoint", oracle.parameters)
    with pytest.raises(ValueError, match=message):
        network = authors_config.network(config | changes, 2, 16)
        gd.checkpoints.load_authors(tmp_path / "checkpoint", network)
    lacking = {key: value for key, value in config.items() if key != "nf"}
    with pytest.raises(ValueError, match=r"lacks the entries \['nf'\]"):
        authors_config.network(lacking, 2, 16)


# Our own files


def _points(key):
    return gd.nn.presets.points(2, key=key)


def _cld(key):
    network = gd.nn.presets.small((8, 8, 2), key=key, features=8)
    return gd.nn.NetworkModel(gd.CLD((8, 8, 1), gamma=0.1), network, mixed_score=True)


def _bdm(key):
    options = dict(features=8, multipliers=(1,), num_blocks=1, attention=(8,))
    network = gd.nn.NCSNpp(
        (8, 8, 1), embedding="positional", dtype=jnp.bfloat16, key=key, **options
    )
    return gd.nn.NetworkModel(gd.BDM((8, 8, 1)), network)


def _flow(key):
    process = gd.VP((2,), gd.CosineSchedule(offset=0.01))
    model = gd.nn.NetworkModel(process, _points(key))
    return gd.ProbabilityFlow(process, model, "v")


@pytest.mark.x64
@pytest.mark.parametrize("make", (_cld, _bdm, _flow, _points))
def test_what_is_saved_is_loaded(tmp_path, make):
    model = make(jax.random.key(0))
    gd.checkpoints.save(tmp_path / "model", model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # Others may read it as they may read any file.
    (tmp_path / "any").touch()
    permissions = [(tmp_path / name).stat().st_mode for name in ("model", "any")]
    assert permissions[0] == permissions[1]
    loaded = gd.checkpoints.load(tmp_path / "model")
    assert eqx.tree_equal(model, loaded)
    assert type(loaded) is type(model)


def _example(name, process):
    """A model of a process, or a solver for it, by the name of its class."""
    network = gd.nn.TimeMLP(process.shape, width=4, depth=1, key=jax.random.key(0))
    model = gd.nn.NetworkModel(process, network)
    times = gd.time_grid(process, 5)
    return {
        "NetworkModel": lambda: model,
        "WithTime": lambda: gd.WithTime(process, network, "1 - t", per_sample=True),
        "GaussianMixture": lambda: helpers.mixture_for(process),
        "DiT": lambda: gd.nn.DiT((4, 4, 1), width=24, depth=1, key=jax.random.key(0)),
        "ImageClassifier": lambda: gd.nn.ImageClassifier(
            (8, 8, 1), 2, key=jax.random.key(0)
        ),
        "ExponentialAdams": lambda: gd.ExponentialAdams(3),
        "SSCS": lambda: gd.SSCS(),
        "GDDIM": lambda: gd.GDDIM(2, "data", reevaluate=True),
        "LearnedGDDIM": lambda: gd.LearnedGDDIM(gd.GDDIM(), process, times),
        "GaussianStart": lambda: gd.GaussianStart(gd.NormalData(jnp.zeros(3), 0.5)),
    }[name]()


@pytest.mark.x64
@pytest.mark.parametrize(
    "name",
    (
        *("NetworkModel", "WithTime", "GaussianMixture", "DiT"),
        *("ImageClassifier", "ExponentialAdams", "SSCS", "GDDIM", "LearnedGDDIM"),
        "GaussianStart",
    ),
)
def test_classes_of_the_library_need_no_like(tmp_path, name):
    model = _example(name, gd.VP((3,)))
    gd.checkpoints.save(tmp_path / "model", model)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "model"), model)


@pytest.mark.x64
@pytest.mark.parametrize("name", helpers.processes)
def test_processes_and_solvers_are_found_by_their_names(tmp_path, name):
    process = helpers.processes[name]()
    models = [process, *(make() for make in helpers.solvers.values())]
    like = process if isinstance(process, gd.LinearSDE | gd.GaussianPath) else None
    gd.checkpoints.save(tmp_path / "model", models)
    loaded = gd.checkpoints.load(tmp_path / "model", like=like)
    assert eqx.tree_equal(loaded, models) and loaded[0] == process


class _Own(eqx.Module):
    """A network as a user would write it."""

    layers: list
    frequencies: np.ndarray
    dropout: eqx.nn.Dropout
    activation: Callable

    def __init__(self, width, depth=1, activation=jnp.tanh, *, key):
        keys = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.MLP(3, width, width, depth, jax.nn.softplus, key=keys[0]),
            eqx.nn.LayerNorm(width),
            eqx.nn.Linear(width, 2, key=keys[2]),
        ]
        self.frequencies = np.arange(1, 3).astype(np.float32)
        self.dropout = eqx.nn.Dropout(0.1)
        self.activation = activation

    def __call__(self, t, x, *, key=None):
        mlp, norm, last = self.layers
        x = jnp.asarray(self.frequencies, x.dtype) * x
        h = self.activation(norm(mlp(jnp.concatenate([t[None], x]))))
        return last(self.dropout(h, key=key, inference=key is None))


def _sde(rate=1.0):
    return gd.LinearSDE((2,), lambda t: -rate * t, lambda t: t + 1.0)


def _matrix_sde(rate):
    matrix = jnp.array([[rate]])
    return gd.LinearSDE((2,), lambda t: -matrix.astype(t.dtype), lambda t: t + 1.0)


def _as_user_model(process, network):
    return gd.ProbabilityFlow(process, gd.nn.NetworkModel(process, network), "data")


@pytest.mark.parametrize("shapes_only", (False, True))
@pytest.mark.parametrize("part", ("network", "model", "flow"))
def test_networks_of_ones_own(tmp_path, shapes_only, part):
    process = gd.VP((2,), gd.LinearSchedule(beta_max=15.0))
    flow = _as_user_model(process, _Own(8, key=jax.random.key(0)))
    flow = eqx.tree_at(lambda f: f.model.network.frequencies, flow, np.float32([3, 4]))
    gd.checkpoints.save(tmp_path / "model", flow)
    make = lambda key: _Own(8, key=key)
    if shapes_only:
        make = functools.partial(eqx.filter_eval_shape, make)
    like = make(jax.random.key(1))
    if part != "network":
        like = _as_user_model(process, like)
    like = like.model if part == "model" else like
    loaded = gd.checkpoints.load(tmp_path / "model", like=like)
    assert loaded.process == process and loaded.predicts == "data"
    t, x = jnp.array(0.3), jnp.array([0.1, -0.2])
    np.testing.assert_array_equal(loaded.model(t, x), flow.model(t, x))
    assert eqx.tree_equal(*(eqx.filter(f, eqx.is_array) for f in (loaded, flow)))


def test_models_of_ones_own_without_a_network_model(tmp_path):
    mixture = gd.GaussianMixture(jnp.float32([[0, 1], [2, 3]]), 0.1, [0.3, 0.7])
    process = gd.CLD((2,))
    flow = gd.ProbabilityFlow(process, mixture.model(process), frame="cholesky")
    gd.checkpoints.save(tmp_path / "model", flow)
    like = gd.GaussianMixture(jnp.zeros((2, 2)), 0.1).model(process)
    loaded = gd.checkpoints.load(tmp_path / "model", like=like)
    assert eqx.tree_equal(loaded, flow) and loaded.frame == "cholesky"
    gd.checkpoints.save(tmp_path / "alone", _Own(8, key=jax.random.key(0)))
    alone = gd.checkpoints.load(tmp_path / "alone", like=_Own(8, key=jax.random.key(1)))
    assert eqx.tree_equal(alone, _Own(8, key=jax.random.key(0)))
    match = "holds a _Own: `like` must be the part .* that contains it; got a Probability"
    with pytest.raises(ValueError, match=match):
        gd.checkpoints.load(tmp_path / "alone", like=_as_user_model(process, alone))


def test_processes_of_ones_own(tmp_path):
    process = _sde()
    model = gd.nn.NetworkModel(process, _points(jax.random.key(0)), data_std=0.5)
    flow = gd.ProbabilityFlow(process, model, "data")
    gd.checkpoints.save(tmp_path / "model", flow)
    loaded = gd.checkpoints.load(tmp_path / "model", like=process)
    assert eqx.tree_equal(loaded, flow) and loaded.process == process
    # With a network of one's own too, the whole is needed.
    own = _as_user_model(process, _Own(8, key=jax.random.key(0)))
    gd.checkpoints.save(tmp_path / "model", own)
    like = _as_user_model(process, _Own(8, key=jax.random.key(1)))
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "model", like=like), own)
    for part in (process, own.model.network):
        match = "a LinearSDE and a _Own: `like` must be the part .* contains them; got a"
        with pytest.raises(ValueError, match=match):
            gd.checkpoints.load(tmp_path / "model", like=part)


@pytest.mark.parametrize("form", ("number", "spectrum", "matrix", "eigenvectors"))
def test_networks_that_know_the_law_of_the_data(tmp_path, form):
    process, rng = gd.VP((4, 4, 1)), np.random.default_rng(0)
    mean, variances = rng.normal(size=(4, 4, 1)), rng.uniform(0.5, 1, (4, 4, 1))
    vectors, _ = np.linalg.qr(rng.normal(size=(16, 2)))
    data = {
        "number": lambda: gd.NormalData(mean, 0.3),
        "spectrum": lambda: gd.NormalData(mean, variances, basis=gd.CosineBasis()),
        "matrix": lambda: gd.NormalData(mean, np.cov(rng.normal(size=(16, 99)))),
        "eigenvectors": lambda: gd.NormalData(mean, (np.array([3.0, 2]), vectors, 0.5)),
    }[form]()
    network = gd.nn.TimeMLP((4, 4, 1), width=4, depth=1, key=jax.random.key(0))
    model = gd.nn.NetworkModel(process, network, data=data)
    flow = gd.ProbabilityFlow(process, model, "data")
    gd.checkpoints.save(tmp_path / "model", flow)
    loaded = gd.checkpoints.load(tmp_path / "model")
    assert eqx.tree_equal(loaded, flow)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "model", like=flow), flow)
    # They are part of the model, but are not trained.
    u = process.prior(jax.random.key(1), (2,))
    slope = eqx.filter_grad(lambda model: (model(0.5, u) ** 2).sum())(model)
    assert not any(jnp.any(x != 0) for x in jtu.tree_leaves(slope.data))
    assert any(jnp.any(x != 0) for x in jtu.tree_leaves(slope.network))


def _other_frequencies(key):
    return eqx.tree_at(lambda x: x.frequencies, _Own(8, key=key), np.ones(3))


def _without_norm(key):
    return eqx.tree_at(lambda x: x.layers[1].bias, _Own(8, key=key), None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda key: None, "holds a _Own, which .*Make one .*`load\\(path, like="),
        (_other_frequencies, r"shape \(2,\) at .model.network.freq.*needs .* \(3,\)"),
        (
            _without_norm,
            r"at .model.network.layers\[1\].bias, but its network needs no array",
        ),
        (lambda key: _Own(4, key=key), r"layers\[0\].layers\[0\].out_features 8, .* has 4"),
        (lambda key: _Own(8, 2, key=key), r"network.layers\[0\].depth 1, but `like` has 2"),
        (
            lambda key: _as_user_model(gd.VP((2,)), _Own(8, key=key)),
            "saved with .*; with model.process.schedule.beta_max 15.0, but `like` has 20.0",
        ),
        (
            lambda key: _as_user_model(gd.VE((2,)), _Own(8, key=key)),
            "was saved with .*; with model.process VP, but `like` has VE",
        ),
    ],
)
def test_what_is_not_like_what_was_saved_is_refused(tmp_path, make, message):
    process = gd.VP((2,), gd.LinearSchedule(beta_max=15.0))
    flow = _as_user_model(process, _Own(8, key=jax.random.key(0)))
    gd.checkpoints.save(tmp_path / "model", flow)
    with pytest.raises(ValueError, match=message) as error:
        gd.checkpoints.load(tmp_path / "model", like=make(jax.random.key(0)))
    assert len(str(error.value)) < 500


_net = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(7))
_weights = {"w": np.ones((3, 3), np.float32)}
_matrix = jnp.eye(2)


def _apply(network, u):
    return network(u)


def _by_default(t, u, args, network=_net):
    return network(u)


def _by_keyword(t, u, args, *, network=_net):
    return network(u)


def _in_a_global(t, u, args):
    def inner(x):
        return _net(x)

    return inner(u)


def _in_a_global_of_another(t, u, args):
    return _in_a_global(t, u, args)


def _in_a_dictionary(t, u, args):
    return u @ _weights["w"]


def _in_this_module(t, u, args):
    return helpers.a_network(u)


class _Plain:
    def __init__(self, network):
        self.network = network

    def __call__(self, t, u, args):
        return self.network(u)

    def apply(self, t, u, args):
        return self.network(u)


class _Slots:
    __slots__ = ("network",)
    __init__, __call__ = _Plain.__init__, _Plain.__call__


class _Field(eqx.Module):
    network: Callable

    def __call__(self, t, u, args):
        return self.network(u)


class _Static(eqx.Module):
    network: Callable = eqx.field(static=True)

    def __call__(self, t, u, args):
        return self.network(u)


class _InAMethod(eqx.Module):
    def __call__(self, t, u, args):
        return _net(u)


class _MatrixInAMethod(eqx.Module):
    def __call__(self, t, u, args):
        return u @ _matrix


class _Tensor:
    """An array of another library."""

    shape, dtype = (2,), "float32"

    def __array__(self, *args, **kwargs):
        return np.zeros(2)


def _in_a_class(network):
    class Model(_Field):
        def __call__(self, t, u, args):
            return network(u)

    return Model(jnp.tanh)


_closure = lambda network: lambda t, u, args: network(u)

_hidden = {
    "closure": _closure,
    "named closure": lambda network: functools.wraps(jnp.tanh)(_closure(network)),
    "list in a closure": lambda network: _closure([{"a": network}]),
    "dictionary of weights": lambda network: _closure({"w": np.ones(3)}),
    "scalar": lambda network: _closure(jnp.array(0.5)),
    "default": lambda network: _by_default,
    "keyword": lambda network: _by_keyword,
    "global": lambda network: _in_a_global,
    "global of a global": lambda network: _in_a_global_of_another,
    "global dictionary": lambda network: _in_a_dictionary,
    "global of a module": lambda network: _in_this_module,
    "partial": lambda network: functools.partial(_apply, network),
    "partial of a closure": lambda network: functools.partial(_closure(network), 1),
    "partial of JAX": lambda network: jtu.Partial(_closure(network)),
    "bound method": lambda network: _Plain(network).apply,
    "special method": lambda network: network.__call__,
    "object": _Plain,
    "slots": _Slots,
    "namespace": lambda network: _closure(types.SimpleNamespace(network=network)),
    "deque": lambda network: _closure(collections.deque([network])),
    "static field": _Static,
    "closure in a static field": lambda network: _Static(_closure(network)),
    "jit": lambda network: jax.jit(_closure(network)),
    "filter_jit": lambda network: eqx.filter_jit(_closure(network)),
    "vmap": lambda network: jax.vmap(network),
    "grad of a jit": lambda network: jax.grad(jax.jit(_closure(network))),
    "cached": lambda network: functools.lru_cache(_closure(network)),
    "method": lambda network: _InAMethod(),
    "class in a function": _in_a_class,
    "other library": lambda network: _Field(_Tensor()),
}


@pytest.mark.x64
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.filterwarnings("ignore:\\nPossibly assigning a JAX-transformed callable")
@pytest.mark.parametrize("wrap", (lambda f: f, _Field, lambda f: {"a": [f]}))
@pytest.mark.parametrize("make", _hidden.values(), ids=_hidden)
def test_arrays_out_of_reach_are_not_lost_in_silence(tmp_path, make, wrap):
    path, model = tmp_path / "model", wrap(make(_net))
    with pytest.raises(ValueError, match="cannot be saved: it has an array .* at `.*Model"):
        gd.checkpoints.save(path, model)
    assert not list(tmp_path.iterdir())
    # As before, when only the header was saved.
    gd.checkpoints.save(path, _Field(jnp.tanh))
    kind = type(model).__qualname__
    _rewritten(path, lambda h, a: h.update(model={"other": kind}))
    with pytest.raises(
        ValueError, match="cannot be loaded: it has an array .* at `.*Model"
    ):
        gd.checkpoints.load(path, like=model)


@pytest.mark.x64
def test_the_form_of_the_first_example(tmp_path):
    process = gd.RectifiedFlow((3,))
    flow = gd.ProbabilityFlow(process, lambda t, x, args: _net(x), "flow")
    with pytest.raises(
        ValueError, match=r"ProbabilityFlow cannot.*at `.model<_net>.layers"
    ):
        gd.checkpoints.save(tmp_path / "model", flow)
    flow = gd.ProbabilityFlow(process, _Field(_net), "flow")
    gd.checkpoints.save(tmp_path / "model", flow)
    fresh = _Field(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(8)))
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "model", like=fresh), flow)


_table = np.arange(4.0)


class _WithATable(eqx.Module):
    weight: jax.Array

    def __call__(self, t, u, args):
        return self.weight * _table.sum() * len(_matrix)


_logger = logging.getLogger("any")


def _logs(x):
    _logger.info("called")
    return x


_fine = {
    "logs": _logs,
    "jnp": jnp.tanh,
    "jit": jax.nn.silu,
    "custom_jvp": jax.nn.relu,
    "ufunc": jnp.add,
    "lambda": lambda x: jax.nn.gelu(x) * jnp.pi,
    "captured number": _closure(3.0),
    "captured function": _closure(jax.nn.silu),
    "captured process": _closure(gd.VP((2,))),
    "process with a matrix": _matrix_sde(2.0),
    "partial": functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
    "vmap": jax.vmap(jnp.tanh),
    "class": gd.VP,
    "method": gd.VP((2,)).log_snr,
    "optimiser": optax.adam(1e-3),
    "constants of a module": _WithATable(jnp.ones(2)),
    "matrix in a method": _MatrixInAMethod(),
}


@pytest.mark.x64
@pytest.mark.parametrize("value", _fine.values(), ids=_fine)
def test_functions_without_arrays_can_be_saved(tmp_path, value):
    model = _Field((value, jnp.ones(2)))
    gd.checkpoints.save(tmp_path / "model", model)
    loaded = gd.checkpoints.load(tmp_path / "model", like=_Field((value, jnp.zeros(2))))
    assert eqx.tree_equal(loaded, model)


class _Numbers(eqx.Module):
    dynamic: PyTree
    weight: jax.Array
    fixed: Any = eqx.field(static=True, default=None)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize(
    "value, other",
    [
        (3.0, 0.0),
        (float("nan"), 0.0),
        (3.0, 0),
        (2, 3),
        (True, False),
        (1 + 2j, 0.0),
        ("a", "b"),
        (None, 1.0),
        (1.0, None),
        (np.float32(2.5), 0.0),
        (jnp.bfloat16(2.5).dtype.type(2.5), np.float32(0)),
        (eqx.nn.Dropout(0.1), eqx.nn.Dropout(0.5, inference=True)),
        ([1, {"a": 2.0}, (None, "x")], [0, {"a": 0}, (3, None)]),
        (optax.EmptyState(), optax.EmptyState()),
        (gd.results.Samples(1.5, 3), gd.results.Samples(0.0, 0)),
    ],
    ids=str,
)
def test_numbers_are_loaded_and_fixed_ones_compared(tmp_path, value, other):
    path, model = tmp_path / "model", _Numbers(value, jnp.ones(2))
    gd.checkpoints.save(path, model)
    loaded = gd.checkpoints.load(path, like=_Numbers(other, jnp.zeros(2)))
    assert repr(loaded) == repr(model)
    kinds = lambda tree: list(map(type, jtu.tree_leaves(tree)))
    assert kinds(loaded) == kinds(model)
    flow = gd.ProbabilityFlow(gd.VP((2,)), eqx.Partial(_apply, model))
    gd.checkpoints.save(path, flow)
    like = eqx.Partial(_apply, _Numbers(other, jnp.zeros(2)))
    assert repr(gd.checkpoints.load(path, like=like).model) == repr(flow.model)
    if isinstance(value, eqx.Module | list | tuple):
        return
    gd.checkpoints.save(path, _Numbers(0, jnp.ones(2), (value, 1)))
    like = _Numbers(0, jnp.zeros(2), (other, 1))
    with pytest.raises(ValueError, match=r"was saved with model\.fixed\[0\] .*`like` has"):
        gd.checkpoints.load(path, like=like)


@pytest.mark.x64
@pytest.mark.parametrize(
    "saved, like, message",
    [
        (jnp.tanh, jax.nn.relu, "model.dynamic tanh, but `like` has relu"),
        (_closure(2.0), _closure(3.0), "model.dynamic<network> 2.0, but `like` has 3.0"),
        (_sde(2.0), _sde(3.0), "<rate> 2.0, but `like` has 3.0"),
        (_matrix_sde(2.0), _matrix_sde(3.0), r"<matrix> \[2\], but `like` has \[3\]"),
        (eqx.nn.Identity(), eqx.nn.Dropout(), "dynamic Identity, but `like` has Dropout"),
        ({"a": 1, "b": 2}, {"a": 1}, r"model.dynamic\['b'\] 2, but `like` has None"),
        ({"a": 1}, {"a": 1, "b": 2}, r"model.dynamic\['b'\] None, but `like` has 2"),
        (2.0, jnp.array(2.0), "model.dynamic 2.0, but `like` has None"),
        (jnp.array(2.0), 2.0, "model.dynamic None, but `like` has 2.0"),
        (
            functools.partial(_apply, 1, b=2),
            functools.partial(_apply, 1, b=3),
            "model.dynamic<b> 2, but `like` has 3",
        ),
    ],
)
def test_what_differs_beside_arrays_is_named(tmp_path, saved, like, message):
    gd.checkpoints.save(tmp_path / "model", _Numbers(saved, jnp.ones(2)))
    with pytest.raises(ValueError, match=message) as error:
        gd.checkpoints.load(tmp_path / "model", like=_Numbers(like, jnp.ones(2)))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("learned", (True, False))
def test_a_fitted_solver_is_saved_with_its_times_and_errors(tmp_path, learned):
    process = gd.VP((2,))
    ts = gd.time_grid(process, 5)
    solver = gd.LearnedGDDIM(gd.GDDIM(3), process, ts) if learned else gd.GDDIM(3)
    fitted = gd.results.FittedSolver(solver, ts, 0.1, 0.2, 0.3, float("nan"))
    path = tmp_path / "solver"
    gd.checkpoints.save(path, fitted)
    other = fitted._replace(ts=ts[:6], error=9.0)
    for like in (None, other):
        loaded = gd.checkpoints.load(path, like=like)
        assert type(loaded) is gd.results.FittedSolver and repr(loaded[2:]) == repr(
            fitted[2:]
        )
        assert eqx.tree_equal(loaded[:2], fitted[:2])
    with pytest.raises(
        ValueError, match="no `like`, as it has a FittedSolver; got a GDDIM"
    ):
        gd.checkpoints.load(path, like=solver if not learned else gd.GDDIM())
    sde = _sde()
    own = fitted._replace(solver=gd.LearnedGDDIM(gd.GDDIM(), sde, gd.time_grid(sde, 5)))
    gd.checkpoints.save(path, own)
    loaded = gd.checkpoints.load(path, like=sde)
    assert eqx.tree_equal(loaded.solver, own.solver) and loaded.error == 0.1


@pytest.mark.parametrize("kind", (tuple, list))
def test_several_models_in_one_file(tmp_path, kind):
    make = lambda key: kind([_Own(8, key=key), _points(key), 3.0, jnp.ones(2), key])
    gd.checkpoints.save(tmp_path / "models", make(jax.random.key(0)))
    like = make(jax.random.key(1))
    loaded = gd.checkpoints.load(tmp_path / "models", like=like)
    assert eqx.tree_equal(loaded, make(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"at \[4\], but its network needs no array"):
        gd.checkpoints.load(tmp_path / "models", like=like[:4])
    gd.checkpoints.save(tmp_path / "models", kind([]))
    assert gd.checkpoints.load(tmp_path / "models") == kind([])


def test_what_needs_no_like_refuses_others(tmp_path):
    gd.checkpoints.save(tmp_path / "model", _points(jax.random.key(0)))
    with pytest.raises(
        ValueError, match="needs no `like`, as it has a TimeMLP; got a _Own"
    ):
        gd.checkpoints.load(tmp_path / "model", like=_Own(8, key=jax.random.key(0)))
    like = _points(jax.random.key(1))
    loaded = gd.checkpoints.load(tmp_path / "model", like=like)
    assert eqx.tree_equal(loaded, _points(jax.random.key(0)))


@pytest.mark.parametrize(
    "dtype", ("bfloat16", "float16", "float8_e4m3fn", "int8", "bool", "complex64")
)
def test_arrays_of_every_dtype(tmp_path, dtype):
    model = {"a": jnp.asarray([0, 1, 0.5, -2], jnp.float32).astype(dtype)}
    model["b"], model["key"] = model["a"][1], jax.random.key(3)
    gd.checkpoints.save(tmp_path / "model", model)
    like = eqx.filter_eval_shape(lambda: model)
    loaded = gd.checkpoints.load(tmp_path / "model", like=like)
    assert loaded["a"].dtype == dtype and eqx.tree_equal(loaded, model)


@pytest.mark.x64
def test_a_model_of_half_precision_stays_one(tmp_path):
    cast = lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x
    half = jtu.tree_map(cast, _flow(jax.random.key(0)))
    gd.checkpoints.save(tmp_path / "model", half)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "model"), half)


@pytest.mark.x64
def test_metadata_are_kept_with_the_model(tmp_path):
    path, model = tmp_path / "model.npz", _flow(jax.random.key(0))
    gd.checkpoints.save(path, model)
    assert gd.checkpoints.metadata(path) == {}
    metadata = {"classes": ("cat", "Ötzi"), "step": 3, "nested": {"none": None}}
    gd.checkpoints.save(path, model, metadata)
    assert gd.checkpoints.metadata(path) == metadata | {"classes": ["cat", "Ötzi"]}
    assert jtu.tree_structure(gd.checkpoints.load(path)) == jtu.tree_structure(model)
    for wrong in ({"step": jnp.ones(2)}, {"network": object()}):
        with pytest.raises(ValueError, match="`metadata` must be serialisable as JSON"):
            gd.checkpoints.save(path, model, wrong)
    assert gd.checkpoints.metadata(path)["step"] == 3
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="model.npz is not a complete file"):
        gd.checkpoints.metadata(path)


def test_a_failed_save_leaves_the_file_before(tmp_path):
    path, model = tmp_path / "model", _points(jax.random.key(0))
    gd.checkpoints.save(path, model)
    before = path.read_bytes()
    for value in (np.array(["a"]), np.array([None])):
        with pytest.raises(ValueError, match=r"array \['x'\] is .*no kind of number"):
            gd.checkpoints.save(path, {"x": value})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _rewritten(path, change):
    """The file with another header or other arrays."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    header = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, header=header, **arrays)


@pytest.mark.x64
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, a: h.update(version=3), "version 3 of the format.*Update the older"),
        (lambda h, a: h.update(format="x"), "was not written by"),
        (lambda h, a: h["model"].update({"class": "UViT"}), "a UViT, which this.*Update"),
        (lambda h, a: h["model"]["arguments"].update(x=1), r"arguments \['x'\] of TimeMLP"),
        (lambda h, a: a.pop(".first.bias"), "no array at .first.bias, but its network"),
        (lambda h, a: a.update(more=np.zeros(2)), r"shape \(2,\) at more, but .* no array"),
        (
            lambda h, a: a.update({".first.bias": np.zeros(3, "f4")}),
            r"shape \(3,\) at .first.bias, but .* needs an array of shape \(256,\)",
        ),
    ],
)
def test_files_that_are_not_understood_are_refused(tmp_path, change, message):
    path = tmp_path / "model.npz"
    gd.checkpoints.save(path, _points(jax.random.key(0)))
    _rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        gd.checkpoints.load(path)


@pytest.mark.x64
def test_cut_files_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    gd.checkpoints.save(path, _points(jax.random.key(0)))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete file from"):
            gd.checkpoints.load(path)


@pytest.mark.x64
def test_authors_parameters_in_our_files(tmp_path):
    network, _ = authors_network(tmp_path)
    gd.checkpoints.save(tmp_path / "ours", network)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "ours"), network)


@pytest.mark.float32
@pytest.mark.parametrize("name", ("vp", "bdm", "cld"))
def test_pretrained_models_draw_clothes(name):
    flow = gd.checkpoints.pretrained(f"fashion-mnist-{name}")
    assert type(flow.process).__name__ == name.upper()
    key = jax.random.key(0)
    x, _ = gd.sample(flow, key, 64, num_steps=20)
    x = np.asarray(x)
    # As bright as the data, whose mean is -0.43 (BDM's are brighter), black at the corners,
    # and of all kinds.
    assert -0.55 < x.mean() < -0.15 and 0.6 < x.std() < 0.8
    assert np.abs(x[:, [0, 0, -1, -1], [0, -1, 0, -1]] + 1).mean() < 0.1
    assert (np.abs(x) < 1.3).mean() > 0.99
    features = gd.metrics.Classifier()
    vectors = features(gd.to_uint8(x))
    kinds = np.asarray(jax.vmap(features.classifier.last)(vectors)).argmax(axis=1)
    assert len(set(kinds.tolist())) >= 8


@pytest.mark.float32
@pytest.mark.parametrize("name", ("vp", "cld"))
def test_who_asks_for_boots_gets_boots(name):
    flow = gd.checkpoints.pretrained(f"fashion-mnist-{name}-classes")
    features = gd.metrics.Classifier()
    labels = np.repeat([9, 1], 16)
    guided = gd.classifier_free_guidance(flow, scale=3.0)
    x, _ = gd.sample(guided, jax.random.key(0), 32, 20, args=labels)
    vectors = features(gd.to_uint8(x))
    kinds = np.asarray(jax.vmap(features.classifier.last)(vectors)).argmax(axis=1)
    assert (kinds == labels).mean() > 0.9
    with pytest.raises(ValueError, match="Labels must be from 0 to 10"):
        gd.sample(flow, jax.random.key(0), 2, 5, args=np.array([0, 11]))
    with pytest.raises(ValueError, match="needs a condition"):
        gd.sample(flow, jax.random.key(0), 2, 5)


@pytest.mark.float32
@pytest.mark.parametrize("name", ("vp", *slow("bdm", "cld")))
def test_learned_solvers_are_included(name):
    flow = gd.checkpoints.pretrained(f"fashion-mnist-{name}")
    u = flow.process.prior(jax.random.key(5), (16,))
    run = eqx.filter_jit(lambda solver, ts: gd.generate(flow, u, solver=solver, ts=ts))
    exact = run(gd.GDDIM(), gd.time_grid(flow.process, 100))
    for number in (3, 5, 10):
        solver = gd.checkpoints.pretrained_solver(f"fashion-mnist-{name}", number)
        # Geometric means over samples: of 16, one that ends elsewhere decides any other.
        errors = [
            float(
                jnp.exp(0.5 * jnp.log(((run(*pair) - exact) ** 2).mean((1, 2, 3))).mean())
            )
            for pair in (
                (solver, solver.ts),
                (gd.GDDIM(), gd.time_grid(flow.process, number)),
            )
        ]
        assert solver.num_evaluations == number and errors[0] < 0.7 * errors[1]
    for number in (2, 4, 6, 8):
        solver = gd.checkpoints.pretrained_solver(f"fashion-mnist-{name}", number)
        assert solver.num_evaluations == number and solver.process == flow.process
    with pytest.raises(ValueError, match="no solver 'fashion-mnist-vp-7-steps', but"):
        gd.checkpoints.pretrained_solver("fashion-mnist-vp", 7)


@pytest.mark.float32
def test_moments_of_the_data_are_included():
    data = gd.checkpoints.pretrained_data("fashion-mnist")
    flow = gd.checkpoints.pretrained("fashion-mnist-vp")
    # What the network was trained with.
    std: Any = getattr(flow.model, "data_std")
    variance = data.covariance.variances
    assert variance is not None
    total = float(variance.mean() + (data.mean**2).mean() - data.mean.mean() ** 2)
    assert total**0.5 == pytest.approx(std, rel=0.01)
    features = gd.metrics.Classifier()
    start = gd.GaussianStart(data, None, "sharpest")
    rows = [gd.sample(flow, jax.random.key(0), 64, n, start=start).x for n in (2, 4)]
    fine = gd.sample(flow, jax.random.key(0), 64, 50).x
    kinds = [
        np.asarray(jax.vmap(features.classifier.last)(features(gd.to_uint8(x)))).argmax(1)
        for x in (*rows, fine)
    ]
    # Most become clothes of the same kind.
    assert [(kind == kinds[-1]).mean() > 0.6 for kind in kinds] == [True] * 3


def test_unknown_pretrained_models_are_refused(without_type_checks):
    with pytest.raises(ValueError, match="no model 'cat', but .*fashion-mnist-cld"):
        gd.checkpoints.pretrained("cat")
    with pytest.raises(
        ValueError, match="no data 'cat-data', but there are fashion-mnist-data"
    ):
        gd.checkpoints.pretrained_data("cat")
    with pytest.raises(ValueError, match="no model 'fashion-mnist-data'"):
        gd.checkpoints.pretrained("fashion-mnist-data")
