"""Models described as JSON: the library's classes by their names and arguments."""

import functools
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._linear import CosineBasis, Covariance, FourierBasis, IdentityBasis
from .._misc import is_array, show
from .._model import NormalData
from .._process import (
    BDM,
    BlurringCLD,
    CLD,
    CosineSchedule,
    DiscreteVP,
    EDM,
    HOLD,
    Langevin,
    LinearSchedule,
    PSLD,
    RectifiedFlow,
    SubVP,
    TrigonometricFlow,
    VE,
    VP,
)
from .._sampling import FittedSolver
from .._term import ProbabilityFlow
from ..nn import DiT, ImageClassifier, NCSNpp, NetworkModel, TimeMLP
from ..solvers import GDDIM, LearnedGDDIM
from ._rest import describe_rest, restore_rest


# What a file can describe. Each class stores the arguments of its `__init__` under their
# names.
_classes: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(BDM, BlurringCLD, CLD, DiscreteVP, EDM, HOLD, Langevin, PSLD),
        *(RectifiedFlow, SubVP, TrigonometricFlow, VE, VP),
        *(LinearSchedule, CosineSchedule),
        *(DiT, ImageClassifier, NCSNpp, TimeMLP, NetworkModel, ProbabilityFlow),
        *(GDDIM, LearnedGDDIM, FittedSolver),
        *(NormalData, Covariance, IdentityBasis, CosineBasis, FourierBasis),
    )
}
# Keys; and the order of `GDDIM`, which `num_nodes` stores.
_not_stored = ("key", "order")
# Those whose arguments may be large arrays, which are parameters.
_of_arrays = (NormalData, Covariance)
# What describes more than a value.
_parts = ("class", "other")
# Former names, in older files.
_classes |= {"Linear": LinearSchedule, "CosineSquared": CosineSchedule}


def describe(value: Any, inline: bool = False) -> Any:
    """A value as JSON: for a module, its class and arguments; for a class that is not the
    library's, its name and what it holds beside arrays.

    **Arguments:**

    - `value`: the value.
    - `inline`: whether to include the values of arrays, not just their shapes.
    """
    if type(value) in _classes.values():
        names = inspect.signature(type(value)).parameters
        inline = isinstance(value, eqx.Module) and not isinstance(value, _of_arrays)
        arguments = {
            name: describe(getattr(value, name), inline)
            for name in names
            if name not in _not_stored
        }
        return {"class": type(value).__name__, "arguments": arguments}
    if type(value) is tuple:
        return [describe(x, inline) for x in value]
    if type(value) is list:
        return {"list": [describe(x, inline) for x in value]}
    if isinstance(value, np.dtype):
        return value.name
    if is_array(value) and not inline:
        return {"shape": list(value.shape), "numpy": isinstance(value, np.ndarray)}
    if inline and isinstance(value, jax.Array | np.ndarray | np.generic):
        return {"array": np.asarray(value).tolist(), "dtype": value.dtype.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"other": type(value).__qualname__, "rest": describe_rest(value)}


def others(description: Any) -> Iterator[str]:
    """The names of classes that are not the library's."""
    if isinstance(description, list):
        for part in description:
            yield from others(part)
    elif isinstance(description, dict) and "other" in description:
        yield description["other"]
    elif isinstance(description, dict):
        parts = description.get("list") or description.get("arguments", {}).values()
        yield from others(list(parts))


def build(description: Any, like: Any, path: Path, arrays: Collection[str]) -> Any:
    """Build what `describe` described, with shapes in place of parameters. `like` stands in
    for what is not the library's: all of it, or a part of it. `arrays` are the names of
    those in the file."""
    description = _updated(description, path)
    kinds = sorted(set(others(description)))
    name = _name(description)
    whole = type(like).__name__ == name or (name == "array" and is_array(like))
    if like is None and kinds:
        raise ValueError(
            f"{path} holds a {' and a '.join(kinds)}, which the library cannot construct. "
            "Make one of the same structure, as you did for training, and pass it: "
            "`load(path, like=...)`."
        )
    if like is not None and not (kinds or whole):
        raise ValueError(
            f"{path} needs no `like`, as it has a {name}; got a {type(like).__name__}."
        )
    if len(kinds) > 1 and not whole:
        raise ValueError(
            f"{path} holds a {' and a '.join(kinds)}: `like` must be a {name} with all of "
            f"them; got a {type(like).__name__}."
        )
    return _Builder(path, arrays, whole)(description, like, "model")


