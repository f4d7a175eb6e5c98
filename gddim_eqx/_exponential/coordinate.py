import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from .._process import AbstractProcess, bounded_log_snr, clock, log_snr_table


class AbstractCoordinate(eqx.Module):
    """The coordinate in which predictions are interpolated by polynomials: a monotone
    function of time."""

    uses_log_snr: ClassVar[bool]
    """Whether it also depends on the signal-to-noise ratio."""
    is_logarithm: ClassVar[bool] = False
    """Whether it diverges towards time 0, so that steps to below `t_min` must not
    extrapolate in it."""

    @abc.abstractmethod
    def __call__(
        self,
        process: AbstractProcess,
        t: Inexact[Array, " *times"],
        log_snr: Any,
        forward: Bool[Array, ""],
    ) -> Inexact[Array, " *times"]:
        """The coordinate at the given times.

        **Arguments:**

        - `process`: the forward process.
        - `t`: the times.
        - `log_snr`: `process.log_snr` at these times, or `None` for a coordinate that does
            not use it.
        - `forward`: whether the solver steps forward in time.
        """


class Time(AbstractCoordinate):
    uses_log_snr: ClassVar[bool] = False

    def __call__(self, process, t, log_snr, forward):
        return t


class SquareRoot(AbstractCoordinate):
    uses_log_snr: ClassVar[bool] = False

    def __call__(self, process, t, log_snr, forward):
        return jnp.sqrt(t)


class Logarithm(AbstractCoordinate):
    """The logarithm of time; below `t_min`, linear in time."""

    uses_log_snr: ClassVar[bool] = False
    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr, forward):
        late = jnp.maximum(t, process.t_min)
        return jnp.log(late) - _share_below(process, t)


class LogSNR(AbstractCoordinate):
    """The logarithm of the signal-to-noise ratio; below `t_min`, where it may be unbounded,
    linear in time."""

    uses_log_snr: ClassVar[bool] = True
    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr, forward):
        return bounded_log_snr(process, self.unbounded(process, t, log_snr))

    @staticmethod
    def unbounded(process, t, log_snr):
        last = float(log_snr_table(process)[1][0])
        return jnp.where(t < process.t_min, last + _share_below(process, t), log_snr)


class SoftLogSNR(AbstractCoordinate):
    r"""$\log(1 + e^{1 + \lambda})$ for a log-SNR $\lambda$; below `t_min`, linear in time.
    Data predictions change evenly in it: at high noise in proportion to the signal,
    and elsewhere with the logarithm of the signal-to-noise ratio."""

    uses_log_snr: ClassVar[bool] = True
    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr, forward):
        return jnp.logaddexp(1 + LogSNR.unbounded(process, t, log_snr), 0)


def _share_below(process, t):
    """From 0 at `t_min` and above to 1 at time 0, where logarithms are unbounded."""
    return jnp.maximum(1 - t / process.t_min, 0)


class Clock(AbstractCoordinate):
    """The exponential of the sampling [clock][gddim_eqx._process.progress.clock], with the
    sign of the exponent such that it slows down.

    Steps of equal size in the clock shrink geometrically in this coordinate, by a ratio
    that approaches one as the number of steps grows. Each step thus extrapolates over a
    shorter distance than the previous step covered. This keeps large steps stable without
    changing the convergence order.
    """

    rate: float = eqx.field(static=True, default=10.0)
    """The logarithm of the ratio of its speeds at the start and end of sampling."""

    uses_log_snr: ClassVar[bool] = True

    def __call__(self, process, t, log_snr, forward):
        return slowing(process, t, log_snr, forward, self.rate)


def slowing(process, t, log_snr, forward, rate):
    rate = jnp.where(forward, rate, -rate).astype(t.dtype)
    return jnp.exp(rate * clock(process, t, log_snr))


CoordinateName = Literal["time", "sqrt", "log", "log_snr", "clock"]

COORDINATES: dict[CoordinateName, AbstractCoordinate] = {
    "time": Time(),
    "sqrt": SquareRoot(),
    "log": Logarithm(),
    "log_snr": LogSNR(),
    "clock": Clock(),
}


def scaled(
    values: Inexact[Array, " *times"], start: Inexact[Array, ""], end: Inexact[Array, ""]
) -> Inexact[Array, " *times"]:
    """Rescale values affinely, mapping `start` to 0 and `end` to 1."""
    return (values - start) / jnp.where(start == end, 1, end - start)
