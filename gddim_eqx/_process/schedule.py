import abc
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._misc import check_not_negative, check_positive, constant_field, show


class AbstractSchedule(eqx.Module):
    r"""The noise schedule of a variance-preserving process: a rate $\beta_t$ and derived
    quantities, without loss of precision at either end of the time axis."""

    t_min: eqx.AbstractVar[float]
    """Where sampling ends."""
    t_end: eqx.AbstractVar[float]
    """The end of the time axis, where sampling starts."""
    t_zero_signal: eqx.AbstractVar[float]
    """Where the signal vanishes, or would if time went on; infinity if never."""

    @abc.abstractmethod
    def rate(self, t: Array) -> Array:
        r"""$\beta_t$."""

    @abc.abstractmethod
    def decay(self, t: Array, s: Array) -> Array:
        r"""$\exp(-\frac{1}{2} \int_s^t \beta)$."""

    @abc.abstractmethod
    def variance(self, t: Array) -> Array:
        r"""$1 - \exp(-\int_0^t \beta)$."""


class LinearSchedule(AbstractSchedule):
    r"""$\beta_t = \beta_\text{min} + (\beta_\text{max} - \beta_\text{min})\,t$ on [0, 1]
    (Song et al. 2021).

    **Arguments:**

    - `beta_min`, `beta_max`: the rates at times 0 and 1.
    - `t_min`, `t_end`: times at the end and the start of sampling.

    **Raises:** `ValueError` for numbers out of range.
    """

    beta_min: float = constant_field("beta_min", 0.1, check_not_negative)
    beta_max: float = constant_field("beta_max", 20.0, check_not_negative)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    def __check_init__(self):
        if self.beta_min == self.beta_max == 0:
            raise ValueError("`beta_min` and `beta_max` must not both be zero.")

    t_zero_signal = math.inf

    def _integral(self, t, s):
        return (t - s) * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * (t + s))

    def rate(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def decay(self, t, s):
        return jnp.exp(-0.5 * self._integral(t, s))

    def variance(self, t):
        return -jnp.expm1(-self._integral(t, jnp.zeros_like(t)))


class CosineSchedule(AbstractSchedule):
    r"""$\exp(-\int_0^t \beta) = \cos^2(\phi_t) / \cos^2(\phi_0)$ with
    $\phi_t = \frac{\pi}{2} \frac{t + o}{1 + o}$ (Nichol & Dhariwal 2021).

    The signal vanishes at t = 1, so the time axis ends earlier: by default at 0.9946, as
    in DPM-Solver (Lu et al. 2022).

    **Arguments:**

    - `offset`: positive; keeps the rate of noise from vanishing at time 0.
    - `t_min`, `t_end`: times at the end and the start of sampling, below 1.

    **Raises:** `ValueError` for numbers out of range.
    """

    offset: float = constant_field("offset", 0.008, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 0.9946)

    def __check_init__(self):
        if not self.t_end < 1:
            raise ValueError(f"`t_end` must be less than 1; got {self.t_end}.")

    t_zero_signal = 1.0

    def _cosine(self, t):
        # As the sine of the distance to the end: exact there.
        return jnp.sin(0.5 * np.pi * (1 - t) / (1 + self.offset))

    def rate(self, t):
        unit = 0.5 * np.pi / (1 + self.offset)
        return 2 * unit * jnp.sin(unit * (t + self.offset)) / self._cosine(t)

    def decay(self, t, s):
        return self._cosine(t) / self._cosine(s)

    def variance(self, t):
        unit = 0.5 * np.pi / (1 + self.offset)
        start = math.cos(unit * self.offset)
        return jnp.sin(unit * t) * jnp.sin(unit * (t + 2 * self.offset)) / start**2


def as_schedule(schedule: "str | AbstractSchedule") -> AbstractSchedule:
    """A schedule, given itself or its name."""
    named = {"linear": LinearSchedule, "cosine": CosineSchedule}
    if isinstance(schedule, AbstractSchedule):
        return schedule
    if not isinstance(schedule, str) or schedule not in named:
        raise ValueError(
            f"`schedule` must be one of {', '.join(map(repr, named))} or an "
            f"`AbstractSchedule`; got {show(schedule)}."
        )
    return named[schedule]()
