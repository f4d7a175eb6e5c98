"""Models described as JSON: the library's classes by their names and arguments."""

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

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
from .._term import ProbabilityFlow
from ..nn import DiT, ImageClassifier, NCSNpp, NetworkModel, TimeMLP
from ..solvers import GDDIM, LearnedGDDIM


# What a file can describe. Each class stores the arguments of its `__init__` under their
# names.
_classes: dict[str, type[eqx.Module]] = {
    cls.__name__: cls
    for cls in (
        *(BDM, BlurringCLD, CLD, DiscreteVP, EDM, HOLD, Langevin, PSLD),
        *(RectifiedFlow, SubVP, TrigonometricFlow, VE, VP),
        *(LinearSchedule, CosineSchedule),
        *(DiT, ImageClassifier, NCSNpp, TimeMLP, NetworkModel, ProbabilityFlow),
        *(GDDIM, LearnedGDDIM),
    )
}
# Keys; and the order of `GDDIM`, which `num_nodes` stores.
_not_stored = ("key", "order")
# Former names, in older files.
_classes |= {"Linear": LinearSchedule, "CosineSquared": CosineSchedule}


def describe(value: Any) -> Any:
    """A value as JSON: for a module, its class and arguments; for a class that is not the
    library's, only its name."""
    if type(value) in _classes.values():
        names = inspect.signature(type(value)).parameters
        names = [n for n in names if n not in _not_stored]
        arguments = {name: describe(getattr(value, name)) for name in names}
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, tuple | list):
        return [describe(x) for x in value]
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return {"array": np.asarray(value).tolist(), "dtype": value.dtype.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"other": type(value).__qualname__}


def others(description: Any) -> Iterator[str]:
    """The names of classes that are not the library's."""
    if isinstance(description, list):
        for part in description:
            yield from others(part)
    elif isinstance(description, dict) and "other" in description:
        yield description["other"]
    elif isinstance(description, dict):
        yield from others(list(description.get("arguments", {}).values()))


def build(description: Any, like: Any, path: Path) -> Any:
    """Build what `describe` described, with shapes in place of parameters. `like` stands in
    for what is not the library's: all of it, or a part of it."""
    kinds = sorted(set(others(description)))
    name = description.get("class") if isinstance(description, dict) else None
    whole = name is not None and type(like).__name__ == name
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
    return _Builder(path, whole)(description, like, "model")


class _Builder:
    def __init__(self, path: Path, whole: bool):
        self.path, self.whole = path, whole

    def __call__(self, value: Any, like: Any, where: str) -> Any:
        if isinstance(value, dict) and "other" in value:
            if not self.whole and type(like) in _classes.values():
                raise ValueError(
                    f"{self.path} holds a {value['other']}: `like` must be one, or a part "
                    f"of what was saved that contains it; got a {type(like).__name__}."
                )
            return like
        if isinstance(value, dict) and "class" in value:
            return self._make(value, like, where)
        if self.whole and describe(like) != value:
            raise ValueError(
                f"{self.path} was saved with {where} {value!r}, but `like` has "
                f"{describe(like)!r}."
            )
        if isinstance(value, list):
            likes = like if self.whole else [like] * len(value)
            return tuple(self(x, y, where) for x, y in zip(value, likes))
        if isinstance(value, dict):
            return jnp.asarray(value["array"], value["dtype"])
        return value

    def _make(self, value: dict[str, Any], like: Any, where: str) -> Any:
        cls = _classes.get(value["class"])
        if cls is None:
            raise ValueError(
                f"{self.path} has a {value['class']}, which this version of the library "
                "does not know. Update `gddim_eqx`."
            )
        if type(like) is cls and not self.whole:
            return _Builder(self.path, True)(value, like, where)
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
        arguments = {
            name: self(x, getattr(like, name) if self.whole else like, f"{where}.{name}")
            for name, x in value["arguments"].items()
        }
        if "key" not in known:
            return cls(**arguments)
        make = functools.partial(cls, **arguments)
        return eqx.filter_eval_shape(make, key=jax.random.key(0))
