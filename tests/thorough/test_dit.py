"""The diffusion transformer against a forward pass written in NumPy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import max_difference


_shape = (8, 12, 2)
_options = dict(patch=2, width=16, depth=2, num_heads=4, num_classes=3)


def _make(shape=_shape, **options):
    chosen: Any = _options | options
    return gd.nn.DiT(shape, key=jr.key(0), **chosen)


def _trained(**options):
    """With noise on all parameters, as at first the blocks are the identity."""
    leaves, treedef = jtu.tree_flatten(_make(**options))
    keys = jr.split(jr.key(1), len(leaves))
    leaves = [x + 0.1 * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return treedef.unflatten(leaves)


def _input(dtype=float):
    return jr.normal(jr.key(2), _shape, dtype)


_run = eqx.filter_jit(lambda network, t, x, label=1: network(t, x, jnp.asarray(label)))


def _expected(network, t, x, label):
    value = lambda a: np.asarray(a, np.float64)
    linear = lambda layer, x: x @ value(layer.weight).T + value(layer.bias)
    silu = lambda x: x / (1 + np.exp(-x))
    gelu = lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def modulate(h, shift, scale):
        centred = h - h.mean(-1, keepdims=True)
        spread = ((centred**2).mean(-1, keepdims=True) + 1e-6) ** 0.5
        return centred / spread * (1 + scale) + shift

    phases = 999 * t / 10_000 ** (np.arange(128) / 127)
    time = np.concatenate([np.sin(phases), np.cos(phases)])
    first, second = network.time_layers
    c = linear(second, silu(linear(first, time))) + value(network.condition.weight)[label]
    c = silu(c)
    rows, columns, width, heads = 4, 6, 16, 4
    tokens, places = [], []
    rates = 1 / 10_000 ** (np.arange(4) / 4)
    for i in range(rows):
        for j in range(columns):
            tokens.append(value(x)[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel())
            parts = [f(n * rates) for n in (i, j) for f in (np.sin, np.cos)]
            places.append(np.concatenate(parts))
    h = linear(network.first, np.stack(tokens)) + np.stack(places)
    for n in range(2):
        block = jtu.tree_map(lambda a: a[n] if eqx.is_array(a) else a, network.blocks)
        shift, scale, gate, shift2, scale2, gate2 = linear(block.modulation, c).reshape(
            6, width
        )
        q, k, v = np.split(
            linear(block.queries_keys_values, modulate(h, shift, scale)), 3, -1
        )
        attended = []
        for head in range(heads):
            own = slice(4 * head, 4 * head + 4)
            weights = np.exp(q[:, own] @ k[:, own].T / 2)
            attended.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
        h = h + gate * linear(block.mixed, np.concatenate(attended, -1))
        y = gelu(linear(block.hidden, modulate(h, shift2, scale2)))
        h = h + gate2 * linear(block.last, y)
    h = linear(network.last, modulate(h, *linear(network.modulation, c).reshape(2, width)))
    y = np.zeros((8, 12, 2))
    for n in range(rows * columns):
        i, j = divmod(n, columns)
        y[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = h[n].reshape(2, 2, 2)
    return y


def test_is_the_transformer_written_in_numpy():
    network, x = _trained(), _input()
    # JAX computes the softmax of attention in single precision.
    tolerance = 1e-6 if jax.config.read("jax_enable_x64") else 2e-4
    parameters = jtu.tree_map(lambda a: a.astype(x.dtype), network)
    for t, label in ((0.3, 1), (0.9, 3)):
        y = _run(parameters, jnp.asarray(t, x.dtype), x, label)
        np.testing.assert_allclose(y, _expected(network, t, x, label), atol=tolerance)


def test_begins_as_zero_and_learns_from_every_parameter():
    x = _input(jnp.float32)
    assert float(jnp.abs(_run(_make(), 0.5, x)).max()) < 1e-3

    @eqx.filter_jit
    def gradient(network):
        return eqx.filter_grad(lambda n: (n(0.5, x, jnp.asarray(1)) ** 2).sum())(network)

    network = _trained()
    gradients = jtu.tree_leaves_with_path(gradient(network))
    for path, leaf in gradients:
        # A constant for all keys changes no attention, but it is a part of a larger array.
        assert float(jnp.abs(leaf).max()) > 1e-5, jtu.keystr(path)
    less_memory = gradient(_trained(checkpoint=True))
    for (_, a), b in zip(gradients, jtu.tree_leaves(less_memory)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bfloat16_keeps_outputs_in_single_precision():
    x, t = _input(jnp.float32), jnp.asarray(0.3, jnp.float32)
    one, other = (_run(_trained(dtype=d), t, x) for d in (None, jnp.bfloat16))
    assert other.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one)) < 3e-2


def test_blocks_are_compiled_once():
    def length(depth):
        network, x = _make(depth=depth), _input()
        arrays, static = eqx.partition(network, eqx.is_array)
        run = lambda arrays: eqx.combine(arrays, static)(0.5, x, jnp.asarray(0))
        return len(jax.jit(run).lower(arrays).as_text())

    assert length(8) < 1.05 * length(1)


def test_is_saved_with_its_options(tmp_path):
    process = gd.CLD((8, 12, 1))
    model = gd.nn.NetworkModel(process, _trained(out_channels=1), data_std=0.5)
    gd.checkpoints.save(tmp_path / "model.npz", model)
    loaded = gd.checkpoints.load(tmp_path / "model.npz")
    u = process.prior(jr.key(0), (3,), jnp.float32)
    a, b = (m(0.5, u, jnp.arange(3)) for m in (model, loaded))
    assert a.x.shape == (3, 8, 12, 1) and max_difference(a, b) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _make((8, 12)), "height, width, channels"),
        (lambda: _make((8, 13, 1)), r"multiples of `patch`, 2; got \(8, 13, 1\)"),
        (lambda: _make(num_heads=3), "multiple of 4 and of `num_heads`, 3; got 16"),
        (lambda: _make(depth=0), "`depth`"),
        (lambda: _make(attention="flash"), "'cudnn'; got 'flash'"),
        (lambda: _make(num_classes=3, context_size=2), "not both"),
        (lambda: _make()(0.5, jnp.zeros((1, *_shape))), "use `jax.vmap`"),
        (lambda: _make()(0.5, jnp.zeros(_shape)), "needs a condition"),
    ],
)
def test_bad_input_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()
