import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from .base import AbstractProcess
from .gaussian_path import AbstractGaussianPath


# The logarithm of a signal-to-noise ratio that is added for processes whose signal vanishes
# on the time axis: at times with less signal than this, states hardly differ.
_LEAST = -1.0


def clock(
    process: AbstractProcess,
    t: Inexact[Array, " *times"],
    log_snr: Inexact[Array, " *times"],
) -> Inexact[Array, " *times"]:
    """The progress of sampling, given a time and `process.log_snr` there: 0 at `t_max`, 1
    at `t_min`.

    The mean of two clocks with this range: one linear in the logarithm of the signal-to-
    noise ratio, which is independent of the scale of the data, and one linear in the square
    root of time, which gives more weight to high noise levels, where the overall content of
    samples is determined. For Gaussian paths, whose time may be parametrised in any way,
    time is replaced by the variable in which the logarithm of the variance-preserving
    signal falls quadratically, as it nearly does in time for VP.
    """
    return _mean_of_clocks(process, t, log_snr)


def clock_table(
    process: AbstractProcess,
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """Times from 0 to `t_end`, and the clock at each, in double precision. Below `t_min`,
    where the signal-to-noise ratio may be unbounded, the log-SNR is that at `t_min`."""
    times, log_snr = log_snr_table(process)
    return times, _mean_of_clocks(process, times, log_snr)


def log_snr_at_start(process: AbstractProcess) -> float:
    """`process.log_snr` at `t_max`, where sampling starts."""
    times, table = log_snr_table(process)
    return float(table[times == process.t_max][0])


def bounded_log_snr(process: AbstractProcess, log_snr: Any) -> Any:
    """The log-SNR, but finite where the signal vanishes on the time axis."""
    if process.t_zero_signal > process.t_end:
        return log_snr
    xp = np if isinstance(log_snr, np.ndarray) else jnp
    return xp.logaddexp(log_snr, xp.asarray(_LEAST, log_snr.dtype))


def _mean_of_clocks(process, t, log_snr) -> Any:
    ends = np.array([process.t_max, process.t_min])
    at_ends = np.array([log_snr_at_start(process), log_snr_table(process)[1][0]])
    at_ends, log_snr = (bounded_log_snr(process, x) for x in (at_ends, log_snr))
    pairs = (
        (at_ends, log_snr),
        (_root(process, *x) for x in ((ends, at_ends), (t, log_snr))),
    )
    first, second = (
        (value - float(start)) / (float(end) - float(start))
        for (start, end), value in pairs
    )
    return 0.5 * (first + second)


def _root(process, t, log_snr) -> Any:
    xp = np if isinstance(t, np.ndarray) else jnp
    if not isinstance(process, AbstractGaussianPath):
        return xp.sqrt(t)
    # Kept away from zero, where the root has no derivative.
    return xp.log1p(xp.exp(-2 * xp.where(log_snr < 40, log_snr, 40))) ** 0.25


# The tables of processes still in use.
_tables = weakref.WeakKeyDictionary()


def log_snr_table(
    process: AbstractProcess,
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """Times from 0 to `t_end`, and `process.log_snr` at each, in double precision."""
    try:
        hash(process)
    except TypeError:
        raise ValueError(
            f"The {type(process).__name__} holds arrays. The parameters of a process must "
            "be compile-time constants: store them as Python numbers, in fields with "
            "`equinox.field(static=True)`."
        ) from None
    if process not in _tables:
        quarter = lambda a, b, number: np.linspace(a**0.25, b**0.25, number) ** 4
        early = quarter(0.0, process.t_min, 401)[:-1]
        times = quarter(process.t_min, process.t_max, 4001)
        # Set exactly, as the powers are rounded.
        times[0], times[-1] = process.t_min, process.t_max
        late = np.linspace(process.t_max, process.t_end, 401)[1:]
        late = late[late > process.t_max]
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            # A new function for each call: with a shared one, JAX's cache would keep the
            # process alive.
            log_snr = jax.jit(jax.vmap(lambda t: process.log_snr(t)))
            table = np.asarray(log_snr(jnp.asarray(np.append(times, late), np.float64)))
        table = np.concatenate([np.full(len(early), table[0]), table])
        _tables[process] = np.concatenate([early, times, late]), table
    return _tables[process]
