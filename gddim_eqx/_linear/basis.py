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
        return _two_sided("hi,wj,...ijc->...hwc", x)

    def inverse(self, x):
        return _two_sided("ih,jw,...ijc->...hwc", x)


class FourierBasis(AbstractBasis):
    r"""A real orthonormal Fourier basis of periodic functions, over the last axis or over
    several axes of an array: that of the Hartley transform, $\cos(k x) + \sin(k x)$ for
    the wave numbers $k$ of `frequencies`.

    **Arguments:**

    - `axes`: negative integers, which count from the last axis.

    **Raises:** `ValueError` for other axes.
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
        """The wave number of every coefficient along an axis of size `n`, negative from the
        middle on. The second derivative on [0, 2 pi] multiplies coefficients by minus its
        square."""
        return np.fft.fftfreq(n, 1 / n)

    def forward(self, x):
        for axis in self.axes:
            z = jnp.moveaxis(jnp.fft.rfft(x, axis=axis, norm="ortho"), axis, -1)
            negative = (z.real + z.imag)[..., 1 : (x.shape[axis] + 1) // 2]
            coefficients = jnp.concatenate([z.real - z.imag, negative[..., ::-1]], -1)
            x = jnp.moveaxis(coefficients, -1, axis)
        return x

    def inverse(self, x):
        return self.forward(x)


@ft.cache
def _cosine_matrix(n: int) -> np.ndarray:
    frequency, place = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * frequency * (2 * place + 1) / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _two_sided(product, x):
    rows, columns = (jnp.asarray(_cosine_matrix(n), x.dtype) for n in x.shape[-3:-1])
    return jnp.einsum(product, rows, columns, x, precision=lax.Precision.HIGHEST)
