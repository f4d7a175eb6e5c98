"""Samples of an included network in 2, 3 and 5 evaluations, by six samplers.

All get the same network and the same noise. `docs/few_evaluations.png` shows what becomes
of it. Nothing is trained, and no data are needed. Takes a minute on two CPU cores.

    python examples/few_evaluations.py
    python examples/few_evaluations.py --name fashion-mnist-cld --output runs
"""

import argparse
import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import matplotlib
import numpy as np

import gddim_eqx as gd


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


NUMBERS = (2, 3, 5)
# The flow, the solver and the times, of at most this many evaluations.
Sampler = Callable[[gd.ProbabilityFlow, int], tuple[Any, Any, Any] | None]


def with_start(data: gd.NormalData, flow: gd.ProbabilityFlow, number: int):
    start = gd.GaussianStart(data, None, "sharpest")
    return start.flow(flow, number), gd.GDDIM(), start.time_grid(flow.process, number)


def on_grid(
    solver: dfx.AbstractSolver,
    grid: Any,
    flow: gd.ProbabilityFlow,
    number: int,
    per_step: int = 1,
    before: int = 0,
):
    steps = (number - before) // per_step
    return (flow, solver, gd.time_grid(flow.process, steps, grid)) if steps else None


def learned(name: Any, flow: gd.ProbabilityFlow, number: int):
    solver = gd.checkpoints.pretrained_solver(name, number)
    return flow, solver, solver.ts


def samplers(name: Any) -> dict[str, Sampler]:
    data = gd.checkpoints.pretrained_data("fashion-mnist")
    paper, tsit5 = gd.GDDIM(3, "noise"), dfx.Tsit5()
    return {
        "learned": ft.partial(learned, name),
        "GDDIM() with a start": ft.partial(with_start, data),
        "GDDIM()": ft.partial(on_grid, gd.GDDIM(), "clock"),
        "as in the paper": ft.partial(on_grid, paper, "quadratic"),
        "Heun": ft.partial(on_grid, dfx.Heun(), "quadratic", per_step=2),
        "Tsit5": ft.partial(on_grid, tsit5, "quadratic", per_step=6, before=1),
    }


@eqx.filter_jit
def generate(flow, u, solver, ts):
    return gd.generate(flow, u, solver=solver, ts=ts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--name", default="fashion-mnist-vp", help="an included model")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parents[1] / "docs",
        help="the directory to save the picture in",
    )
    arguments = parser.parse_args()
    flow = gd.checkpoints.pretrained(arguments.name)
    u = flow.process.prior(jax.random.key(3), (9,))
    rows = samplers(arguments.name)
    figure, axes = plt.subplots(
        len(rows) + 1, len(NUMBERS), figsize=(10.5, 3.2), layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)

    def show(axis, *made):
        images = gd.to_uint8(generate(made[0], u, *made[1:]))
        axis.imshow(np.hstack(list(images))[..., 0], cmap="gray", vmin=0, vmax=255)

    for column, number in enumerate(NUMBERS):
        axes[0, column].set_title(f"{number} evaluations of the network", fontsize=10)
        for axis, make in zip(axes[:, column], rows.values()):
            if (made := make(flow, number)) is None:
                axis.text(0.5, 0.5, "a step takes more", ha="center", va="center")
            else:
                show(axis, *made)
        show(axes[-1, column], flow, gd.GDDIM(), gd.time_grid(flow.process, 100))
    for axis, name in zip(axes[:, 0], [*rows, "100 evaluations"]):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "few_evaluations.png"
    figure.savefig(path, dpi=110)
    print(f"Samples: {path}")


if __name__ == "__main__":
    main()
