from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._process import AbstractProcess, clock


Variable = Literal["time", "sqrt", "log", "clock"]

VARIABLES = ("time", "sqrt", "log", "clock")

# By how much the variable "clock" slows down between noise and data.
_SLOWING = 10.0


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
