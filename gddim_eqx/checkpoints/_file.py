"""Files of models that say themselves what is in them."""

import functools
import inspect
import json
import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._process import (
    BDM,
    CLD,
    CosineSquared,
    Linear,
    SubVP,
    VE,
    VP,
)
from .._term import ProbabilityFlow
from .._write import write_whole
from ..nn import ImageClassifier, NCSNpp, NetworkModel, TimeMLP


_VERSION = 1

# What can be saved. Each keeps the arguments of its `__init__` under their names.
_classes: dict[str, type[eqx.Module]] = {
    cls.__name__: cls
    for cls in (
        *(BDM, CLD, SubVP, VE, VP, Linear, CosineSquared),
        *(ImageClassifier, NCSNpp, TimeMLP, NetworkModel, ProbabilityFlow),
    )
}


def save(path: str | Path, model: eqx.Module) -> None:
    """Save a model with its architecture and its process, for
    [`gddim_eqx.checkpoints.load`][].

    The file is NumPy's `.npz`: the parameters, and in `header` what they are of, as JSON.
    It is written under another name first, so that `path` is never half a file.

    **Arguments:**

    - `path`: of the file, with any ending.
    - `model`: a [`gddim_eqx.nn.NetworkModel`][]; or a [`gddim_eqx.ProbabilityFlow`][] of
        one, to keep too what it predicts; or a network alone.

    **Raises:** `ValueError` for a model with a part that cannot be described, such as a
    function, or a `LinearSDE`.
    """
    path = Path(path)
    header = {"format": "gddim_eqx", "version": _VERSION, "model": _describe(model)}
    arrays: Any = {name: np.asarray(x) for name, x in _arrays(model)}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"NumPy cannot save the parameters {name}, of {array.dtype}; convert them, "
                "for example to float32."
            )
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    write_whole(path, lambda file: np.savez(file, **arrays))


def load(path: str | Path) -> Any:
    """Load what [`gddim_eqx.checkpoints.save`][] saved.

    **Arguments:**

    - `path`: of the file.

    **Returns:** the model.

    **Raises:** `ValueError` for a file that is no such file, is not whole, was written by
    a later version of the library, or whose arrays are not those of its architecture. It
    names the first that does not fit.
    """
    path = Path(path)
    try:
        with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole file of `gddim_eqx.checkpoints.save`: {error}."
        ) from error
    if not isinstance(header, dict) or header.get("format") != "gddim_eqx":
        raise ValueError(f"{path} was not written by `gddim_eqx.checkpoints.save`.")
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {header.get('version')} of the format, and this library "
            f"reads version {_VERSION}. Update `gddim_eqx`."
        )
    model = _build(header["model"], path)
    values = []
    for name, wanted in _arrays(model):
        if name not in arrays:
            raise ValueError(f"{path} has no array {name}, which its network needs.")
        array = arrays.pop(name)
        if array.shape != wanted.shape:
            raise ValueError(
                f"{path}: the array {name} has shape {array.shape}, but its network needs "
                f"{wanted.shape}."
            )
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"{path}: the array {name} is {array.dtype}. Enable double precision: "
                '`jax.config.update("jax_enable_x64", True)`.'
            )
        values.append(jnp.asarray(array))
    if arrays:
        raise ValueError(f"{path} has an array {next(iter(arrays))}, which has no place.")
    dynamic, static = eqx.partition(model, _is_array)
    dynamic = jtu.tree_unflatten(jtu.tree_structure(dynamic), values)
    return eqx.combine(dynamic, static)


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _arrays(model: eqx.Module) -> list[tuple[str, Any]]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(model, _is_array))
    return [(jtu.keystr(path), leaf) for path, leaf in leaves]


def _describe(value: Any) -> Any:
    """A value as JSON has it; of a module, its class and arguments."""
    if type(value) in _classes.values():
        names = [n for n in inspect.signature(type(value)).parameters if n != "key"]
        arguments = {name: _describe(getattr(value, name)) for name in names}
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, tuple | list):
        return [_describe(x) for x in value]
    if isinstance(value, np.dtype):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"Cannot save {value!r} such that it could be loaded. These can be: "
        f"{', '.join(sorted(_classes))}."
    )


def _build(value: Any, path: Path) -> Any:
    """What `_describe` described, with shapes in place of parameters."""
    if isinstance(value, list):
        return tuple(_build(x, path) for x in value)
    if not isinstance(value, dict):
        return value
    cls = _classes.get(value["class"])
    if cls is None:
        raise ValueError(
            f"{path} has a {value['class']}, which this version of the library does not "
            "know. Update `gddim_eqx`."
        )
    arguments = {name: _build(x, path) for name, x in value["arguments"].items()}
    known = inspect.signature(cls).parameters
    unknown = set(arguments) - set(known)
    if unknown:
        raise ValueError(
            f"{path} has the arguments {sorted(unknown)} of {cls.__name__}, which this "
            "version of the library does not know. Update `gddim_eqx`."
        )
    if "key" not in known:
        return cls(**arguments)
    make = functools.partial(cls, **arguments)
    return eqx.filter_eval_shape(make, key=jax.random.key(0))
