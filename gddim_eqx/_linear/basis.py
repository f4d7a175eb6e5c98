import abc
import functools as ft

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .._misc import show


class AbstractBasis(eqx.Module):
    """A fixed orthogonal basis for the data, in which a process acts coordinate by
    coordinate."""

    @abc.abstractmethod
    def forward(self, x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
        """Data to coefficients, for an array of shape `(*batch, *shape)`."""

    @abc.abstractmethod
    def inverse(self, x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
        """Coefficients to data, for an array of shape `(*batch, *shape)`."""


class IdentityBasis(AbstractBasis):
    """The data's own coordinates."""

    def forward(self, x):
        return x

    def inverse(self, x):
        return x


class CosineBasis(AbstractBasis):
    """The orthonormal type-II discrete cosine transform over height and width of
    `(*batch, height, width, channel)` images.

    Computed as a product with two small matrices, which on CPU is 1.5 to 3 times faster
    than `jax.scipy.fft.dctn` up to 128 x 128.
    """

    def forward(self, x):
        rows, columns = (_cosine_matrix(n) for n in x.shape[-3:-1])
        return _two_sided(rows, columns, x)

    def inverse(self, x):
        rows, columns = (_cosine_matrix(n) for n in x.shape[-3:-1])
        return _two_sided(rows.T, columns.T, x)


class FourierBasis(AbstractBasis):
    """The real orthonormal Fourier basis of periodic functions, over the last axis or over
    several axes of an array.

    Along an axis of size n the coefficients are those of the cosines of wave numbers 0 to
    n // 2, and then those of the sines, from 1 on.
    """

    axes: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    def __check_init__(self):
        if not all(isinstance(axis, int) and axis < 0 for axis in self.axes):
            raise ValueError(
                "`axes` must be negative integers, which count from the last axis, as "
                f"leading axes are those of the batch; got {show(self.axes)}."
            )

    @staticmethod
    def frequencies(n: int) -> np.ndarray:
        """The wave number of every coefficient along an axis of size `n`. The second
        derivative on [0, 2 pi] multiplies coefficients by minus its square."""
        return np.concatenate([np.arange(n // 2 + 1), np.arange(1, (n + 1) // 2)])

    def forward(self, x):
        for axis in self.axes:
            n = x.shape[axis]
            z = jnp.fft.rfft(x, axis=axis, norm="ortho")
            z = jnp.moveaxis(z, axis, -1)
            parts = [z.real, -z.imag[..., 1 : (n + 1) // 2]]
            x = jnp.concatenate(parts, -1) * _fourier_scale(n, x)
            x = jnp.moveaxis(x, -1, axis)
        return x

    def inverse(self, x):
        for axis in self.axes:
            n = x.shape[axis]
            x = jnp.moveaxis(x, axis, -1) / _fourier_scale(n, x)
            cosines, sines = jnp.split(x, [n // 2 + 1], -1)
            # The mean and, if any, the highest cosine have no sine.
            rest = cosines.shape[-1] - 1 - sines.shape[-1]
            sines = jnp.pad(sines, [(0, 0)] * (x.ndim - 1) + [(1, rest)])
            z = lax.complex(cosines, -sines)
            x = jnp.fft.irfft(z, n, axis=-1, norm="ortho")
            x = jnp.moveaxis(x, -1, axis)
        return x


FourierBasis.__init__.__doc__ = """**Arguments:**

- `axes`: negative integers, which count from the last axis.

**Raises:** `ValueError` for other axes.
"""


def _fourier_scale(n, x):
    """What makes the transform orthonormal, for the coefficients along the last axis."""
    once = (FourierBasis.frequencies(n) * 2) % n == 0
    scale = np.where(once, 1, np.sqrt(2)).reshape([1] * (x.ndim - 1) + [n])
    return jnp.asarray(scale, x.dtype)


@ft.cache
def _cosine_matrix(n: int) -> np.ndarray:
    frequency, place = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * frequency * (2 * place + 1) / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _two_sided(rows, columns, x):
    rows = jnp.asarray(rows, x.dtype)
    columns = jnp.asarray(columns, x.dtype)
    return jnp.einsum(
        "hi,wj,...ijc->...hwc", rows, columns, x, precision=lax.Precision.HIGHEST
    )
