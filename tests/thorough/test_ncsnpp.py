"""The networks of the paper."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.nn import _layers

from ..helpers import slow
from ..ncsnpp_oracle import authors_network


# Parameters are in single precision always, so most runs here are in one precision only.
# Against what NumPy computes, for the options that the paper's configurations have.
_configs = {
    "fourier_fir": {},
    "ddpm": dict(resblock_type="ddpm", fir=False, embedding_type="positional"),
    "ddpm_fir": dict(resblock_type="ddpm", ch_mult=[1, 2, 1], num_res_blocks=2),
    "ddpm_no_convolution": dict(
        resblock_type="ddpm", resamp_with_conv=False, conditional=False
    ),
    "ddpm_no_fir_residual": dict(resblock_type="ddpm", fir=False),
    "celeba": dict(fir=False, embedding_type="positional", progressive_input="none", nf=12),
    "plain_sums": dict(skip_rescale=False, attn_resolutions=[16, 8], fir=False),
    "odd_taps": dict(fir_kernel=[1, 3, 2], progressive_input="none", nf=12),
    "odd_taps_ddpm": dict(fir_kernel=[1, 4, 2, 0.5, 1], resblock_type="ddpm"),
}
_quick = ["ddpm", "ddpm_fir", "odd_taps_ddpm", "celeba"]


@pytest.mark.x64
@pytest.mark.parametrize(
    "name", [*_quick, *slow(*[c for c in _configs if c not in _quick])]
)
def test_is_the_authors_network(name, tmp_path):
    network, oracle = authors_network(tmp_path, **_configs[name])
    # The same parameters, computed with in double precision.
    network = jtu.tree_map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, network
    )
    x = np.random.default_rng(1).normal(size=network.shape)
    for t in (1e-3, 0.6):
        y = eqx.filter_jit(network)(jnp.asarray(t), jnp.asarray(x))
        np.testing.assert_allclose(y, oracle(t, x), rtol=0, atol=1e-10)


def _size(make):
    shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
    structs = [x for x in jtu.tree_leaves(shapes) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.shape) for x in structs)


def test_the_paper_s_numbers_of_parameters():
    # Table 4: 108M and 62M.
    assert _size(gd.nn.presets.cifar10_cld) == 107_597_446
    assert _size(gd.nn.presets.celeba_cld) == 61_811_334
    # Three channels less at the input, in the pyramid's first layer and at the output.
    less = 3 * 3 * 3 * (128 + 128 + 128) + 3
    assert _size(gd.nn.presets.cifar10_bdm) == 107_597_446 - less


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A network with random parameters everywhere, the last layers too."""
    folder = tmp_path_factory.mktemp("authors")
    authors_network(folder)

    def load(**options):
        options = (
            dict(features=8, multipliers=(1, 2), num_blocks=1, attention=(8,)) | options
        )
        make = functools.partial(gd.nn.NCSNpp, (16, 16, 2), **options)
        return gd.checkpoints.load_authors(folder / "checkpoint", make)

    return load


@pytest.fixture(scope="module")
def network(load):
    return load()


def _input(network, seed=0):
    return jax.random.normal(jax.random.key(seed), network.shape, jnp.float32)


_run = eqx.filter_jit(lambda network, t, x, key=None: network(t, x, key=key))


def test_output_depends_on_time(network):
    x = _input(network)
    outputs = [_run(network, jnp.asarray(t, jnp.float32), x) for t in (0.1, 0.11, 0.9)]
    for one, other in ((0, 1), (1, 2)):
        assert float(jnp.abs(outputs[one] - outputs[other]).max()) > 1e-2


