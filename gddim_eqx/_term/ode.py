"""What the ordinary differential equations here have in common."""

from typing import Any

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

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
    wanted, given = (jtu.tree_map(np.shape, x) for x in (u, value))
    if (type(given), given) != (type(wanted), wanted):
        raise ValueError(
            f"{name} must return the structure and shape of its state, {show(wanted)}; it "
            f"returned {show(given)}.{hint}"
        )
    return jtu.tree_map(lambda x, v: jnp.asarray(v, x.dtype), u, value)
