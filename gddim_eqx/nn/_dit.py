import functools as ft
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from einops import rearrange
from jaxtyping import Array, Inexact

from .._custom_types import Key
from .._misc import check_count, show
from ._condition import AbstractConditionalNetwork, Embedding, make_embedding
from ._embedding import Positional
from ._layers import as_image_shape, dense


Tokens = Inexact[Array, "tokens width"]


class DiT(AbstractConditionalNetwork):
    r"""The diffusion transformer, with adaLN-Zero conditioning, for images in patches.

    Called as `network(t, x)` on one sample, or as `network(t, x, condition)`;
    [`gddim_eqx.nn.NetworkModel`][] turns it into the model of a process. At initialisation
    every block is the identity, and the output is almost 0. All blocks are compiled as one,
    in a scan.

    Dimensions of DiT-S, B, L and XL are `width=384, depth=12, num_heads=6`; `768, 12, 12`;
    `1024, 24, 16`; and `1152, 28, 16`.

    ??? cite "References"

        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023.
    """

    first: eqx.nn.Linear
    time_layers: tuple[eqx.nn.Linear, eqx.nn.Linear]
    blocks: "_Block"  # Every array has a leading axis of length `depth`.
    modulation: eqx.nn.Linear
    last: eqx.nn.Linear
    condition: Embedding | None
    shape: tuple[int, ...] = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    mlp_ratio: int = eqx.field(static=True)
    dtype: jnp.dtype | None = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)
    attention: Literal["xla", "cudnn"] | None = eqx.field(static=True)
    num_classes: int | None = eqx.field(static=True)
    context_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int | None = None,
        *,
        key: Key,
        patch: int = 4,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: int = 4,
        dtype=None,
        checkpoint: bool = False,
        attention: Literal["xla", "cudnn"] | None = None,
        num_classes: int | None = None,
        context_size: int | None = None,
    ):
        """**Arguments:**

        - `shape`: the shape of one input, `(height, width, channels)`, with height and
            width multiples of `patch`. For a process with a velocity, the channels of the
            data come first, then those of the velocity.
        - `out_channels`: by default as many as the input has.
        - `patch`: the side of the square patches, in pixels: 2 or 4 for images of 28x28 to
            64x64.
        - `width`: the size of a token, a multiple of 4 and of `num_heads`.
        - `depth`: the number of blocks.
        - `num_heads`: the number of attention heads.
        - `mlp_ratio`: the width of the hidden layers, in multiples of `width`.
        - `dtype`: the dtype of computation, for example `jnp.bfloat16`; by default the
            parameters'. Normalisation, time features and parameters stay in single
            precision.
        - `checkpoint`: whether to use gradient checkpointing, which recomputes values
            within blocks: less memory for a third more time.
        - `attention`: the implementation of `jax.nn.dot_product_attention`: `"cudnn"` is
            flash attention, on GPUs and in half precision. By default JAX's choice.
        - `num_classes`: for data with labels, from 0 to `num_classes - 1`.
        - `context_size`: for data with a context vector, its size.
        - `key`: a random key, for the initial parameters.

        **Raises:** `ValueError` for options that do not fit together.
        """
        self.shape = as_image_shape(shape)
        self.out_channels = self.shape[-1] if out_channels is None else out_channels
        self.patch, self.width, self.depth = patch, width, depth
        self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.checkpoint, self.attention = checkpoint, attention
        made = make_embedding(num_classes, context_size, width, key=key)
        self.condition, self.num_classes, self.context_size = made
        self._check()
        keys = jr.split(key, 6)
        self.first = dense(patch**2 * self.shape[-1], width, key=keys[0])
        self.time_layers = (
            dense(_num_time_features, width, key=keys[1]),
            dense(width, width, key=keys[2]),
        )
        block = ft.partial(_Block, width, num_heads, mlp_ratio * width)
        self.blocks = eqx.filter_vmap(lambda key: block(key=key))(jr.split(keys[3], depth))
        self.modulation = dense(width, 2 * width, key=keys[4], scale=0.0)
        out_size = patch**2 * self.out_channels
        self.last = dense(width, out_size, key=keys[5], scale=0.0)

    def _check(self) -> None:
        for name in ("out_channels", "patch", "width", "depth", "num_heads", "mlp_ratio"):
            check_count(name, getattr(self, name))
        if self.shape[0] % self.patch or self.shape[1] % self.patch:
            raise ValueError(
                f"Height and width must be multiples of `patch`, {self.patch}; got "
                f"{self.shape}."
            )
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"`width` must be a multiple of 4 and of `num_heads`, {self.num_heads}; "
                f"got {self.width}."
            )
        if self.attention not in (None, "xla", "cudnn"):
            raise ValueError(
                f"`attention` must be None, 'xla' or 'cudnn'; got {show(self.attention)}."
            )

    def featurise(self, t: Array) -> Array:
        return Positional(_num_time_features)(999 * t)

    def run(self, x: Array, embedding: Array, key: Key | None) -> Array:
        embedding, side = jax.nn.silu(embedding), self.patch
        rows, columns = (n // side for n in self.shape[:2])
        h = rearrange(x, "(h a) (w b) c -> (h w) (a b c)", a=side, b=side)
        positions = jnp.asarray(_positions(rows, columns, self.width), h.dtype)
        h = jax.vmap(self.first)(h) + positions
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(h, arrays):
            block = eqx.combine(arrays, static)
            run = eqx.filter_checkpoint(block) if self.checkpoint else block
            return run(h, embedding, self.attention), None

        h, _ = jax.lax.scan(step, h, arrays)
        shift, scale = jnp.split(self.modulation(embedding), 2)
        h = jax.vmap(self.last)(_modulated(h, shift, scale))
        return rearrange(h, "(h w) (a b c) -> (h a) (w b) c", h=rows, a=side, b=side)


_num_time_features = 256


class _Block(eqx.Module):
    """Attention and a multilayer perceptron, with shift, scale and gate (adaLN-Zero)."""

    modulation: eqx.nn.Linear
    queries_keys_values: eqx.nn.Linear
    mixed: eqx.nn.Linear
    hidden: eqx.nn.Linear
    last: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, hidden_width: int, *, key: Key):
        keys = jr.split(key, 5)
        self.modulation = dense(width, 6 * width, key=keys[0], scale=0.0)
        self.queries_keys_values = dense(width, 3 * width, key=keys[1])
        self.mixed = dense(width, width, key=keys[2])
        self.hidden = dense(width, hidden_width, key=keys[3])
        self.last = dense(hidden_width, width, key=keys[4])
        self.num_heads = num_heads

    def __call__(self, h: Tokens, embedding: Inexact[Array, " width"], attention) -> Tokens:
        modulation = jnp.split(self.modulation(embedding), 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        h = h + gate[None] * self._attend(_modulated(h, shift, scale), attention)
        y = jax.vmap(self.hidden)(_modulated(h, mlp_shift, mlp_scale))
        return h + mlp_gate[None] * jax.vmap(self.last)(jax.nn.gelu(y))

    def _attend(self, h: Tokens, attention) -> Tokens:
        parts = jax.vmap(self.queries_keys_values)(h)
        q, k, v = rearrange(parts, "t (n h d) -> n t h d", n=3, h=self.num_heads)
        # JAX computes the softmax in single precision, of any dtype.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, implementation=attention)
        return jax.vmap(self.mixed)(rearrange(y, "t h d -> t (h d)"))


def _modulated(h: Tokens, shift: Array, scale: Array) -> Tokens:
    normalise = eqx.nn.LayerNorm(h.shape[-1], 1e-6, use_weight=False, use_bias=False)
    return jax.vmap(normalise)(h) * (1 + scale)[None] + shift[None]


def _positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of the row, then of the column, `(rows * columns, width)`."""
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    place = np.moveaxis(np.indices((rows, columns)), 0, -1).reshape(-1, 2)
    phases = place[:, :, None] * rates
    return np.concatenate([np.sin(phases), np.cos(phases)], -1).reshape(len(place), width)
