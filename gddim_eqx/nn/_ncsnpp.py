import functools as ft
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array

from .._custom_types import Key
from .._misc import check_count, show
from . import _layers as layers
from ._condition import AbstractConditionalNetwork, Embedding, make_embedding
from ._embedding import Fourier, Positional


class NCSNpp(AbstractConditionalNetwork):
    r"""The U-Nets NCSN++ and DDPM++ of Song et al. 2021, as the paper uses them.

    Called as `network(t, x)` on one sample, as `network(t, x, condition)` if it was made
    for a condition, and with `key=key` for dropout; [`gddim_eqx.nn.NetworkModel`][] turns
    it into the model of a process.

    The time embedding is of $999 t$, as in the authors' code, and with
    `embedding="fourier"` of its logarithm, which excludes time 0.

    **Arguments:**

    - `shape`: the shape of one input, `(height, width, channels)`. For a process with a
        velocity, the channels of the data come first, then those of the velocity.
    - `out_channels`: by default as many as the input has.
    - `features`: the number of channels at full resolution.
    - `multipliers`: for each resolution, its number of channels in multiples of `features`.
        Each resolution has half the height and width of the previous one.
    - `num_blocks`: the number of residual blocks per resolution on the way down; on the way
        up there is one more.
    - `attention`: the image heights with attention layers. The middle always has one.
    - `block`: `"biggan"` blocks also halve and double the resolution; `"ddpm"` blocks have
        separate layers for that between them.
    - `filter_taps`: the taps of the FIR filter for up- and downsampling, `(1, 3, 3, 1)` in
        the paper; `None` for means of four pixels on the way down and repeated pixels on
        the way up.
    - `resample_with_convolution`: whether layers that halve or double the resolution
        between `"ddpm"` blocks also convolve.
    - `progressive_input`: with `"residual"` the downsampled input is added at every
        resolution.
    - `embedding`: the time embedding: `"fourier"`, `"positional"`, or `None` for a network
        that does not depend on time.
    - `fourier_scale`: the standard deviation of the frequencies of `"fourier"`.
    - `dropout`: the dropout rate.
    - `skip_rescale`: whether sums of two branches are divided by $\sqrt{2}$.
    - `init_scale`: the scale of the initial weights of the last layer of every block and of
        the network. At 0, they are almost 0.
    - `dtype`: the dtype of computation, for example `jnp.bfloat16`; by default the
        parameters'. Normalisation, time features and parameters stay in single precision.
    - `checkpoint`: whether to use gradient checkpointing, which recomputes values within
        blocks: less memory for a third more time.
    - `patch`: the side of the square patches that are folded into the channels of one pixel
        before the first layer, and unfolded after the last. At 2 everything in between has
        a quarter of the pixels, and takes a quarter of the time. The full resolution of the
        other arguments is then that of the patches.
    - `num_classes`: for data with labels, from 0 to `num_classes - 1`. Their embedding is
        added to that of the time.
    - `context_size`: for data with a context vector, its size.
    - `key`: a random key, for the initial parameters.

    **Raises:** `ValueError` for unknown options, or options that do not fit together.

    ??? cite "References"

        Song et al., "Score-Based Generative Modeling through Stochastic Differential
        Equations", 2021, appendix H. The paper: Table 4.
    """

    time_features: Fourier | Positional | None
    time_layers: tuple[eqx.nn.Linear, eqx.nn.Linear] | None
    first: eqx.nn.Conv2d
    # In the order of their use.
    blocks: tuple[layers.ResidualBlock, ...]
    attentions: tuple[layers.AttentionBlock, ...]
    downsamples: tuple[layers.Downsample, ...]
    upsamples: tuple[layers.Upsample, ...]
    normalisation: eqx.nn.GroupNorm
    last: eqx.nn.Conv2d
    condition: Embedding | None
    shape: tuple[int, ...] = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    multipliers: tuple[int, ...] = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    attention: tuple[int, ...] = eqx.field(static=True)
    block: Literal["biggan", "ddpm"] = eqx.field(static=True)
    filter_taps: tuple[float, ...] | None = eqx.field(static=True)
    resample_with_convolution: bool = eqx.field(static=True)
    progressive_input: Literal["none", "residual"] = eqx.field(static=True)
    embedding: Literal["fourier", "positional"] | None = eqx.field(static=True)
    fourier_scale: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    skip_rescale: bool = eqx.field(static=True)
    init_scale: float = eqx.field(static=True)
    dtype: jnp.dtype | None = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    num_classes: int | None = eqx.field(static=True)
    context_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int | None = None,
        *,
        key: Key,
        features: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        block: Literal["biggan", "ddpm"] = "biggan",
        filter_taps: Sequence[float | int] | None = (1, 3, 3, 1),
        resample_with_convolution: bool = True,
        progressive_input: Literal["none", "residual"] = "residual",
        embedding: Literal["fourier", "positional"] | None = "fourier",
        fourier_scale: float | int = 16.0,
        dropout: float | int = 0.1,
        skip_rescale: bool = True,
        init_scale: float | int = 0.0,
        dtype=None,
        checkpoint: bool = False,
        patch: int = 1,
        num_classes: int | None = None,
        context_size: int | None = None,
    ):
        self.shape = layers.as_image_shape(shape)
        self.out_channels = self.shape[-1] if out_channels is None else out_channels
        self.features, self.num_blocks = features, num_blocks
        self.multipliers, self.attention = tuple(multipliers), tuple(attention)
        self.block, self.progressive_input = block, progressive_input
        self.filter_taps = None if filter_taps is None else tuple(map(float, filter_taps))
        self.resample_with_convolution = resample_with_convolution
        self.embedding, self.fourier_scale = embedding, float(fourier_scale)
        self.dropout, self.skip_rescale = float(dropout), skip_rescale
        self.init_scale, self.checkpoint = float(init_scale), checkpoint
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.patch = patch
        made = make_embedding(num_classes, context_size, 4 * features, key=key)
        self.condition, self.num_classes, self.context_size = made
        self._check()
        keys = (jr.fold_in(key, i) for i in itertools.count())
        size = 4 * features
        self.time_features = self.time_layers = None
        if embedding is not None:
            self.time_features = (
                Fourier(features, self.fourier_scale, key=next(keys))
                if embedding == "fourier"
                else Positional(features)
            )
            self.time_layers = (
                layers.dense(self.time_features.size, size, key=next(keys)),
                layers.dense(size, size, key=next(keys)),
            )
        self.first = layers.convolution(patch**2 * self.shape[-1], features, key=next(keys))
        made = self._make_layers(keys)
        self.blocks, self.attentions, self.downsamples, self.upsamples = made
        size = features * self.multipliers[0]
        self.normalisation = layers.normalisation(size)
        self.last = layers.convolution(
            size, patch**2 * self.out_channels, key=next(keys), scale=self.init_scale
        )

    def _make_layers(self, keys: Iterator[Key]) -> Iterator[tuple[Any, ...]]:
        """All blocks, attentions, downsamples and upsamples."""
        options: Any = dict(rescale=self.skip_rescale, init_scale=self.init_scale)
        taps, convolve = self.filter_taps, self.resample_with_convolution
        down = ft.partial(layers.Downsample, taps=taps)
        makers: dict[str, Callable] = {
            "block": ft.partial(
                layers.ResidualBlock,
                embedding_size=None if self.embedding is None else 4 * self.features,
                dropout=self.dropout,
                taps=layers.BOX if taps is None else taps,
                # The authors' two kinds of blocks are initialised like this.
                shortcut_scale=1.0 if self.block == "biggan" else 0.1,
                **options,
            ),
            "attention": ft.partial(layers.AttentionBlock, **options),
            "down": ft.partial(down, convolve=convolve),
            "pyramid": ft.partial(down, convolve=True),
            "up": ft.partial(layers.Upsample, taps=taps, convolve=convolve),
        }
        made: dict[str, list] = {"block": [], "attention": [], "down": [], "up": []}
        for kind, *sizes in self._plan():
            if kind in makers:
                layer = makers[kind](*sizes, key=next(keys))
                made["down" if kind == "pyramid" else kind].append(layer)
        return map(tuple, made.values())

    def _plan(self) -> Iterator[tuple]:
        """The kinds of layers between the first and the last, in order, each with its
        numbers of channels; and where skip connections begin (`"push"`) and end
        (`"pop"`)."""
        biggan, lowest = self.block == "biggan", len(self.multipliers) - 1
        size, pyramid = self.features, self.patch**2 * self.shape[-1]
        skips = [size]
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(self.num_blocks):
                yield "block", size, (size := self.features * multiplier)
                if self._attends(level):
                    yield "attention", size
                yield ("push",)
                skips.append(size)
            if level < lowest:
                yield ("block", size, size, "down") if biggan else ("down", size, size)
                if self.progressive_input == "residual":
                    yield "pyramid", pyramid, (pyramid := size)
                yield ("push",)
                skips.append(size)
        yield "block", size, size
        yield "attention", size
        yield "block", size, size
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.num_blocks + 1):
                yield ("pop",)
                yield "block", size + skips.pop(), (size := self.features * multiplier)
            if self._attends(level):
                yield "attention", size
            if level > 0:
                yield ("block", size, size, "up") if biggan else ("up", size)

    def _attends(self, level: int) -> bool:
        return self._height(level) in self.attention

    def _height(self, level: int) -> int:
        return self.shape[0] // (self.patch * 2**level)

    def _check(self) -> None:
        for name in ("features", "num_blocks", "out_channels", "patch"):
            check_count(name, getattr(self, name))
        if not self.multipliers:
            raise ValueError("`multipliers` must hold a number per resolution; got none.")
        for multiplier in self.multipliers:
            check_count("multipliers", multiplier)
        times = self.patch * 2 ** (len(self.multipliers) - 1)
        if self.shape[0] % times or self.shape[1] % times:
            raise ValueError(
                f"Height and width must be multiples of {times} to be halved "
                f"{len(self.multipliers) - 1} times, as {len(self.multipliers)} "
                f"`multipliers` and `patch={self.patch}` require; got {self.shape}. Pad "
                "the images, or use fewer `multipliers`."
            )
        for name, known in _known.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {known}; got {show(getattr(self, name))}."
                )
        resolutions = [self._height(i) for i in range(len(self.multipliers))]
        if not set(self.attention) <= set(resolutions):
            raise ValueError(
                f"`attention` must be among the heights {resolutions} of images at the "
                f"resolutions of this network; got {show(self.attention)}."
            )
        if self.condition is not None and self.embedding is None:
            raise ValueError(
                "A condition is added to the time embedding, but `embedding` is None."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1); got {self.dropout}.")
        taps = self.filter_taps
        if taps is not None and (len(taps) < 2 or sum(taps) == 0):
            raise ValueError(
                f"`filter_taps` must be two or more numbers with non-zero sum; got "
                f"{show(taps)}."
            )

    def featurise(self, t: Array) -> Array | None:
        label = jnp.log(999 * t) if self.embedding == "fourier" else 999 * t
        return None if self.time_features is None else self.time_features(label)

    def run(self, x: Array, embedding: Array | None, key: Key | None) -> Array:
        blocks, attentions = iter(self.blocks), iter(self.attentions)
        downsamples, upsamples = iter(self.downsamples), iter(self.upsamples)
        keys = [None] * len(self.blocks) if key is None else jr.split(key, len(self.blocks))
        keys, side = iter(keys), self.patch
        run = eqx.filter_checkpoint if self.checkpoint else lambda block: block

        pyramid = rearrange(x, "(h a) (w b) c -> (a b c) h w", a=side, b=side)
        h = layers.convolve(self.first, pyramid)
        skips = [h]
        for kind, *_ in self._plan():
            match kind:
                case "block":
                    h = run(next(blocks))(h, embedding, next(keys))
                case "attention":
                    h = run(next(attentions))(h)
                case "down":
                    h = next(downsamples)(h)
                case "up":
                    h = next(upsamples)(h)
                case "pyramid":
                    h = pyramid = layers.add(
                        next(downsamples)(pyramid), h, self.skip_rescale
                    )
                case "push":
                    skips.append(h)
                case "pop":
                    h = jnp.concatenate([h, skips.pop()])
        h = layers.convolve(self.last, jax.nn.silu(layers.normalise(self.normalisation, h)))
        return rearrange(h, "(a b c) h w -> (h a) (w b) c", a=side, b=side)


_known = {
    "block": ("biggan", "ddpm"),
    "progressive_input": ("none", "residual"),
    "embedding": ("fourier", "positional", None),
}
