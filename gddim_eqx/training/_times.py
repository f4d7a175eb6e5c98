import abc
import itertools
import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from .._custom_types import Key
from .._misc import as_constant, constant_field, show


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractTimeSampler(eqx.Module):
    """A distribution of the times at which a batch is noised."""

    start: AbstractVar[float | None]
    """The smallest time; `None` for `t_min` of the process."""
    end: AbstractVar[float | None]
    """The largest time; `None` for the end of the process' time axis."""

    def __check_init__(self):
        known = [x for x in (0, self.start, self.end) if x is not None]
        if any(left >= right for left, right in itertools.pairwise(known)):
            raise ValueError(f"Need 0 < `start` < `end`; got {self.start} and {self.end}.")

    @abc.abstractmethod
    def fractions(
        self, key: Key, number: int, dtype
    ) -> tuple[Float[Array, " number"], Float[Array, " number"]]:
        """Sample the positions of times between `start` and `end`.

        **Arguments:**

        - `key`: a random key.
        - `number`: how many to sample.
        - `dtype`: the dtype of the result.

        **Returns:** positions in [0, 1], and importance weights: the weighted mean of a
        function of the positions is, in expectation, its mean over [0, 1].
        """


class UniformTimes(AbstractTimeSampler):
    """Independent uniform times, as in the paper.

    **Arguments:**

    - `start`: the smallest time; by default `t_min` of the process. 1e-5 in the authors'
        code.
    - `end`: the largest; by default the end of the process' time axis.
    """

    start: float | None = constant_field("start", None)
    end: float | None = constant_field("end", None)

    def fractions(self, key, number, dtype):
        return jr.uniform(key, (number,), dtype), jnp.ones(number, dtype)


class StratifiedTimes(AbstractTimeSampler):
    """Stratified uniform times, one per sample in equal intervals, to reduce the variance
    of a batch's mean (Kingma et al. 2021, appendix I.1).

    **Arguments:** as in [`gddim_eqx.training.UniformTimes`][].
    """

    start: float | None = constant_field("start", None)
    end: float | None = constant_field("end", None)

    def fractions(self, key, number, dtype):
        return _stratified(key, number, dtype), jnp.ones(number, dtype)


class ImportanceTimes(AbstractTimeSampler):
    """Importance sampling: times from a density of your choice, weighted by its inverse, so
    that the expected loss is that of uniform times. Stratified too.

    **Arguments:**

    - `density`: positive numbers, to which the density is proportional on equal intervals
        from `start` to `end`. The root mean square of the gradient there is optimal.
    - `start`, `end`: as in [`gddim_eqx.training.UniformTimes`][].
    """

    density: tuple[float, ...] = eqx.field(
        converter=lambda x: tuple(as_constant("density", y) for y in x), static=True
    )
    start: float | None = constant_field("start", None)
    end: float | None = constant_field("end", None)

    def __check_init__(self):
        if not self.density or not all(0 < x < math.inf for x in self.density):
            raise ValueError(
                f"`density` must hold positive, finite numbers; got {show(self.density)}."
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
