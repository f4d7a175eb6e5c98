from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Real

from .._custom_types import Times
from .._misc import as_constant, as_floats, show
from .base import AbstractProcess


def on_time_axis(
    process: AbstractProcess, name: str, t: Any, dtype: Any = np.float32
) -> float:
    """A time as a Python number. The end of the time axis may round up in single precision,
    so times that exceed it by no more than rounding are moved to it.

    **Arguments:**

    - `process`: the process.
    - `name`: the name of the time in error messages.
    - `t`: the time.
    - `dtype`: the narrowest dtype it may have been rounded to, besides its own.

    **Raises:** `ValueError` for anything but a single time in [0, t_end].
    """
    value = as_constant(name, t)
    if not 0 <= value <= latest(process.t_end, dtype, getattr(t, "dtype", dtype)):
        raise ValueError(
            f"`{name}` must be in [0, {process.t_end}], the time axis of "
            f"{type(process).__name__}; got {value}."
        )
    return min(value, process.t_end)


def latest(t_end: float, *dtypes: Any) -> float:
    """The end of a time axis, plus its rounding in the narrowest of the dtypes."""
    floating = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
    return t_end * (1 + max(float(jnp.finfo(x).eps) for x in floating))


def as_grid(
    process: AbstractProcess,
    ts: Times,
    direction: Literal["decreasing", "increasing"] | None = None,
) -> Real[Array, " times"]:
    """The grid of times as an array, with its values checked unless traced.

    **Raises:** `ValueError` unless there are at least two times, strictly monotone (in the
    given direction, if any), on the process' time axis.
    """
    ts = as_floats("ts", ts)
    if ts.ndim != 1 or ts.shape[0] < 2:
        raise ValueError(
            f"`ts` must hold at least two times; got an array of shape {ts.shape}."
        )
    if not isinstance(ts, Tracer):
        # On the host, even while JAX is tracing.
        values = np.asarray(ts, np.float64)
        steps = np.diff(values)
        found = {(True, False): "increasing", (False, True): "decreasing"}.get(
            (bool((steps > 0).all()), bool((steps < 0).all()))
        )
        if found is None or direction not in (None, found):
            raise ValueError(
                f"`ts` must be strictly {direction or 'decreasing or increasing'}, as "
                f"sampling runs backward in time and encoding forward; got "
                f"{show(values.tolist())}."
            )
        for t in (values[0], values[-1]):
            on_time_axis(process, "ts", t, ts.dtype)
    return ts
