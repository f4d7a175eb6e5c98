import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._custom_types import RealScalarLike
from .._misc import pin
from .._process import AbstractProcess, latest


def real_times(
    process: AbstractProcess,
    t0: RealScalarLike,
    t1: RealScalarLike,
    direction: RealScalarLike,
    dtype,
) -> tuple[Array, Array]:
    """The start and end of a step in the user's time, with checks."""
    end = latest(process, jnp.asarray(t1).dtype, dtype)
    s, t = (jnp.asarray(x * direction, dtype) for x in (t0, t1))
    inside = (jnp.minimum(s, t) >= 0) & (jnp.maximum(s, t) <= end)
    # Rounding may have moved a time past the end.
    s, t = (pin(x > process.t_end, process.t_end, x) for x in (s, t))
    return eqx.error_if(
        (s, t),
        ~inside,
        f"The solver was asked to step to a time outside [0, {process.t_end}], the time "
        f"axis of {type(process).__name__}. Use times from `gddim_eqx.time_grid`.",
    )


def backward(s: Array, t: Array) -> tuple[Array, Array]:
    """Check that a step of a reverse diffusion runs backward in time."""
    return eqx.error_if(
        (s, t),
        t > s,
        "`reverse_sde` must be solved backward in time, from `process.t_max` down. To "
        "encode data, solve `ProbabilityFlow` forward.",
    )
