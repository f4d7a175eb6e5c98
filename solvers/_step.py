import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import BoolScalarLike, RealScalarLike, State
from gddim_eqx._linear import apply, BlockLinearOperator
from gddim_eqx._process import AbstractProcess


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
