from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from .._custom_types import State
from .._misc import show


class Phase(NamedTuple):
    """The state of a phase-space process: position (which carries the data) and
    velocity, each of shape `(*batch, *shape)`.

    They are separate leaves rather than one array with a trailing axis of two, so that
    updates are a few fused multiply-adds over contiguous memory.
    """

    x: Inexact[Array, "..."]
    v: Inexact[Array, "..."]


def join_components(components: Sequence[Any]) -> Any:
    """Build a state from its components: the array itself for one, a `Phase` for two,
    a tuple for more."""
    if len(components) == 1:
        return components[0]
    if len(components) == 2:
        return Phase(*components)
    return tuple(components)


def add(a: State, b: State) -> State:
    """The sum of two states."""
    return jtu.tree_map(lambda x, y: x + y, a, b)


def subtract(a: State, b: State) -> State:
    """The difference of two states."""
    return jtu.tree_map(lambda x, y: x - y, a, b)


def coefficient_dtype(state: State):
    """The dtype of times and operators that act on a state: the state's, but at least
    float32."""
    return at_least_single(jnp.result_type(*jtu.tree_leaves(state)))


def at_least_single(dtype):
    """A floating dtype, or float32 if that is wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def batch_axes(state: State, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The batch axes of a state for data of `shape`."""
    leaf = jtu.tree_leaves(state)[0]
    return leaf.shape[: leaf.ndim - len(shape)]


def check_state(
    state: Any, num_components: int, shape: tuple[int, ...], name: str
) -> State:
    """Convert a state to JAX arrays, and check it.

    **Raises:** `ValueError` unless it is a state for `num_components` components of
    `shape`, with equal leading batch axes, of real floating-point numbers.
    """
    kind = {1: "an array", 2: "a `Phase(x, v)`"}.get(
        num_components, f"a tuple of {num_components} arrays"
    )
    if num_components == 1 and isinstance(state, list):
        state = jnp.asarray(state)
    got = [jnp.shape(leaf) for leaf in jtu.tree_leaves(state)]
    expected = jtu.tree_structure(join_components([0] * num_components))
    if jtu.tree_structure(state) != expected or any(
        x[max(len(x) - len(shape), 0) :] != shape or x != got[0] for x in got
    ):
        axes = ", ".join(["*batch", *map(str, shape)])
        raise ValueError(
            f"{name} must be {kind} of shape ({axes}), where `shape={shape}` is the shape "
            f"of one data sample; got {show(jtu.tree_map(jnp.shape, state))}."
        )
    state = jtu.tree_map(jnp.asarray, state)
    for leaf in jtu.tree_leaves(state):
        check_real(leaf.dtype, name)
    return state


def check_real(dtype: Any, name: str) -> None:
    """**Raises:** `ValueError` unless the dtype is real floating-point."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be real floating-point numbers; got {dtype}. Scale images to "
            "[-1, 1], for example with `Augmentation()` from `gddim_eqx.training`. Give "
            "complex data an axis for both parts: `jnp.stack([z.real, z.imag], -1)`."
        )
