"""Models described as JSON: the library's classes by their names and arguments."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .. import _linear, _model, _process, _sampling, _term, nn, solvers
from ._contents import is_array


_rooms = (_linear, _model, _process, _sampling, _term, nn, solvers)
# Arguments that are stored under another name; and those that are not, as they are part of
# what is.
_stored_as = {"order": "predictor", "space": "splitting"}
_not_stored = ("key", "frame", "reevaluate")


def describe(value: Any) -> Any:
    """A value as JSON. An instance of a class that the library exports is described by the
    name of the class and the arguments of its `__init__`, which are attributes of the same
    names; of another class, only its name."""
    if (arguments := _arguments(value)) is not None:
        described = {name: describe(x) for name, x in arguments.items()}
        return {"class": type(value).__name__, "arguments": described}
    if type(value) is tuple:
        return [describe(x) for x in value]
    if type(value) is list:
        return {"list": [describe(x) for x in value]}
    if isinstance(value, np.dtype):
        return value.name
    if is_array(value):
        return {"array": list(value.shape)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"other": type(value).__qualname__}


def others(description: Any) -> Iterator[str]:
    """The names of classes that are not the library's."""
    parts = description if isinstance(description, list) else ()
    if isinstance(description, dict):
        yield from [description["other"]] if "other" in description else []
        parts = description.get("list") or description.get("arguments", {}).values()
    for part in parts:
        yield from others(part)


def name_of(description: Any) -> str:
    """The name of the class of what was described."""
    if isinstance(description, list):
        return "tuple"
    if isinstance(description, dict):
        named = description.get("class") or description.get("other")
        return named or ("list" if "list" in description else "array")
    return type(description).__name__


def build(description: Any, arrays: Mapping[str, Any], like: Any = None) -> Any:
    """Build what `describe` described, with shapes in place of the parameters of networks.

    **Arguments:**

    - `arrays`: those that were saved, by their paths, for the arguments that are arrays.
    - `like`: stands in for what is not the library's: for all of it, or for the smallest
        part that contains all.
    """
    unknown = set(others(description))

    def make(value: Any, where: str) -> Any:
        if unknown and unknown == set(others(value)):
            same = name_of(value) == type(like).__name__
            if same or ("other" in value and _arguments(like) is None):
                return like
        if isinstance(value, list):
            return tuple(make(x, f"{where}[{i}]") for i, x in enumerate(value))
        if not isinstance(value, dict):
            return value
        if "list" in value:
            return list(make(value["list"], where))
        if "array" in value:
            if where not in arrays:
                raise ValueError(f"It has no array {where}, which it needs.")
            return arrays[where]
        if "class" in value:
            arguments = {
                name: make(x, f"{where}.{_stored_as.get(name, name)}")
                for name, x in value["arguments"].items()
            }
            return _construct(value["class"], arguments)
        them = "them" if len(unknown) > 1 else "it"
        raise ValueError(
            f"It holds a {' and a '.join(sorted(unknown))}: `like` must be the part of "
            f"what was saved that contains {them}; got a {type(like).__name__}."
        )

    return make(description, "")


def _find(name: str) -> type | None:
    """The class of this name that the library exports."""
    found = (getattr(room, name, None) for room in _rooms)
    modules = (
        x for x in found if isinstance(x, type) and issubclass(x, eqx.Module | tuple)
    )
    return next(modules, None)


def _arguments(value: Any) -> dict[str, Any] | None:
    """The arguments of an instance of one of the library's classes; `None` for other
    values, and if an argument is not stored or is a function."""
    if _find(type(value).__name__) is not type(value):
        return None
    arguments = {}
    for name in inspect.signature(type(value)).parameters:
        attribute = _stored_as.get(name, name)
        if hasattr(value, attribute):
            arguments[name] = getattr(value, attribute)
        elif name not in _not_stored:
            return None
    are_modules = (isinstance(x, eqx.Module) or not callable(x) for x in arguments.values())
    return arguments if all(are_modules) else None


def _construct(name: str, arguments: dict[str, Any]) -> Any:
    cls = _find(name)
    known = inspect.signature(cls).parameters if cls else {}
    unknown = sorted(arguments.keys() - known.keys())
    if cls is None or unknown:
        raise ValueError(
            f"It has {f'the arguments {unknown} of' if cls else 'a'} {name}, which this "
            "version of the library does not know. Update `gddim_eqx`."
        )
    if "key" not in known:
        return cls(**arguments)
    make = functools.partial(cls, **arguments)
    return eqx.filter_eval_shape(make, key=jax.random.key(0))
