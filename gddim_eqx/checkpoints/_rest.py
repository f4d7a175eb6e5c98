"""What a model of a class that is not the library's holds beside its arrays."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._misc import contents, is_array, is_constant, is_weights, show
from .._process import AbstractProcess


_advice = (
    "Make it a field of an `equinox.Module`, not a static one. For a network in a "
    "`lambda t, x, args: network(x, t)`, write a class `Model(equinox.Module)` with the "
    "field `network` and `def __call__(self, t, x, args): return self.network(x, t)`."
)


def check_arrays(model: Any) -> None:
    """**Raises:** `ValueError` for a model with arrays that are not in its pytree."""
    lenient = any(map(is_array, jtu.tree_leaves(model)))
    if (hidden := _hidden(model, lenient)) is not None:
        raise ValueError(
            f"This {type(model).__name__} cannot be saved: {hidden}, which `save` cannot "
            f"reach, so that trained weights would be lost. {_advice}"
        )


def describe_rest(value: Any) -> dict[str, dict[str, Any]]:
    """The constants in a pytree; and its static fields, functions and classes. By their
    paths, as JSON."""
    rest = {"leaves": {}, "fixed": {}}
    for path, part, place in contents(value, True, AbstractProcess):
        if is_constant(part) and place != "within":
            rest["leaves" if place == "leaf" else "fixed"][path] = _describe(part)
        elif place == "constant":
            rest["fixed"][path] = _describe_array(part)
        elif not (place == "within" or is_weights(part) or _is_container(part)):
            rest["fixed"][path] = _describe(part)
    return rest


def restore_rest(
    saved: Any, like: Any, arrays: Collection[str], where: str, path: Path
) -> Any:
    """`like` with the constants that were saved.

    **Arguments:**

    - `saved`: from `describe_rest`; `None` in older files.
    - `like`: as in `load`.
    - `arrays`: the names of all arrays that were saved.
    - `where`, `path`: where in the model, and of which file, for messages.

    **Raises:** `ValueError` for anything else that differs, and for arrays in `like` that
    are not in its pytree.
    """
    if (hidden := _hidden(like, bool(arrays))) is not None:
        message = f"{path} has no array for {where} of `like`: {hidden}. {_advice}"
        prefix = where.removeprefix("model")
        if saved is not None or not any(name.startswith(prefix) for name in arrays):
            raise ValueError(message + " If it was trained, train and save it again.")
        # An older version of the library saved what it could.
        warnings.warn(message, stacklevel=2)
    if saved is None:
        return like
    found, values = describe_rest(like), saved["leaves"]
    faults = [
        f"{where}{name} {_show(part[name])}, but `like` has {_show(other[name])}"
        for part in saved.values()
        for other in found.values()
        for name in sorted(part.keys() & other.keys())
        if not (part is values and other is found["leaves"])
        and json.dumps(part[name]) != json.dumps(other[name])
    ]
    names = {name for name, value in values.items() if value is not None}
    for name in sorted(names - found["leaves"].keys() - found["fixed"].keys()):
        faults.append(f"{where}{name} {_show(values[name])}, but `like` has no such number")
    names = {name for name, value in found["leaves"].items() if value is not None}
    for name in sorted(names - values.keys() - saved["fixed"].keys()):
        faults.append(f"no number {where}{name}, but `like` has one")
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path} was saved with {'; with '.join(faults[:5])}{more}.")

    def restore(name, x):
        name = jtu.keystr(name)
        changed = name in values and _describe(x) != values[name]
        return _build(values[name]) if changed and is_constant(x) else x

    return jtu.tree_map_with_path(restore, like, is_leaf=lambda x: x is None)


def _hidden(model: Any, lenient: bool) -> str | None:
    """Where a model holds arrays that are not in its pytree."""
    for path, part, place in contents(model, lenient, AbstractProcess):
        if is_weights(part) and (place not in ("leaf", "constant") or not is_array(part)):
            kind = type(part).__name__
            how = "in a function, a static field or another object"
            how = "of another library" if place == "leaf" else how
            return f"it has an array ({kind}) {how}, at `{path}`"
    return None


def _is_container(x: Any) -> bool:
    return type(x) in (dict, list, tuple)


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
