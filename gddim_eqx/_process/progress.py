import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .base import AbstractProcess
from .gaussian_path import AbstractGaussianPath


# The logarithm of a signal-to-noise ratio that is added for processes whose signal vanishes
# on the time axis: at times with less signal than this, states hardly differ.
_LEAST = -1.0


def clock(process: AbstractProcess, t: Any, log_snr: Any) -> Any:
    """The progress of sampling, given times and `process.log_snr` there, both NumPy or both
    JAX arrays: 0 at `t_max`, 1 at `t_min`.

    The mean of two clocks with this range: one linear in the logarithm of the signal-to-
    noise ratio, which is independent of the scale of the data, and one linear in the square
    root of time, which gives more weight to high noise levels, where the overall content of
    samples is determined. For Gaussian paths, whose time may be parametrised in any way,
    time is replaced by the variable in which the logarithm of the variance-preserving
    signal falls quadratically, as it nearly does in time for VP.
    """
    ends = np.array([process.t_max, process.t_min])
    at_ends = np.array([log_snr_at_start(process), log_snr_table(process)[1][0]])
    clocks = zip(_clocks(process, t, log_snr), _clocks(process, ends, at_ends))
    first, second = (
        (value - float(start)) / (float(end) - float(start))
        for value, (start, end) in clocks
    )
    return 0.5 * (first + second)


def _clocks(process, t, log_snr) -> tuple[Any, Any]:
    """The variables in which the two clocks are linear."""
    log_snr, xp = bounded_log_snr(process, log_snr), log_snr.__array_namespace__()
    if not isinstance(process, AbstractGaussianPath):
        return log_snr, xp.sqrt(t)
    # Kept away from zero, where the root has no derivative.
    bounded = xp.where(log_snr < 40, log_snr, 40)
    return log_snr, xp.log1p(xp.exp(-2 * bounded)) ** 0.25


def clock_table(
    process: AbstractProcess,
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """Times from 0 to `t_end`, and the clock at each, in double precision. Below `t_min`,
    where the signal-to-noise ratio may be unbounded, the log-SNR is that at `t_min`."""
    times, log_snr = log_snr_table(process)
    return times, clock(process, times, log_snr)


def log_snr_at_start(process: AbstractProcess) -> float:
    """`process.log_snr` at `t_max`, where sampling starts."""
    times, table = log_snr_table(process)
    return float(table[times == process.t_max][0])


def bounded_log_snr(process: AbstractProcess, log_snr: Any) -> Any:
    """The log-SNR, but finite where the signal vanishes on the time axis."""
    if process.t_zero_signal > process.t_end:
        return log_snr
    xp = log_snr.__array_namespace__()
    return xp.logaddexp(log_snr, xp.asarray(_LEAST, dtype=log_snr.dtype))


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
        first, last, end = process.t_min, process.t_max, process.t_end
        quarter = lambda a, b, number: np.linspace(a**0.25, b**0.25, number) ** 4
        early, times = quarter(0.0, first, 401)[:-1], quarter(first, last, 4001)
        # Set exactly, as the powers are rounded.
        times[0], times[-1] = first, last
        late = np.linspace(last, end, 401)[1:] if end > last else []
        times, table = _refined(process, np.append(times, late))
        table = np.append(np.full(len(early), table[0]), table)
        _tables[process] = np.append(early, times), table
    return _tables[process]


def log_snr_table_from(
    process: AbstractProcess, start: float
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """The same, but if it starts after time 0, with the log-SNR before `t_min`."""
    times, table = log_snr_table(process)
    if not 0 < start < process.t_min:
        return times, table
    early, kept = np.geomspace(start, process.t_min, 1025)[:-1], times >= process.t_min
    table = np.append(_on_host(process)(early), table[kept])
    return np.append(early, times[kept]), table


def _on_host(process) -> Callable[[np.ndarray], np.ndarray]:
    """`process.log_snr` at many times, in double precision."""
    # A new function for each call: with a shared one, JAX's cache would keep the process
    # alive.
    fn = jax.jit(jax.vmap(lambda t: process.log_snr(t)))

    def log_snr(ts):
        # Compiled once, for one number of times.
        chunks = np.pad(ts, (0, -len(ts) % 1024), mode="edge").reshape(-1, 1024)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            values = [np.asarray(fn(jnp.asarray(x, np.float64))) for x in chunks]
        return np.concatenate(values)[: len(ts)]

    return log_snr


def _refined(process, times) -> tuple[np.ndarray, np.ndarray]:
    """Times and the log-SNR at each. Where it changes fast, as at the last indices of a
    discrete model, intervals are halved until it is linear on each."""
    log_snr = _on_host(process)
    points = np.stack([times, log_snr(times)])
    left, right = points[:, :-1], points[:, 1:]
    for iteration in range(50):
        t = 0.5 * (left[0] + right[0])
        middle = np.stack([t, log_snr(t)])
        a, b, c = (bounded_log_snr(process, x[1]) for x in (left, middle, right))
        with np.errstate(invalid="ignore"):  # of two infinite values
            bend, rise = np.abs(b - 0.5 * (a + c)), np.abs(c - a)
        if iteration == 0 and not ((bend > 3e-3) | (rise > 0.2)).any():
            break
        coarse = (bend > 1e-5) | (rise > 0.02)
        left, middle, right = (x[:, coarse] for x in (left, middle, right))
        points = np.append(points, middle, axis=1)
        left, right = np.append(left, middle, axis=1), np.append(middle, right, axis=1)
        if not coarse.any():
            break
    times, values = points[:, np.argsort(points[0], kind="stable")]
    return times, values
