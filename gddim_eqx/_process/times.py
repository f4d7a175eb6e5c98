import jax.numpy as jnp
from jaxtyping import Array

from .._custom_types import RealScalarLike, State
from .._linear import coefficient_dtype
from .._misc import show


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
