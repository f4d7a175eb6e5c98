import functools
import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from ._process import AbstractProcess


Variable = Literal["time", "sqrt", "log", "clock"]

VARIABLES = ("time", "sqrt", "log", "clock")

# By how much the variable "clock" slows down between noise and data.
_SLOWING = 10.0


def clock(
    process: AbstractProcess, t: Inexact[Array, ""], floor: float = 0.0
) -> Inexact[Array, ""]:
    """How far sampling has come at a time: 0 at `t_max`, 1 at `t_min`.

    The mean of two clocks that run between these: one by the logarithm of the signal-to-
    noise ratio, which knows no scale in the data, and one by the square root of time,
    which gives the noisy half, where a sample chooses what to be, more than its share.
    Below the time `floor` the first stands still.
    """
    first, last = _range_of_log_snr(process)
    by_signal = (process.log_snr(jnp.maximum(t, floor)) - first) / (last - first)
    first, last = math.sqrt(process.t_max), math.sqrt(process.t_min)
    by_time = (jnp.sqrt(t) - first) / (last - first)
    return 0.5 * (by_signal + by_time)


@functools.lru_cache(maxsize=64)
def _range_of_log_snr(process: AbstractProcess) -> tuple[float, float]:
    with jax.ensure_compile_time_eval():
        ends = jnp.asarray([process.t_max, process.t_min])
        first, last = eqx.filter_jit(jax.vmap(process.log_snr))(ends)
        return float(first), float(last)


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
