"""Time embeddings for networks."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact

from .._custom_types import Key


def sines(phases: Inexact[Array, " size"]) -> Inexact[Array, " 2*size"]:
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)])


class Fourier(eqx.Module):
    """Sines and cosines at random frequencies, which are not trained (Tancik et al. 2020).

    **Arguments:**

    - `size`: the number of frequencies; there are twice as many features.
    - `scale`: the standard deviation of the frequencies.
    """

    frequencies: Float[Array, " size"]

    def __init__(self, size: int, scale: float, *, key: Key):
        self.frequencies = scale * jr.normal(key, (size,))

    @property
    def size(self) -> int:
        return 2 * self.frequencies.shape[0]

    def __call__(self, t: Inexact[Array, ""]) -> Inexact[Array, " features"]:
        return sines(t * jax.lax.stop_gradient(self.frequencies) * 2 * math.pi)


class Positional(eqx.Module):
    """Sines and cosines at frequencies from 1 to 1 / 10,000 (Vaswani et al. 2017).

    **Arguments:**

    - `size`: the number of features.
    """

    size: int = eqx.field(static=True)

    def __call__(self, t: Inexact[Array, ""]) -> Inexact[Array, " features"]:
        half = self.size // 2
        # Rounded as in the authors' code: phases go up to 999.
        rates = jnp.arange(half, dtype=t.dtype) * -(math.log(10_000) / (half - 1))
        features = sines(t * jnp.exp(rates))
        return jnp.pad(features, (0, self.size % 2))
