"""What `train.py` and `evaluate.py` share, besides their data: files and pictures."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange

import gddim_eqx as gd


def read_flow(path: Path, **options: Any) -> gd.ProbabilityFlow:
    """A model and its process.

    **Raises:** `ValueError` for a file that holds something else.
    """
    found = gd.checkpoints.load(path, **options)
    if isinstance(found, gd.nn.NetworkModel):
        return gd.ProbabilityFlow(found.process, found)
    if not isinstance(found, gd.ProbabilityFlow):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, not a model and its process. Save a "
            "`gddim_eqx.ProbabilityFlow` of it, or a `gddim_eqx.nn.NetworkModel`."
        )
    return found


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
