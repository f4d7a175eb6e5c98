import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._process import AbstractProcess, bounded_log_snr, clock, log_snr_table


class AbstractCoordinate(eqx.Module):
    """The coordinate in which predictions are interpolated by polynomials: a strictly
    monotone, smooth function of time."""

    uses_log_snr: ClassVar[bool] = False
    """Whether it depends on the signal-to-noise ratio."""
    is_logarithm: ClassVar[bool] = False
    """Whether it diverges towards time 0, so that steps to below `t_min` must not
    extrapolate in it."""

    @abc.abstractmethod
    def __call__(
        self, process: AbstractProcess, t: Inexact[Array, " *times"], log_snr: Any
    ) -> Inexact[Array, " *times"]:
        """The coordinate at the given times.

        **Arguments:**

        - `process`: the forward process.
        - `t`: the times.
        - `log_snr`: `process.log_snr` at these times, or `None` for a coordinate that does
            not use it.
        """

    def rescale(
        self,
        values: Inexact[Array, " *times"],
        start: Inexact[Array, ""],
        end: Inexact[Array, ""],
    ) -> Inexact[Array, " *times"]:
        """The variable of the polynomials over a step: a monotone function of the
        coordinate that is 0 at the start of the step and 1 at its end."""
        return (values - start) / jnp.where(start == end, 1, end - start)


class Time(AbstractCoordinate):
    """Time, as in the paper."""

    def __call__(self, process, t, log_snr):
        return t


class LogSNR(AbstractCoordinate):
    """The logarithm of the signal-to-noise ratio, as in DPM-Solver++; below `t_min`, where
    it may be unbounded, linear in time."""

    uses_log_snr: ClassVar[bool] = True
    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr):
        return bounded_log_snr(process, self.unbounded(process, t, log_snr))

    @staticmethod
    def unbounded(process, t, log_snr):
        last = float(log_snr_table(process)[1][0])
        below = last + jnp.maximum(1 - t / process.t_min, 0)
        return jnp.where(t < process.t_min, below, log_snr)


class SoftLogSNR(AbstractCoordinate):
    r"""$\log(1 + e^{1 + \lambda})$ for a log-SNR $\lambda$; below `t_min`, linear in time.
    Data predictions change evenly in it: at high noise in proportion to the signal,
    and elsewhere with the logarithm of the signal-to-noise ratio."""

    uses_log_snr: ClassVar[bool] = True
    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr):
        return jnp.logaddexp(1 + LogSNR.unbounded(process, t, log_snr), 0)


class Clock(AbstractCoordinate):
    """The progress of sampling; see [`gddim_eqx.time_grid`][]. Polynomials are in its
    exponential, with the sign of the exponent such that this slows down over a step.

    Steps of equal size in the clock shrink geometrically in that variable, by a ratio that
    approaches one as the number of steps grows. Each step thus extrapolates over a shorter
    distance than the previous step covered. This keeps large steps stable without changing
    the convergence order.

    **Arguments:**

    - `rate`: the logarithm of the ratio of its speeds at the start and end of sampling.
    """

    rate: float = eqx.field(static=True, default=10.0)

    uses_log_snr: ClassVar[bool] = True

    def __call__(self, process, t, log_snr):
        return clock(process, t, log_snr)

    def rescale(self, values, start, end):
        return slowing(jnp.asarray(self.rate, values.dtype), values, start, end)


def slowing(
    rate: Float[Array, ""],
    values: Inexact[Array, " *times"],
    start: Inexact[Array, ""],
    end: Inexact[Array, ""],
) -> Inexact[Array, " *times"]:
    """As `Clock.rescale`."""
    rate = jnp.where(end > start, -rate, rate)
    whole = jnp.where(start == end, 1, jnp.expm1(rate * (end - start)))
    return jnp.expm1(rate * (values - start)) / whole
