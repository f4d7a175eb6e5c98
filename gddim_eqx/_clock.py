import math
import weakref
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from ._process import AbstractProcess


Variable = Literal["time", "sqrt", "log", "clock"]

VARIABLES = ("time", "sqrt", "log", "clock")

# By how much the variable "clock" slows down between noise and data.
_SLOWING = 10.0

# The least logarithm of a signal-to-noise ratio that the clock sees.
_LEAST = -40.0


def clock(process: AbstractProcess, t: Inexact[Array, ""]) -> Inexact[Array, ""]:
    """How far sampling has come at a time: 0 at `t_max`, 1 at `t_min`.

    The mean of two clocks that run between these: one by the logarithm of the signal-to-
    noise ratio, which knows no scale in the data, and one by the square root of time,
    which gives the noisy half, where a sample chooses what to be, more than its share.
    """
    return _mean_of_clocks(process, jnp.sqrt(t), process.log_snr(t))


def clock_table(
    process: AbstractProcess,
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """Times from 0 to `t_end`, and the clock at each, in double precision. Below `t_min`,
    where the signal-to-noise ratio may grow without bound, the clock by time runs on
    alone."""
    times, log_snr = _log_snr_table(process)
    return times, _mean_of_clocks(process, np.sqrt(times), log_snr)


def log_snr_at_start(process: AbstractProcess) -> float:
    """The logarithm of the signal-to-noise ratio at `t_max`, where sampling starts."""
    times, table = _log_snr_table(process)
    return float(table[times == process.t_max][0])


def _mean_of_clocks(process, root, log_snr) -> Any:
    first, last = log_snr_at_start(process), float(_log_snr_table(process)[1][0])
    # A signal that has all but vanished tells no times apart.
    xp = np if isinstance(log_snr, np.ndarray) else jnp
    log_snr, first = xp.where(log_snr > _LEAST, log_snr, _LEAST), max(first, _LEAST)
    by_signal = (log_snr - first) / (last - first)
    first, last = math.sqrt(process.t_max), math.sqrt(process.t_min)
    return 0.5 * (by_signal + (root - first) / (last - first))


# The tables of the processes that are still in use.
_tables = weakref.WeakKeyDictionary()


def _log_snr_table(process):
    try:
        hash(process)
    except TypeError:
        raise ValueError(
            f"The {type(process).__name__} holds arrays. The numbers of a process are "
            "constants of the compiled program: keep them as Python numbers, in fields "
            "with `equinox.field(static=True)`."
        ) from None
    if process not in _tables:
        quarter = lambda a, b, number: np.linspace(a**0.25, b**0.25, number) ** 4
        early = quarter(0.0, process.t_min, 401)[:-1]
        times = quarter(process.t_min, process.t_max, 4001)
        # Not by powers, which round.
        times[0], times[-1] = process.t_min, process.t_max
        late = np.linspace(process.t_max, process.t_end, 401)[1:]
        late = late[late > process.t_max]
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            # Compiled anew, as what JAX keeps of a function it keeps of its process.
            log_snr = jax.jit(jax.vmap(lambda t: process.log_snr(t)))
            table = np.asarray(log_snr(jnp.asarray(np.append(times, late), np.float64)))
        table = np.concatenate([np.full(len(early), table[0]), table])
        _tables[process] = np.concatenate([early, times, late]), table
    return _tables[process]


def reading(
    process: AbstractProcess,
    variable: Variable,
    s: Inexact[Array, ""],
    t: Inexact[Array, ""],
) -> Callable[[Inexact[Array, ""]], Inexact[Array, ""]]:
    """The variable in which predictions are polynomials over a step from `s` to `t`, as a
    function of time.

    `"clock"` runs ever slower, as steps go, in terms of [`gddim_eqx._clock.clock`][]: by
    the same factor over each of equal steps, the less the more there are. So a prediction
    is extrapolated by less than what was seen over the step before, with the caution that
    few steps need, and without spoiling the order of convergence of many.
    """
    rate = jnp.where(t > s, _SLOWING, -_SLOWING).astype(s.dtype)
    return {
        "time": lambda t: t,
        "sqrt": jnp.sqrt,
        "log": jnp.log,
        "clock": lambda t: jnp.exp(rate * clock(process, t)),
    }[variable]


def progress(
    process: AbstractProcess,
    variable: Variable,
    s: Inexact[Array, ""],
    t: Inexact[Array, ""],
    tau: Inexact[Array, " times"],
) -> tuple[Inexact[Array, " times"], Inexact[Array, " times"]]:
    """The variable at some times, scaled to 0 at `s` and 1 at `t`, and its derivative with
    respect to the fraction of time."""
    read, length = reading(process, variable, s, t), t - s
    start, end = jax.vmap(read)(jnp.stack([s, t]))
    values, slopes = jax.vmap(lambda x: jax.jvp(read, (x,), (length,)))(tau)
    # A step too short to be told apart by the variable leaves it at 0.
    still = start == end
    slopes = jnp.where(still, 0, slopes / jnp.where(still, 1, end - start))
    return jnp.where(still, 0, scaled(values, start, end)), slopes


def scaled(
    values: Inexact[Array, " times"], start: Inexact[Array, ""], end: Inexact[Array, ""]
) -> Inexact[Array, " times"]:
    """Values between a start, which is taken to 0, and an end, which is taken to 1."""
    return (values - start) / jnp.where(start == end, 1, end - start)
