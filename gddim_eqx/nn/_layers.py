"""The layers of NCSN++, channels first as in Equinox: `(channels, height, width)`."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact

from .._custom_types import Key
from .._linear import at_least_single, coefficient_dtype
from .._misc import as_shape


Image = Inexact[Array, "_ _ _"]
Taps = tuple[float, ...]

# A box filter: upsampling repeats pixels, and downsampling averages them.
BOX = (1.0, 1.0)


def as_image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """**Raises:** `ValueError` unless given (height, width, channels)."""
    shape = as_shape(tuple(shape))
    if len(shape) != 3:
        raise ValueError(f"`shape` must be (height, width, channels); got {shape}.")
    return shape


def _initialised(kind, *args, key: Key, scale: float, **options):
    """A layer initialised as in Ho et al. 2020: uniform, with variance `scale` divided by
    the mean of fan-in and fan-out. A scale of 0 means almost 0, so that gradients do not
    vanish. The bias is 0."""
    # Equinox's own initial weights are not sampled: only their shapes are needed.
    layer = eqx.filter_eval_shape(kind, *args, **options, key=key)
    shape, dtype = layer.weight.shape, layer.weight.dtype
    out_size, size, *window = shape
    mean = (size + out_size) / 2 * math.prod(window)
    width = np.sqrt(np.asarray(3, dtype) * np.asarray((scale or 1e-10) / mean, dtype))
    weight = _uniform(key, shape, dtype) * width
    zeros = jnp.zeros(layer.bias.shape, dtype)
    return eqx.tree_at(lambda x: (x.weight, x.bias), layer, (weight, zeros))


def _uniform(key: Key, shape: tuple[int, ...], dtype) -> Array:
    """Uniform samples in [-1, 1)."""
    if isinstance(jnp.zeros(()), Tracer):
        # So that XLA can shard it.
        return jr.uniform(key, shape, dtype, -1)
    # Compilation dominates for small arrays, so sizes are rounded up to powers of two, and
    # share compiled code. The numbers are the same.
    size = math.prod(shape)
    larger = 1 << (size - 1).bit_length()
    return jr.uniform(key, (larger,), dtype, -1)[:size].reshape(shape)


def convolution(
    channels: int,
    out_channels: int,
    size: int = 3,
    *,
    key: Key,
    scale: float = 1.0,
    stride: int = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
) -> eqx.nn.Conv2d:
    args = (channels, out_channels, size, stride, padding)
    return _initialised(eqx.nn.Conv2d, *args, key=key, scale=scale)


def convolve(layer: eqx.nn.Conv2d, x: Image) -> Image:
    """Apply a layer to an image, with channels last: on CPUs only this layout is fast, and
    XLA does not change layouts within loops, such as those of solvers."""
    y = _convolve(x, layer.weight, layer.stride, layer.padding)
    return y if layer.bias is None else y + layer.bias


def _convolve(x: Image, weight: Array, stride, padding, dilation=(1, 1)) -> Image:
    y = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, 0, -1)[None],
        jnp.transpose(weight, (2, 3, 1, 0)),
        stride,
        padding,
        dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.moveaxis(y[0], -1, 0)


def dense(size: int, out_size: int, *, key: Key, scale: float = 1.0) -> eqx.nn.Linear:
    return _initialised(eqx.nn.Linear, size, out_size, key=key, scale=scale)


def normalisation(channels: int) -> eqx.nn.GroupNorm:
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"A layer would have {channels} channels, which cannot be normalised in "
            f"{groups} equal groups. Make `features` a multiple of 4, and of 32 if there "
            "are layers of more than 128 channels."
        )
    return eqx.nn.GroupNorm(groups, channels, eps=1e-6)


def normalise(layer: eqx.nn.GroupNorm, x: Image) -> Image:
    """Apply a layer to an image. The weights first multiply the scale of each group: if
    they multiplied the image, devices would exchange their gradient before it is summed
    over pixels."""
    groups, each = layer.groups, len(x) // layer.groups
    dtype = at_least_single(x.dtype)
    y = x.astype(dtype).reshape(groups, -1)
    centred = y - y.mean(1, keepdims=True)
    inverse = jax.lax.rsqrt((centred**2).mean(1) + layer.eps)
    assert layer.weight is not None and layer.bias is not None
    scale = layer.weight.astype(dtype) * jnp.repeat(inverse, each)
    bias = layer.bias.astype(dtype)
    y = centred.reshape(x.shape) * scale[:, None, None] + bias[:, None, None]
    return y.astype(x.dtype)


def _filtered(
    x: Image, taps: Taps, total: int, *, up: int = 1, down: int = 1, gain: int = 1
) -> Image:
    """Insert zeros between pixels, convolve with the taps along both axes, and keep every
    `down`-th pixel. `total` zeros pad the image, besides those after each pixel."""
    low, high = (total + 1) // 2 + gain - 1, total // 2
    for axis in (1, 2):
        padding = [(0, 0, 0)] * 3
        padding[axis] = (low, high + gain - 1, up - 1)
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
        end = x.shape[axis] - len(taps) + 1
        parts = (
            gain * tap / sum(taps) * jax.lax.slice_in_dim(x, i, i + end, down, axis)
            for i, tap in enumerate(reversed(taps))
        )
        x = ft.reduce(jnp.add, parts)
    return x


def enlarge(x: Image, taps: Taps) -> Image:
    """An image of twice the height and width."""
    return _filtered(x, taps, len(taps) - 2, up=2, gain=2)


def reduce(x: Image, taps: Taps) -> Image:
    """An image of half the height and width."""
    return _filtered(x, taps, len(taps) - 2, down=2)


class Downsample(eqx.Module):
    """Halve height and width, with or without a filter and a convolution."""

    convolution: eqx.nn.Conv2d | None
    taps: Taps | None = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        out_channels: int,
        taps: Taps | None,
        convolve: bool,
        *,
        key: Key,
    ):
        # Strides start at the first pixel, as in TensorFlow.
        padding = ((0, 1), (0, 1)) if taps is None else 0
        self.convolution, self.taps = None, taps
        if convolve:
            args = (channels, out_channels)
            self.convolution = convolution(*args, key=key, stride=2, padding=padding)

    def __call__(self, x: Image) -> Image:
        if self.convolution is None:
            return reduce(x, BOX if self.taps is None else self.taps)
        if self.taps is not None:
            x = _filtered(x, self.taps, len(self.taps))
        return convolve(self.convolution, x)


class Upsample(eqx.Module):
    """Double height and width, with or without a filter and a convolution."""

    convolution: eqx.nn.Conv2d | None
    taps: Taps | None = eqx.field(static=True)

    def __init__(self, channels: int, taps: Taps | None, convolve: bool, *, key: Key):
        # A filter, if any, is applied after a transposed convolution.
        self.convolution = convolution(channels, channels, key=key) if convolve else None
        self.taps = taps

    def __call__(self, x: Image) -> Image:
        if self.convolution is None or self.taps is None:
            x = enlarge(x, BOX if self.taps is None else self.taps)
            return x if self.convolution is None else convolve(self.convolution, x)
        weight, bias = self.convolution.weight, self.convolution.bias
        x = _convolve(x, weight, (1, 1), [(2, 2), (2, 2)], dilation=(2, 2))
        x = _filtered(x, self.taps, len(self.taps) - 4, gain=2)
        return x if bias is None else x + bias


def add(x: Image, y: Image, rescale: bool) -> Image:
    """The sum of two branches, with the variance of one if rescaled."""
    return (x + y) / math.sqrt(2) if rescale else x + y


class ResidualBlock(eqx.Module):
    """Two convolutions with the time embedding added in between, and a shortcut. A BigGAN
    block may also double or halve height and width."""

    first_normalisation: eqx.nn.GroupNorm
    first_convolution: eqx.nn.Conv2d
    embedding: eqx.nn.Linear | None
    second_normalisation: eqx.nn.GroupNorm
    second_convolution: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d | None
    dropout: eqx.nn.Dropout
    resample: Literal["up", "down"] | None = eqx.field(static=True)
    taps: Taps = eqx.field(static=True)
    rescale: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        out_channels: int,
        resample: Literal["up", "down"] | None = None,
        *,
        key: Key,
        embedding_size: int | None,
        dropout: float,
        rescale: bool,
        init_scale: float,
        shortcut_scale: float,
        taps: Taps = BOX,
    ):
        keys = jr.split(key, 4)
        self.first_normalisation = normalisation(channels)
        self.first_convolution = convolution(channels, out_channels, key=keys[0])
        self.embedding = self.shortcut = None
        if embedding_size is not None:
            self.embedding = dense(embedding_size, out_channels, key=keys[1])
        self.second_normalisation = normalisation(out_channels)
        self.second_convolution = convolution(
            out_channels, out_channels, key=keys[2], scale=init_scale
        )
        if channels != out_channels or resample is not None:
            options: Any = dict(key=keys[3], scale=shortcut_scale)
            self.shortcut = convolution(channels, out_channels, 1, **options)
        self.dropout = eqx.nn.Dropout(dropout)
        self.resample, self.taps, self.rescale = resample, taps, rescale

    def __call__(
        self, x: Image, embedding: Float[Array, " size"] | None, key: Key | None
    ) -> Image:
        h = jax.nn.silu(normalise(self.first_normalisation, x))
        if self.resample is not None:
            change = {"up": enlarge, "down": reduce}[self.resample]
            h, x = change(h, self.taps), change(x, self.taps)
        h = convolve(self.first_convolution, h)
        if self.embedding is not None and embedding is not None:
            h = h + self.embedding(jax.nn.silu(embedding))[:, None, None]
        h = jax.nn.silu(normalise(self.second_normalisation, h))
        h = self.dropout(h, key=key, inference=key is None)
        h = convolve(self.second_convolution, h)
        x = x if self.shortcut is None else convolve(self.shortcut, x)
        return add(x, h, self.rescale)


class AttentionBlock(eqx.Module):
    """Single-head self-attention over pixels."""

    normalisation: eqx.nn.GroupNorm
    query: eqx.nn.Conv2d
    key: eqx.nn.Conv2d
    value: eqx.nn.Conv2d
    output: eqx.nn.Conv2d
    rescale: bool = eqx.field(static=True)

    def __init__(self, channels: int, *, key: Key, rescale: bool, init_scale: float):
        keys = jr.split(key, 4)
        scales = (0.1, 0.1, 0.1, init_scale)
        self.normalisation = normalisation(channels)
        self.query, self.key, self.value, self.output = (
            convolution(channels, channels, 1, key=k, scale=s) for k, s in zip(keys, scales)
        )
        self.rescale = rescale

    def __call__(self, x: Image) -> Image:
        h = normalise(self.normalisation, x)
        query, key, value = (
            convolve(layer, h).reshape(h.shape[0], -1)
            for layer in (self.query, self.key, self.value)
        )
        scores = jnp.matmul(query.T, key, preferred_element_type=coefficient_dtype(h))
        weights = jax.nn.softmax(scores / math.sqrt(h.shape[0]))
        h = (value @ weights.astype(h.dtype).T).reshape(h.shape)
        return add(x, convolve(self.output, h), self.rescale)
