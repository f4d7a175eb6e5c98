import abc
import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from .._custom_types import Key
from .._misc import as_constant, constant_field


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractTimes(eqx.Module):
    """How the times are drawn at which a batch is noised."""

    start: AbstractVar[float]
    """The least time."""
    end: AbstractVar[float | None]
    """The greatest time; `None` for the end of the process' time axis."""

    def __check_init__(self):
        if self.start <= 0 or (self.end is not None and self.end <= self.start):
            raise ValueError(f"Need 0 < `start` < `end`; got {self.start} and {self.end}.")

    @abc.abstractmethod
    def fractions(
        self, key: Key, number: int, dtype
    ) -> tuple[Float[Array, " number"], Float[Array, " number"]]:
        """Draw where times lie between `start` and `end`.

        **Arguments:**

        - `key`: a random key.
        - `number`: how many.
        - `dtype`: of the result.

        **Returns:** numbers in [0, 1], and weights: the mean of a function of the numbers
        times the weights is, in expectation, its mean over [0, 1].
        """


class UniformTimes(AbstractTimes):
    """Independent uniform times: what the paper trains with.

    **Arguments:**

    - `start`: the least time, 1e-5 in the authors' code.
    - `end`: the greatest; by default the end of the process' time axis.
    """

    start: float = constant_field("start", 1e-5)
    end: float | None = constant_field("end", None)

    def fractions(self, key, number, dtype):
        return jr.uniform(key, (number,), dtype), jnp.ones(number, dtype)


class StratifiedTimes(AbstractTimes):
    """Uniform times, one in each of as many equal intervals as the batch is large, so
    that the mean of a batch varies less (Kingma et al. 2021, appendix I.1).

    **Arguments:** as [`gddim_eqx.training.UniformTimes`][].
    """

    start: float = constant_field("start", 1e-5)
    end: float | None = constant_field("end", None)

    def fractions(self, key, number, dtype):
        return _stratified(key, number, dtype), jnp.ones(number, dtype)


class ImportanceTimes(AbstractTimes):
    """Times from a density of your choice, each weighted by its inverse, so that the loss
    is in expectation what uniform times give. Stratified too.

    **Arguments:**

    - `density`: positive numbers, to which the density is proportional on equal intervals
        from `start` to `end`. Best is the root mean square of the gradient there.
    - `start`, `end`: as [`gddim_eqx.training.UniformTimes`][].
    """

    density: tuple[float, ...] = eqx.field(
        converter=lambda x: tuple(as_constant("density", y) for y in x), static=True
    )
    start: float = constant_field("start", 1e-5)
    end: float | None = constant_field("end", None)

    def __check_init__(self):
        if not self.density or not all(0 < x < math.inf for x in self.density):
            raise ValueError(
                f"`density` must hold positive, finite numbers; got {self.density}."
            )

    def fractions(self, key, number, dtype):
        density = np.asarray(self.density) / np.mean(self.density)
        cumulative = np.cumsum(density) / len(density)
        edges = jnp.asarray(np.concatenate([[0.0], cumulative[:-1], [1.0]]), dtype)
        density = jnp.asarray(density, dtype)
        draw = _stratified(key, number, dtype)
        interval = jnp.searchsorted(edges[1:-1], draw, side="right")
        within = (draw - edges[interval]) / (edges[interval + 1] - edges[interval])
        return (interval.astype(dtype) + within) / len(density), 1 / density[interval]


def _stratified(key: Key, number: int, dtype) -> Float[Array, " number"]:
    draw = jr.uniform(key, (number,), dtype)
    return (jnp.arange(number, dtype=dtype) + draw) / max(number, 1)