def test_dropout_needs_a_key(network):
    t, x = jnp.asarray(0.3, jnp.float32), _input(network)
    without = _run(network, t, x)
    one, same, other = (_run(network, t, x, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    for a, b in ((one, other), (one, without)):
        assert float(jnp.abs(a - b).max()) > 1e-3


@pytest.mark.x64
def test_mirrored_kernels_see_a_mirror_image(network):
    # Nothing between the kernels may shift the image, such as padding of one side.
    mirror = lambda w: w[..., ::-1] if eqx.is_array(w) and w.ndim == 4 else w
    x, t = _input(network), jnp.asarray(0.3, jnp.float32)
    y = _run(network, t, x)
    mirrored = _run(jtu.tree_map(mirror, network), t, x[:, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1], y, rtol=0, atol=1e-4)
    assert float(jnp.abs(mirrored - y).max()) > 0.1


@eqx.filter_jit
def _gradient(network, x):
    loss = lambda network: (network(jnp.asarray(0.3, x.dtype), x) ** 2).sum()
    return eqx.filter_grad(loss)(network)


@pytest.mark.x64
def test_gradients_reach_every_parameter(network, load):
    x = _input(network)
    gradient = _gradient(network, x)
    for path, leaf in jtu.tree_leaves_with_path(gradient):
        if not isinstance(leaf, jax.Array):
            continue
        # The frequencies of time are fixed. And a constant for all keys changes no
        # attention.
        name = jtu.keystr(path)
        if "frequencies" in name:
            assert not leaf.any()
        elif not name.endswith(".key.bias"):
            assert float(jnp.abs(leaf).max()) > 1e-5, name
    # Less memory gives the same.
    again = _gradient(load(checkpoint=True), x)
    for a, b in zip(*map(jtu.tree_leaves, (gradient, again))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def _kept(network, x):
    """The bytes that are kept for the gradient, besides the parameters."""
    parameters, static = eqx.partition(network, eqx.is_inexact_array)

    def pull_back(parameters, x):
        run = lambda parameters: eqx.combine(parameters, static)(jnp.asarray(0.3), x)
        return jax.vjp(run, parameters)[1]

    kept = jax.eval_shape(pull_back, parameters, x)
    number = lambda tree: sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))
    return number(kept) - number(parameters)


def test_checkpoints_keep_less(network, load):
    x = _input(network)
    assert _kept(load(checkpoint=True), x) < 0.3 * _kept(network, x)


@pytest.mark.x64
def test_bfloat16_keeps_parameters_and_outputs_in_single_precision(network, load):
    t, x = jnp.asarray(0.3, jnp.float32), _input(network)
    half = load(dtype=jnp.bfloat16)
    one, other = _run(network, t, x), _run(half, t, x)
    assert other.dtype == jnp.float32
    difference = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one))
    assert 1e-4 < difference < 3e-2
    for leaf in jtu.tree_leaves(eqx.filter(_gradient(half, x), eqx.is_array)):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()


@pytest.mark.x64
def test_compiles_once_for_all_times(network):
    x, traces = _input(network), []

    @eqx.filter_jit
    def run(network, t):
        traces.append(t)
        return network(t, x)

    for t in (1e-3, 0.5, 1.0):
        assert jnp.isfinite(run(network, jnp.asarray(t, jnp.float32))).all()
    assert len(traces) == 1


@pytest.mark.x64
@pytest.mark.parametrize("init_scale, low, high", [(0.0, 0, 1e-3), (1.0, 0.05, 20)])
def test_initial_predictions(init_scale, low, high):
    network = gd.nn.NCSNpp(
        (8, 8, 2),
        features=8,
        multipliers=(1, 2),
        num_blocks=1,
        attention=(),
        init_scale=init_scale,
        key=jax.random.key(0),
    )
    y = _run(network, jnp.asarray(0.5, jnp.float32), _input(network))
    assert low <= float(jnp.abs(y).max()) < high


def test_convolutions_have_the_form_that_is_fast_in_loops(network):
    # XLA on CPUs does not bring others to it in the loops of solvers: six times slower.
    run = jax.jit(lambda x: network(jnp.asarray(0.5, x.dtype), x))
    forms = re.findall(r"dim_numbers = (.*), window", run.lower(_input(network)).as_text())
    assert forms
    assert set(forms) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def test_patches_are_channels_of_a_smaller_network():
    options = dict(features=8, multipliers=(1, 2), num_blocks=1, attention=(2,))
    options |= dict(init_scale=1.0, key=jax.random.key(0))
    whole = gd.nn.NCSNpp((8, 12, 3), 2, patch=2, **options)
    inner = gd.nn.NCSNpp((4, 6, 12), 8, **options)
    t, x = jnp.asarray(0.3), np.random.default_rng(0).normal(size=(8, 12, 3))
    x = jnp.asarray(x, whole.first.weight.dtype)
    corners = [x[i::2, j::2] for i in (0, 1) for j in (0, 1)]
    run = eqx.filter_jit(lambda network, x: network(t, x))
    expected = run(inner, jnp.concatenate(corners, axis=-1)).reshape(4, 6, 2, 2, 2)
    y = run(whole, x)
    assert y.shape == (8, 12, 2)
    for i in (0, 1):
        for j in (0, 1):
            np.testing.assert_allclose(y[i::2, j::2], expected[:, :, i, j], atol=1e-5)


