"""What the ordinary differential equations here have in common."""

from typing import Any

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import RealScalarLike, State
from .._misc import show


class AbstractODE(dfx.AbstractTerm):
    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs) -> RealScalarLike:
        return t1 - t0

    def prod(self, vf: State, control: RealScalarLike) -> State:
        return jtu.tree_map(lambda v: jnp.asarray(control, v.dtype) * v, vf)


def as_state_like(u: State, value: Any, name: str, hint: str = "") -> State:
    """What a function of a state returned, as arrays in the precision of the state.

    **Raises:** `ValueError` unless it has the structure and the shape of the state."""
    structures = jtu.tree_structure(u), jtu.tree_structure(value)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must return the structure of its state, {show(structures[0])}; it "
            f"returned {show(structures[1])}.{hint}"
        )

    def same(x, v):
        if jnp.shape(v) != x.shape:
            raise ValueError(
                f"{name} must return the shape of its state, {x.shape}; it returned "
                f"{jnp.shape(v)}.{hint}"
            )
        return jnp.asarray(v, x.dtype)

    return jtu.tree_map(same, u, value)
