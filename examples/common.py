"""What `train.py` and `evaluate.py` share, besides their data: files and pictures."""

import dataclasses
import hashlib
import json
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import authors_config
import jax
import numpy as np
from einops import rearrange

import gddim_eqx as gd


def read_flow(path: Path, like: str | None = None) -> gd.ProbabilityFlow:
    """A model and its process.

    **Arguments:**

    - `path`: a file that the library wrote.
    - `like`: `module:name` of a function that returns a model of the same structure.

    **Raises:** `ValueError` for a file that holds something else.
    """
    try:
        found = gd.checkpoints.load(path, like=None if like is None else named(like)())
    except ValueError as error:
        if "like=" in str(error):
            raise ValueError(f"{error} Here: `--like module:function`.") from error
        raise
    if isinstance(found, gd.nn.NetworkModel):
        return gd.ProbabilityFlow(found.process, found)
    if not isinstance(found, gd.ProbabilityFlow):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, not a model and its process. Save a "
            "`gddim_eqx.ProbabilityFlow` of it, or a `gddim_eqx.nn.NetworkModel`."
        )
    return found


def named(name: str) -> Callable[[], Any]:
    """The function that `--like` names."""
    sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`--like` must be module:name of a function; got {name!r}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"`--like` must name a function; {name} is {found!r}.")
    return found


def read_authors(
    path: Path, authors: str, name: Literal["cld", "bdm"], shape: tuple[int, ...]
) -> gd.ProbabilityFlow:
    """A model in a checkpoint of the authors' code, with the name of a network or the file
    of a configuration, and the name of the process."""
    presets, settings = ("cifar10_cld", "cifar10_bdm", "celeba_cld"), {}
    if authors in presets:
        network = gd.checkpoints.load_authors(path, getattr(gd.nn.presets, authors))
    elif Path(authors).is_file():
        settings = json.loads(Path(authors).read_text())
        states = shape[-1] * (2 if name == "cld" else 1)
        network = authors_config.network(settings, states, (shape[0], shape[1]))
        try:
            network = gd.checkpoints.load_authors(path, network)
        except ValueError as error:
            raise ValueError(
                f"{error} Here {name} needs {states} input channels: choose another "
                "`--process` or `--data`, or another configuration."
            ) from error
    else:
        raise ValueError(
            f"`--authors` must be one of {', '.join(presets)}, or a file; got {authors!r}."
        )
    process = {"cld": gd.CLD, "bdm": gd.BDM}[name](shape)
    needed = (*shape[:2], process.num_components * shape[-1])
    if network.shape != needed:
        raise ValueError(
            f"{path} has a network for inputs of shape {network.shape}, and {name} needs "
            f"{needed}. Choose another `--process` or `--data`."
        )
    mixed_score = settings.get("model", settings).get("mixed_score", False)
    model = gd.nn.NetworkModel(process, network, mixed_score)
    return gd.ProbabilityFlow(process, model)


def digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def tiled(images: np.ndarray, rows: int | None = None) -> np.ndarray:
    """Tile images in rows, by default as many as columns; unused places stay black."""
    rows = rows or math.isqrt(len(images) - 1) + 1
    images = np.pad(images, [(0, -len(images) % rows), (0, 1), (0, 1), (0, 0)])
    return rearrange(images, "(a b) h w c -> (a h) (b w) c", a=rows)


def draw_table(
    path: Path,
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str] = ("",),
    title: str = "",
    size: tuple[float, float] = (4.0, 4.0),
) -> None:
    """Draw one picture that consists of rows and columns of equal size, and name these."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(images.squeeze(), cmap="gray", vmin=0, vmax=255)
    axis.spines[:].set_visible(False)
    axis.xaxis.tick_top()
    for set_ticks, names, length in (
        (axis.set_yticks, rows, images.shape[0]),
        (axis.set_xticks, columns, images.shape[1]),
    ):
        places = (np.arange(len(names)) + 0.5) * length / len(names) - 0.5
        set_ticks(places, names, parse_math=False)
    axis.tick_params(length=0)
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def keep_programs() -> None:
    """Read programs that were compiled before from a file."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
