import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import BoolScalarLike, RealScalarLike, State
from gddim_eqx._operator import apply, BlockLinearOperator
from gddim_eqx._pin import pin
from gddim_eqx._process import AbstractProcess
from gddim_eqx._times import latest


def combine(
    process: AbstractProcess,
    pairs: list[tuple[Inexact[Array, "n n *_"], State]],
) -> State:
    """`sum(B value)` over pairs of blocks and values."""
    products = [apply(BlockLinearOperator(b, process.shape), value) for b, value in pairs]
    return jtu.tree_map(lambda *leaves: sum(leaves), *products)


def pick(values: PyTree[Inexact[Array, "slots ..."]], k: int) -> State:
    """One of several states that are stacked."""
    return jtu.tree_map(lambda x: x[k], values)


def real_times(
    process: AbstractProcess,
    t0: RealScalarLike,
    t1: RealScalarLike,
    direction: RealScalarLike,
    dtype,
) -> tuple[Array, Array]:
    """The start and end of a step in the user's time, checked."""
    end = latest(process, jnp.asarray(t1).dtype, dtype)
    s, t = (jnp.asarray(x * direction, dtype) for x in (t0, t1))
    inside = (jnp.minimum(s, t) >= 0) & (jnp.maximum(s, t) <= end)
    # What rounding has added is taken back.
    s, t = (pin(x > process.t_end, process.t_end, x) for x in (s, t))
    return eqx.error_if(
        (s, t),
        ~inside,
        f"The solver was asked to step to a time outside [0, {process.t_end}], the time "
        f"axis of {type(process).__name__}. Take times from `gddim_eqx.time_grid`.",
    )


def backward(s: Array, t: Array) -> tuple[Array, Array]:
    """The start and end of a step of a reverse diffusion, checked."""
    return eqx.error_if(
        (s, t),
        t > s,
        "`reverse_sde` must be solved backward in time, from `process.t_max` down. To "
        "encode data, solve `ProbabilityFlow` forward.",
    )


def continued(
    count: Int[Array, ""],
    end: Real[Array, ""],
    t0: RealScalarLike,
    made_jump: BoolScalarLike,
) -> Int[Array, ""]:
    """How many of `count` stored values are history of a step from `t0`: none, if they
    were stored before a jump, or along a solution that ended elsewhere."""
    count = jnp.where(end == t0, count, 0)
    return count if made_jump is False else jnp.where(made_jump, 0, count)
