"""Networks of the paper's Table 4, and smaller ones."""

from collections.abc import Sequence
from typing import Any

from .._custom_types import Key
from ._mlp import TimeMLP
from ._ncsnpp import NCSNpp


_plain: dict[str, Any] = dict(filter_taps=None, progressive_input="none")


def cifar10_cld(*, key: Key, **options: Any) -> NCSNpp:
    """The paper's network for CIFAR10 under CLD: 107,597,446 parameters.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `options`: others of [`gddim_eqx.nn.NCSNpp`][], such as `dtype` and `checkpoint`.
    """
    return NCSNpp((32, 32, 6), num_blocks=8, key=key, **options)


def cifar10_bdm(*, key: Key, **options: Any) -> NCSNpp:
    """The paper's network for CIFAR10 under BDM: that of `cifar10_cld`, with 3 channels.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `options`: others of [`gddim_eqx.nn.NCSNpp`][], such as `dtype` and `checkpoint`.
    """
    return NCSNpp((32, 32, 3), num_blocks=8, key=key, **options)


def celeba_cld(*, key: Key, **options: Any) -> NCSNpp:
    """The paper's network for CELEBA at 64x64 under CLD: 61,811,334 parameters.

    Table 4 lists 2 blocks per resolution; the authors' configuration, and the number of
    parameters in the table, imply 4.

    **Arguments:**

    - `key`: a random key, for the initial parameters.
    - `options`: others of [`gddim_eqx.nn.NCSNpp`][], such as `dtype` and `checkpoint`.
    """
    options = _plain | dict(num_blocks=4, embedding="positional") | options
    return NCSNpp((64, 64, 6), key=key, **options)


def small(
    shape: Sequence[int],
    out_channels: int | None = None,
    *,
    key: Key,
    features: int = 32,
    **options: Any,
) -> NCSNpp:
    """A small network for images of 8x8 to 32x32, which trains on a CPU in minutes.

    **Arguments:**

    - `shape`: the shape of the input, `(height, width, channels)`, with height and width
        multiples of twice `patch`.
    - `out_channels`: by default as many as the input has.
    - `key`: a random key, for the initial parameters.
    - `features`: the number of channels at full resolution.
    - `options`: others of [`gddim_eqx.nn.NCSNpp`][], such as `num_classes`. With `patch=2`,
        which suits images of 28x28, it is three to four times as fast.
    """
    options = dict(multipliers=(1, 2), attention=(), dropout=0.0) | options
    options = _plain | dict(num_blocks=1) | options
    return NCSNpp(shape, out_channels, key=key, features=features, **options)


def mlp(
    shape: Sequence[int],
    out_channels: int | None = None,
    *,
    key: Key,
    width: int = 512,
    **options: Any,
) -> TimeMLP:
    """A network for images of 8x8, which trains faster than `small` on a CPU.

    **Arguments:**

    - `shape`: the shape of the input, `(height, width, channels)`.
    - `out_channels`: by default as many as the input has.
    - `key`: a random key, for the initial parameters.
    - `width`: the width of the layers.
    - `options`: others of [`gddim_eqx.nn.TimeMLP`][], such as `num_classes`.
    """
    out_shape = (*shape[:-1], shape[-1] if out_channels is None else out_channels)
    return TimeMLP(shape, out_shape, key=key, width=width, depth=3, **options)


def points(size: int, *, key: Key, **options: Any) -> TimeMLP:
    """The authors' network for points in the plane.

    **Arguments:**

    - `size`: the size of one sample: 2, or 4 for a process with a velocity.
    - `key`: a random key, for the initial parameters.
    - `options`: others of [`gddim_eqx.nn.TimeMLP`][], such as `num_classes`.
    """
    return TimeMLP(size, key=key, **options)
