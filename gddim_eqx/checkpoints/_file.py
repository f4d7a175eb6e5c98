"""Self-describing model files."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._misc import write_whole
from ._contents import is_array
from ._describe import build, describe, name_of, others
from ._rest import check_arrays, describe_rest, restore_rest


_VERSION = 2


def save(path: str | Path, model: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model or a learned solver with its architecture and its process, for
    [`gddim_eqx.checkpoints.load`][].

    The file is a NumPy `.npz` of the parameters and a `header` that describes the model as
    JSON. It is written under another name first, so that `path` is never incomplete.

    Networks, processes and schedules of your own, and what is made of functions, such as a
    `LinearSDE`, cannot be described: only their arrays and constants are saved, and `load`
    needs a `like`.

    !!! example

        ```python
        fitted = gd.fit_solver(flow, process.prior(key, (64,)), num_steps=5)
        gd.checkpoints.save("solver.npz", fitted)  # or `fitted.solver`, which has its times
        fitted = gd.checkpoints.load("solver.npz")
        x, _ = gd.sample(flow, key, 1000, solver=fitted.solver, ts=fitted.ts)
        ```

    **Arguments:**

    - `path`: the path of the file, with any suffix.
    - `model`: a [`gddim_eqx.nn.NetworkModel`][]; or a [`gddim_eqx.ProbabilityFlow`][] of
        one, or of a model of your own, to save what it predicts too; or a network alone. Or
        a solver, such as a [`gddim_eqx.LearnedGDDIM`][], or all of what
        [`gddim_eqx.fit_solver`][] returns. Or any pytree.
    - `metadata`: anything else to keep with the model, serialisable as JSON, such as the
        names of its classes, for [`gddim_eqx.checkpoints.metadata`][].

    **Raises:** `ValueError` for arrays that are not numeric; for arrays outside the pytree:
    weights in a `lambda`, a static field, `jax.jit` of a network or an object that is no
    pytree (make them fields of an `equinox.Module`); and for metadata that cannot be
    serialised as JSON.
    """
    check_arrays(model, "cannot be saved")
    try:
        metadata = json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`metadata` must be serialisable as JSON: {error}.") from error
    pairs = [(name, *_to_numpy(name, array)) for name, array in _arrays(model)]
    description = describe(model)
    header = {
        "format": "gddim_eqx",
        "version": _VERSION,
        "model": description,
        "rest": describe_rest(model) if any(others(description)) else {},
        "dtypes": {name: kind for name, _, kind in pairs if kind is not None},
        "metadata": metadata,
    }
    contents: Any = {name: array for name, array, _ in pairs}
    contents["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    write_whole(Path(path), lambda file: np.savez(file, **contents))


def load(path: str | Path, like: Any = None) -> Any:
    """Load a model that [`gddim_eqx.checkpoints.save`][] saved.

    **Arguments:**

    - `path`: the path of the file.
    - `like`: for a file with the arrays of a network or process of your own: one of the
        same structure, or a part of what was saved that contains it. Its arrays, which may
        be just shapes, from `eqx.filter_eval_shape`, and its numbers, strings and `None`
        are replaced. Static fields, classes and functions are kept: of functions, such as
        those of a `LinearSDE`, only names and captured numbers are compared.

    **Returns:** the model.

    **Raises:** `ValueError` for a file that `save` did not write, that is incomplete, was
    written by another version of the library, or needs a `like`; whose arrays are not
    those of its architecture; or for a `like` that differs otherwise, or whose arrays are
    out of reach, as in `save`. It names what does not match.
    """
    path = Path(path)
    header, arrays = _read(path)
    try:
        return _rebuilt(header, arrays, like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _rebuilt(header: dict[str, Any], arrays: dict[str, np.ndarray], like: Any) -> Any:
    description, kinds = header["model"], header["dtypes"]
    arrays = {name: _from_numpy(name, x, kinds.get(name)) for name, x in arrays.items()}
    name, unknown = name_of(description), sorted(set(others(description)))
    if like is None and unknown:
        raise ValueError(
            f"It holds a {' and a '.join(unknown)}, which the library cannot construct. "
            "Make one of the same structure, as you did for training, and pass it: "
            "`load(path, like=...)`."
        )
    if like is not None and not unknown and name_of(describe(like)) != name:
        raise ValueError(
            f"It needs no `like`, as it has a {name}; got a {type(like).__name__}."
        )
    check_arrays(like, "cannot be loaded")
    model = build(description, arrays, like)
    model = restore_rest(header["rest"], model) if unknown else model
    has = {name: f"an array of shape {x.shape}" for name, x in arrays.items()}
    needs = {name: f"an array of shape {x.shape}" for name, x in _arrays(model)}
    for name in (*needs, *has):
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"It has {has.get(name, 'no array')} at {name}, but its network needs "
                f"{needs.get(name, 'no array')} there."
            )
    dynamic, static = eqx.partition(model, is_array)
    values = [arrays[name] for name in needs]
    dynamic = jtu.tree_unflatten(jtu.tree_structure(dynamic), values)
    return eqx.combine(dynamic, static)


def metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` in a file of [`gddim_eqx.checkpoints.save`][]; `{}` if it has none.

    **Arguments:**

    - `path`: the path of the file.

    **Raises:** `ValueError` for a file that `save` did not write, or that is incomplete.
    """
    return _read(Path(path))[0]["metadata"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(
            f"{path} is not a complete file from `gddim_eqx.checkpoints.save`: {error}."
        ) from error
    if not isinstance(header, dict) or header.get("format") != "gddim_eqx":
        raise ValueError(f"{path} was not written by `gddim_eqx.checkpoints.save`.")
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {header.get('version')} of the format, and this library "
            f"reads version {_VERSION}. Update the older of the two."
        )
    return header, arrays


def _arrays(model: Any) -> list[tuple[str, Any]]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(model, is_array))
    return [(jtu.keystr(path), leaf) for path, leaf in leaves]


def _to_numpy(name: str, x: Any) -> tuple[np.ndarray, str | None]:
    """An array that NumPy can save, and its kind unless that is JAX's of its dtype."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jr.key_data(x)), f"key {jr.key_impl(x)}"
    kind = "numpy" if isinstance(x, np.ndarray) else None
    x = np.asarray(x)
    if x.dtype.isbuiltin == 1 and x.dtype.kind in "fiubc":
        return x, kind
    if not jnp.issubdtype(x.dtype, jnp.number):
        raise ValueError(f"The array {name} is {x.dtype}, which is no kind of number.")
    return x.view(f"u{x.dtype.itemsize}"), x.dtype.name


def _from_numpy(name: str, x: np.ndarray, kind: str | None) -> Any:
    if kind == "numpy":
        return x
    if kind is not None and kind.startswith("key "):
        return jr.wrap_key_data(jnp.asarray(x), impl=kind.removeprefix("key "))
    x = x if kind is None else x.view(jnp.dtype(kind))
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"The array {name} is {x.dtype}. Enable double precision: "
            '`jax.config.update("jax_enable_x64", True)`.'
        )
    return jnp.asarray(x)