def _updated(description: Any, path: Path) -> Any:
    """The description of a model that an older version of the library saved, whose
    preconditioned networks predicted noise: the same networks now predict data."""
    if isinstance(description, list):
        return [_updated(part, path) for part in description]
    if not isinstance(description, dict):
        return description
    if "arguments" not in description:
        return {name: _updated(part, path) for name, part in description.items()}
    arguments = _updated(description["arguments"], path)
    model = arguments.get("model")
    if description["class"] == "ProbabilityFlow" and arguments["predicts"] == "noise":
        inside = model.get("arguments", {})
        if inside.get("data_std") is not None and "data" not in inside:
            arguments = arguments | {"predicts": "data"}
        fixed = model.get("rest", {}).get("fixed", {})
        leaves = model.get("rest", {}).get("leaves", {})
        for name, value in fixed.items():
            where, _, field = name.rpartition(".")
            if field == "data_std" and value is not None and f"{where}.data" not in leaves:
                raise ValueError(
                    f"{path} holds a {model['other']} of a preconditioned `NetworkModel` "
                    "which predicted noise when it was saved, and predicts data now. Load "
                    "it with an older version of the library, save its `network`, and make "
                    "the model again, to predict data."
                )
    return description | {"arguments": arguments}


def _name(description: Any) -> str:
    if isinstance(description, list):
        return "tuple"
    if isinstance(description, dict):
        return description.get("class", "list" if "list" in description else "array")
    return type(description).__name__


class _Builder:
    def __init__(self, path: Path, arrays: Collection[str], whole: bool):
        self.path, self.arrays, self.whole = path, arrays, whole

    def __call__(self, value: Any, like: Any, where: str) -> Any:
        if isinstance(value, dict) and "other" in value:
            if not self.whole and type(like) in _classes.values():
                raise ValueError(
                    f"{self.path} holds a {value['other']}: `like` must be one, or a part "
                    f"of what was saved that contains it; got a {type(like).__name__}."
                )
            return restore_rest(value.get("rest"), like, self.arrays, where, self.path)
        if isinstance(value, dict) and "class" in value:
            return self._make(value, like, where)
        if isinstance(value, dict) and "list" in value:
            return list(self(value["list"], like, where))
        if isinstance(value, list):
            likes = like if self.whole else [like] * len(value)
            if len(likes) != len(value):
                raise ValueError(
                    f"{self.path} was saved with {len(value)} parts of {where}, but `like` "
                    f"has {len(likes)}."
                )
            parts = enumerate(zip(value, likes))
            return tuple(self(x, y, f"{where}[{i}]") for i, (x, y) in parts)
        if isinstance(value, dict) and "shape" in value:
            shape = tuple(value["shape"])
            return np.empty(shape) if value["numpy"] else jax.ShapeDtypeStruct(shape, float)
        if isinstance(value, dict):
            return jnp.asarray(value["array"], value["dtype"])
        return value

    def _argument(self, value: Any, like: Any, where: str) -> Any:
        """An argument of a module, which `like`, if it is the whole, must have too."""
        is_part = isinstance(value, dict) and not value.keys().isdisjoint(_parts)
        if self.whole and not is_part and describe(like, inline=True) != value:
            raise ValueError(
                f"{self.path} was saved with {where} {show(value)}, but `like` has "
                f"{show(describe(like, inline=True))}."
            )
        return self(value, like, where)

    def _make(self, value: dict[str, Any], like: Any, where: str) -> Any:
        cls = _classes.get(value["class"])
        if cls is None:
            raise ValueError(
                f"{self.path} has a {value['class']}, which this version of the library "
                "does not know. Update `gddim_eqx`."
            )
        if type(like) is cls and not self.whole:
            return _Builder(self.path, self.arrays, True)(value, like, where)
        known = inspect.signature(cls).parameters
        unknown = set(value["arguments"]) - set(known)
        if unknown:
            raise ValueError(
                f"{self.path} has the arguments {sorted(unknown)} of {cls.__name__}, which "
                "this version of the library does not know. Update `gddim_eqx`."
            )
        if self.whole and type(like) is not cls:
            raise ValueError(
                f"{self.path} was saved with {where} a {cls.__name__}, but `like` has a "
                f"{type(like).__name__}."
            )
        parts = issubclass(cls, (tuple, *_of_arrays))
        make = self if parts else self._argument
        arguments = {
            name: make(x, getattr(like, name) if self.whole else like, f"{where}.{name}")
            for name, x in value["arguments"].items()
        }
        if "key" not in known:
            # Shapes of arrays are traced, as values would be checked.
            shapes = cls in _of_arrays
            return eqx.filter_eval_shape(cls, **arguments) if shapes else cls(**arguments)
        make = functools.partial(cls, **arguments)
        return eqx.filter_eval_shape(make, key=jax.random.key(0))
