import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Inexact

from .._custom_types import Key
from .show import show


def check_count(name: str, value: Any, least: int = 1) -> None:
    """**Raises:** `ValueError` unless the value is an integer of at least `least`."""
    try:
        whole = not isinstance(value, (bool, str)) and int(value) == value >= least
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        kind = "a positive" if least == 1 else "a non-negative"
        raise ValueError(f"`{name}` must be {kind} integer; got {show(value)}.")


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer in this range."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(least <= value <= most)


def check_per_sample(name: str, tree: Any, batch: tuple[int, ...]) -> None:
    """**Raises:** `ValueError` unless every leaf has these leading axes."""
    for leaf in jtu.tree_leaves(tree):
        if jnp.shape(leaf)[: len(batch)] != batch:
            axes = f"({', '.join(map(str, batch))}, ...)"
            raise ValueError(
                f"{name} must have one entry per sample, of shape {axes}; got "
                f"{jnp.shape(leaf)}."
                + (" Pass an array in place of a list." if isinstance(tree, list) else "")
            )


def check_instance(name: str, value: Any, kind: Any, wanted: str) -> None:
    """**Raises:** `ValueError`, which names what is `wanted`, unless the value is an
    instance of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be {wanted}; got {show(value)}.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """**Raises:** `ValueError` unless the value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        *others, last = map(repr, choices)
        known = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"`{name}` must be {known}; got {show(value)}.")


def check_key(key: Any) -> Key:
    """**Raises:** `ValueError` unless given a single JAX random key."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
        if typed or (key.dtype == jnp.uint32 and key.ndim == 1):
            return key
    raise ValueError(
        f"`key` must be one random key, such as `jax.random.key(0)`; got {show(key)}."
    )


def error_if_any(
    x: Array, faults: Sequence[tuple[Bool[Array, ""], str]], raises: bool
) -> Array:
    """Raise a run-time error if any of the conditions holds, with the message of the last
    that does; or give NaN. One check for all takes less time to compile than one each."""
    if not faults:
        return x
    conditions, messages = zip(*faults)
    conditions = jnp.stack(conditions)
    if not raises:
        return jnp.where(conditions.any(), jnp.nan, x)
    last = jnp.where(conditions, jnp.arange(len(messages)), 0).max()
    return eqx.branched_error_if(x, conditions.any(), last, messages)


def as_batch(batch: Any) -> tuple[int, ...]:
    """Batch axes as a tuple. A single axis may be given as an integer.

    **Raises:** `ValueError` for anything but a tuple of sizes.
    """
    axes = batch if isinstance(batch, (tuple, list)) else (batch,)
    for size in axes:
        check_count("batch", size, least=0)
    return tuple(map(int, axes))


def as_dtype(dtype: Any) -> Any:
    """A floating dtype as canonicalised by JAX: double becomes single without x64.

    **Raises:** `ValueError` for any other dtype.
    """
    try:
        dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(dtype))
    except TypeError:
        raise ValueError(f"`dtype` must be a floating dtype; got {show(dtype)}.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a real floating dtype; got {dtype}.")
    return dtype


def as_constant(name: str, value: Any) -> float:
    """A finite number that is a compile-time constant.

    **Raises:** `ValueError` for a JAX tracer, or for anything but a single number.
    """
    check_not_traced(name, value)
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number; got {show(value)}.") from None
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite; got {number}.")
    return number


def check_not_traced(name: str, value: Any) -> None:
    """**Raises:** `ValueError` for a JAX tracer."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"`{name}` is traced by `jax.jit`, `jax.grad` or `jax.vmap`, but it must be a "
            "compile-time constant: what depends on it is computed on the host, in double "
            "precision. Pass a Python number. For several values, construct one object "
            "each; for derivatives, use finite differences."
        )


def constant_field(
    name: str, default: float | None, check: Callable[..., None] | None = None
) -> Any:
    """A static field for a number, which is a compile-time constant, or for `None` if that
    is the default. `check` is `check_positive` or `check_not_negative`."""

    def convert(value: Any) -> float | None:
        value = None if value is None is default else as_constant(name, value)
        if check is not None:
            check(**{name: value})
        return value

    return eqx.field(static=True, default=default, converter=convert)


def as_floats(name: str, value: Any) -> Inexact[Array, " *shape"]:
    """Convert real numbers in any form to an array of floating dtype.

    **Raises:** `ValueError` for anything but real numbers.
    """
    try:
        leaves = jtu.tree_leaves(value, is_leaf=lambda x: x is None)
        if any(x is None or isinstance(x, (str, bytes)) for x in leaves):
            raise TypeError
        array = jnp.asarray(value)
        whole = jnp.issubdtype(array.dtype, jnp.integer)
        if not (whole or jnp.issubdtype(array.dtype, jnp.floating)):
            raise TypeError
        # With an explicit dtype, as Python numbers would become weakly typed arrays.
        return jnp.asarray(array, float if whole else array.dtype)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be real numbers; got {show(value)}.") from None


def check_positive(**values: float) -> None:
    """Raise a `ValueError` that names the first non-positive value."""
    for name, value in values.items():
        if not as_constant(name, value) > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")


def check_not_negative(**values: float) -> None:
    """Raise a `ValueError` that names the first negative value."""
    for name, value in values.items():
        if not as_constant(name, value) >= 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")


def as_shape(shape: Sequence[int] | int) -> tuple[int, ...]:
    """A data shape as a tuple of Python integers."""
    try:
        return tuple(map(operator.index, shape if isinstance(shape, Iterable) else [shape]))
    except TypeError:
        raise ValueError(
            f"`shape` must be an integer or a tuple of integers; got {show(shape)}."
        ) from None
