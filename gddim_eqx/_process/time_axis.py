from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Real

from .._custom_types import RealScalarLike, State, Times
from .._linear import coefficient_dtype
from .._misc import as_constant, as_floats, show


def as_time(t: RealScalarLike) -> Array:
    """A time as an array of floating dtype."""
    try:
        if isinstance(t, str):
            raise TypeError
        t = jnp.asarray(float(t) if isinstance(t, int) else t)
    except (TypeError, ValueError):
        raise ValueError(f"A time must be a number; got {show(t)}.") from None
    if jnp.issubdtype(t.dtype, jnp.complexfloating):
        raise ValueError(f"A time must be real; got {show(t)}.")
    if t.ndim:
        raise ValueError(
            f"A time must be a scalar; got an array of shape {t.shape}. For one time per "
            "sample, use `jax.vmap`."
        )
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(jnp.result_type(float))
    return t


def time_for(state: State, t: RealScalarLike) -> Array:
    """A time in the dtype of the operators that act on a state."""
    return as_time(t).astype(coefficient_dtype(state))


def as_times(*times: RealScalarLike) -> list[Array]:
    """Several times as arrays of one floating dtype."""
    arrays = [as_time(t) for t in times]
    dtype = jnp.result_type(*arrays)
    return [t if t.dtype == dtype else t.astype(dtype) for t in arrays]


def on_time_axis(process: Any, name: str, t: Any, dtype: Any = np.float32) -> float:
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
    process: Any,
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
        found = {"increasing": (steps > 0).all(), "decreasing": (steps < 0).all()}
        if not (found[direction] if direction else any(found.values())):
            raise ValueError(
                f"`ts` must be strictly {direction or 'decreasing or increasing'}, as "
                f"sampling runs backward in time and encoding forward; got "
                f"{show(values.tolist())}."
            )
        for t in (values[0], values[-1]):
            on_time_axis(process, "ts", t, ts.dtype)
    return ts
