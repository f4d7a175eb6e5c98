import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._custom_types import RealScalarLike
from .._misc import pin
from .._process import AbstractProcess, latest


def real_time(t_end: float, t: RealScalarLike, direction: RealScalarLike, dtype) -> Array:
    """A time of the solver in the user's time. If rounding moved it past the end of the
    time axis, `t_end`, it is moved back."""
    end = latest(t_end, jnp.asarray(t).dtype, dtype)
    t = jnp.asarray(t * direction, dtype)
    return pin((t > t_end) & (t <= end), t_end, t)


def step_faults(
    process: AbstractProcess, s: Array, t: Array, stochastic: bool
) -> list[tuple[Bool[Array, ""], str]]:
    """What can be wrong with the times of a step from `s` to `t`, for `error_if_any`."""
    outside = (jnp.minimum(s, t) < 0) | (jnp.maximum(s, t) > process.t_end)
    undefined = jnp.isnan(s) | jnp.isnan(t)
    why_undefined = (
        "The step size is NaN. Check that the initial state and the predictions are finite."
    )
    message = (
        f"The solver was asked to step to a time outside [0, {process.t_end}], the time "
        f"axis of {type(process).__name__}. Use times from `gddim_eqx.time_grid`."
    )
    forward = (
        "`reverse_sde` must be solved backward in time, from `process.t_max` down. To "
        "encode data, solve `ProbabilityFlow` forward."
    )
    faults = [(undefined, why_undefined), (outside, message)]
    return [*faults, *([(t > s, forward)] if stochastic else [])]