def test_points_depend_on_time_and_size():
    network = gd.nn.TimeMLP(4, 3, width=16, key=jax.random.key(0))
    x = jnp.arange(4.0)
    one, other = (network(jnp.asarray(t), x) for t in (0.2, 0.3))
    assert one.shape == (3,) and float(jnp.abs(one - other).max()) > 1e-3
    with pytest.raises(ValueError, match=r"inputs of shape \(4,\); got \(3,\)"):
        network(jnp.asarray(0.2), x[:3])


def _make(shape=(8, 8, 2), **options):
    options = dict(features=8, multipliers=(1, 2), num_blocks=1, attention=()) | options
    return lambda: gd.nn.NCSNpp(shape, key=jax.random.key(0), **options)


@pytest.mark.x64
@pytest.mark.parametrize(
    "call, message",
    [
        (_make((8, 2)), r"`shape` must be \(height, width, channels\); got \(8, 2\)"),
        (_make((9, 8, 2)), r"must be multiples of 2.*got \(9, 8, 2\)"),
        (_make((8, 10, 2), patch=2), r"must be multiples of 4.*`patch=2`.*10, 2\)"),
        (_make(patch=0), "`patch` must be a positive integer; got 0"),
        (_make(features=9), "have 9 channels, .* 2 equal groups.*multiple of 4"),
        (_make(features=2), "have 2 channels, .* 0 equal groups.*multiple of 4"),
        (_make(features=36), "have 144 channels, .* 32 equal groups.*of 32"),
        (_make(features=0), "`features` must be a positive integer; got 0"),
        (_make(num_blocks=0), "`num_blocks` must be a positive integer; got 0"),
        (_make(multipliers=()), "`multipliers` must hold a number"),
        (_make(attention=(16,)), r"among the heights \[8, 4\].*got \(16,\)"),
        (_make(block="resnet"), "`block` must be one of .*got 'resnet'"),
        (_make(embedding="sine"), "`embedding` must be one of .*got 'sine'"),
        (_make(progressive_input="sum"), "`progressive_input` must be one of"),
        (_make(dropout=1.0), r"`dropout` must be in \[0, 1\); got 1.0"),
        (_make(filter_taps=(1, -1)), "`filter_taps` must be"),
        (lambda: _make()()(jnp.asarray(0.1), jnp.zeros((4, 8, 2))), "got.*4, 8, 2"),
        (lambda: gd.nn.TimeMLP(2, width=3, key=jax.random.key(0)), "`width` must be even"),
    ],
)
def test_bad_input_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (7, 4), (16, 16, 1, 1)])
@pytest.mark.parametrize("scale", (1.0, 0.1, 0.0))
def test_initial_weights_are_those_of_variance_scaling(shape, scale):
    out_size, size, *window = shape
    layer = (
        _layers.convolution(size, out_size, window[0], key=jr.key(3), scale=scale)
        if window
        else _layers.dense(size, out_size, key=jr.key(3), scale=scale)
    )
    initial = jax.nn.initializers.variance_scaling(
        scale or 1e-10, "fan_avg", "uniform", in_axis=1, out_axis=0
    )
    expected = initial(jr.key(3), shape, layer.weight.dtype)
    np.testing.assert_array_equal(layer.weight, expected)
    assert not layer.bias.any()


def test_few_programs_are_compiled_for_initial_weights(monkeypatch):
    drawn, uniform = [], jr.uniform

    def record(key, shape, *args, **options):
        # Others are not drawn: their shapes are found.
        if not isinstance(key, jax.core.Tracer):
            drawn.append(shape)
        return uniform(key, shape, *args, **options)

    monkeypatch.setattr(jr, "uniform", record)
    gd.nn.presets.small((28, 28, 2), key=jr.key(0))
    assert all(len(shape) == 1 for shape in drawn)
    assert len(drawn) > 20 and len(set(drawn)) < 12
