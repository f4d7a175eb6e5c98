"""Networks of the paper's Table 4, and smaller ones."""

from collections.abc import Sequence

from .._custom_types import Key
from ._mlp import TimeMLP
from ._ncsnpp import NCSNpp


def cifar10_cld(*, key: Key, dtype=None, checkpoint: bool = False) -> NCSNpp:
    """The paper's network for CIFAR10 under CLD: 107,597,446 parameters.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `dtype`, `checkpoint`: as in [`gddim_eqx.nn.NCSNpp`][].
    """
    return NCSNpp((32, 32, 6), num_blocks=8, key=key, dtype=dtype, checkpoint=checkpoint)


def cifar10_bdm(*, key: Key, dtype=None, checkpoint: bool = False) -> NCSNpp:
    """The paper's network for CIFAR10 under BDM: that of `cifar10_cld`, with 3 channels.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `dtype`, `checkpoint`: as in [`gddim_eqx.nn.NCSNpp`][].
    """
    return NCSNpp((32, 32, 3), num_blocks=8, key=key, dtype=dtype, checkpoint=checkpoint)


def celeba_cld(*, key: Key, dtype=None, checkpoint: bool = False) -> NCSNpp:
    """The paper's network for CELEBA at 64x64 under CLD: 61,811,334 parameters.

    Table 4 lists 2 blocks per resolution; the authors' configuration, and the number of
    parameters in the table, imply 4.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `dtype`, `checkpoint`: as in [`gddim_eqx.nn.NCSNpp`][].
    """
    return NCSNpp(
        (64, 64, 6),
        num_blocks=4,
        filter_taps=None,
        progressive_input="none",
        embedding="positional",
        key=key,
        dtype=dtype,
        checkpoint=checkpoint,
    )


def small(
    shape: Sequence[int],
    out_channels: int | None = None,
    *,
    key: Key,
    features: int = 32,
    patch: int = 1,
    dtype=None,
    checkpoint: bool = False,
    num_classes: int | None = None,
    context_size: int | None = None,
) -> NCSNpp:
    """A small network for images of 8x8 to 32x32, which trains on a CPU in minutes.

    **Arguments:**

    - `shape`: the shape of the input, `(height, width, channels)`, with height and width
        multiples of twice `patch`.
    - `out_channels`: by default as many as the input has.
    - `key`: a random key, for the initial parameters.
    - `features`: the number of channels at full resolution.
    - `patch`, `dtype`, `checkpoint`, `num_classes`, `context_size`: as in
        [`gddim_eqx.nn.NCSNpp`][]. With `patch=2`,
        which suits images of 28x28, it is three to four times as fast.
    """
    return NCSNpp(
        shape,
        out_channels,
        features=features,
        multipliers=(1, 2),
        num_blocks=1,
        attention=(),
        filter_taps=None,
        progressive_input="none",
        dropout=0.0,
        key=key,
        dtype=dtype,
        checkpoint=checkpoint,
        patch=patch,
        num_classes=num_classes,
        context_size=context_size,
    )


def mlp(
    shape: Sequence[int],
    out_channels: int | None = None,
    *,
    key: Key,
    width: int = 512,
    num_classes: int | None = None,
    context_size: int | None = None,
) -> TimeMLP:
    """A network for images of 8x8, which trains faster than `small` on a CPU.

    **Arguments:**

    - `shape`: the shape of the input, `(height, width, channels)`.
    - `out_channels`: by default as many as the input has.
    - `key`: a random key, for the initial parameters.
    - `width`: the width of the layers.
    - `num_classes`, `context_size`: as in [`gddim_eqx.nn.TimeMLP`][].
    """
    channels = shape[-1] if out_channels is None else out_channels
    return TimeMLP(
        shape,
        (*shape[:-1], channels),
        key=key,
        width=width,
        depth=3,
        num_classes=num_classes,
        context_size=context_size,
    )


def points(
    size: int,
    *,
    key: Key,
    num_classes: int | None = None,
    context_size: int | None = None,
) -> TimeMLP:
    """The authors' network for points in the plane.

    **Arguments:**

    - `size`: the size of one sample: 2, or 4 for a process with a velocity.
    - `key`: a random key, for the initial parameters.
    - `num_classes`, `context_size`: as in [`gddim_eqx.nn.TimeMLP`][].
    """
    return TimeMLP(size, key=key, num_classes=num_classes, context_size=context_size)
