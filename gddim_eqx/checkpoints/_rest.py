"""What a model of a class that is not the library's holds beside its arrays."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._misc import show
from .._process import AbstractProcess
from ._contents import contents, is_array, is_constant, is_weights


_advice = (
    "Make it a field of an `equinox.Module`, not a static one. For a network in a "
    "`lambda t, x, args: network(x, t)`, write a class `Model(equinox.Module)` with the "
    "field `network` and `def __call__(self, t, x, args): return self.network(x, t)`."
)
_containers = (dict, list, tuple)


def check_arrays(model: Any, cannot: str) -> None:
    """**Raises:** `ValueError` for a model with arrays that are not in its pytree."""
    for path, part, place in contents(model, AbstractProcess):
        if is_weights(part) and (place not in ("leaf", "constant") or not is_array(part)):
            how = "in a function, a static field or another object"
            how = "of another library" if place == "leaf" else how
            raise ValueError(
                f"This {type(model).__name__} {cannot}: it has an array "
                f"({type(part).__name__}) {how}, at `{path}`, so that trained weights "
                f"would be lost. {_advice}"
            )


def describe_rest(model: Any) -> dict[str, list[Any]]:
    """The constants in a pytree, and its static fields, functions and classes, by their
    paths: whether each is a constant in the pytree, and what it is, as JSON."""
    rest = {}
    for path, part, place in contents(model, AbstractProcess):
        if place == "constant":
            rest[path] = [False, _describe_array(part)]
        elif not (place == "within" or is_weights(part) or type(part) in _containers):
            rest[path] = [place == "leaf" and is_constant(part), _describe(part)]
    return rest


def restore_rest(saved: dict[str, list[Any]], model: Any) -> Any:
    """The model with the constants that were saved.

    **Raises:** `ValueError` for anything else that differs.
    """
    found, faults, missing = describe_rest(model), [], (True, None)
    for name in sorted(saved.keys() | found.keys()):
        (leaf, was), (is_leaf, now) = saved.get(name, missing), found.get(name, missing)
        # Leaves of both are restored. What functions hold may be missing on one side.
        in_both, are_leaves = name in saved and name in found, leaf and is_leaf
        if in_both != are_leaves and repr(was) != repr(now):
            faults.append(f"model{name} {_show(was)}, but `like` has {_show(now)}")
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"It was saved with {'; with '.join(faults[:5])}{more}.")

    def restore(path, x):
        was = saved.get(jtu.keystr(path))
        return _build(was[1]) if was and was[0] and is_constant(x) else x

    return jtu.tree_map_with_path(restore, model, is_leaf=lambda x: x is None)


def _describe(x: Any) -> Any:
    if isinstance(x, np.generic) and not isinstance(x, str):
        plain = x.item()
        plain = plain if isinstance(plain, bool | int | float | complex) else str(x)
        return {"dtype": x.dtype.name, "value": _describe(plain)}
    if isinstance(x, complex):
        return {"complex": [x.real, x.imag]}
    if is_constant(x):
        return x
    name = getattr(x, "__name__", None)
    return {"name": name if isinstance(name, str) else type(x).__name__}


def _describe_array(x: Any) -> Any:
    """A constant array, up to rounding on other machines; only its shape if it is large."""
    if x.size > 1000 or not jnp.issubdtype(x.dtype, jnp.number):
        return {"name": f"an array of shape {x.shape}"}
    x = np.asarray(x)
    return {"name": str([f"{y:.5g}" for y in x.ravel().tolist()]).replace("'", "")}


def _build(value: Any) -> Any:
    if isinstance(value, dict) and "dtype" in value:
        return jnp.dtype(value["dtype"]).type(_build(value["value"]))
    if isinstance(value, dict):
        return complex(*value["complex"])
    return value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return value["name"][:160] if "name" in value else show(_build(value))
    return show(value)
