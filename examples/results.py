"""The samplers that `evaluate.py` compares, and tables and pictures of the results."""

import dataclasses
import textwrap
from pathlib import Path
from typing import Any, Literal

import diffrax as dfx
import numpy as np
from common import draw_table, tiled

import gddim_eqx as gd


@dataclasses.dataclass(frozen=True)
class Sampler:
    name: str
    solver: dfx.AbstractSolver
    lam: float = 0.0
    grid: Literal["clock", "quadratic"] = "clock"
    evaluations_per_step: int = 1
    evaluations_at_start: int = 0
    only: type = gd.AbstractProcess  # The only kind of process that it applies to.

    def steps(self, process: gd.AbstractProcess, evaluations: int) -> int:
        """The number of steps; 0 if the sampler does not apply."""
        rest = max(evaluations - self.evaluations_at_start, 0)
        return rest // self.evaluations_per_step if isinstance(process, self.only) else 0

    @property
    def described(self) -> str:
        return f"{self.solver!r}, lambda {self.lam}, grid {self.grid}"


PAPER = gd.GDDIM(3, "noise")
SAMPLERS = {
    "gddim": Sampler("gDDIM", gd.GDDIM()),
    "gddim-paper": Sampler("gDDIM, as in the paper", PAPER, grid="quadratic"),
    "ddim": Sampler("gDDIM, order 1", gd.GDDIM(1, "noise")),
    "heun": Sampler("Heun", dfx.Heun(), evaluations_per_step=2),
    "tsit5": Sampler("Tsit5", dfx.Tsit5(), evaluations_per_step=6, evaluations_at_start=1),
    "euler": Sampler("Euler", dfx.Euler()),
    "ancestral": Sampler("Ancestral", gd.GDDIM(1), lam=1.0),
    "em": Sampler("Euler-Maruyama", dfx.Euler(), lam=1.0),
    "sscs": Sampler("SSCS", gd.SSCS(), lam=1.0, only=gd.CLD),
}


def samplers_in(results: list[dict[str, Any]]) -> list[str]:
    names = {r["sampler"] for r in results if r["outcome"] != "impossible"}
    return [name for name in SAMPLERS if name in names]


def budgets_in(results: list[dict[str, Any]]) -> list[int]:
    return sorted({r["budget"] for r in results})


def table(results: list[dict[str, Any]], metric: str = "frechet_distance") -> str:
    """A Markdown table: the mean over seeds, with half the range if there are several, and
    the number of evaluations where it differs from the budget by more than a tenth."""
    budgets = budgets_in(results)
    lines = ["| evaluations | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    for name in samplers_in(results):
        row = []
        for budget in budgets:
            cell = [r for r in results if (r["sampler"], r["budget"]) == (name, budget)]
            values = [r[metric] for r in cell if r["outcome"] == "finite"]
            if not values or len(values) < len(cell):
                diverged = any(r["outcome"] == "diverged" for r in cell)
                row.append("diverged" if diverged else "")
                continue
            text = f"{np.mean(values):.3g}"
            if len(values) > 1:
                text += f" ± {(max(values) - min(values)) / 2:.1g}"
            used = np.mean([r["evaluations"] for r in cell])
            close = abs(used - budget) <= 0.1 * budget
            row.append(text if close else f"{text} ({used:.0f})")
        lines.append(f"| {SAMPLERS[name].name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def report(
    number: int,
    protocol: dict[str, Any],
    real_images: dict[str, Any] | None,
    results: list[dict[str, Any]],
) -> None:
    """Print the tables of `results.json`, for this number of samples."""
    name, against = protocol["frechet_distance"], protocol["against"]
    print(f"{name} ({number} samples, against {against}):\n\n{table(results)}\n")
    if real_images is None:
        print(
            "No real images are left to compare with. For a folder, `--data.test` or "
            "`--data.held-out` gives some."
        )
    else:
        fewer = real_images["number"]
        kind = "training" if against.startswith("test") else "held-out"
        text = f"{fewer} real {kind} images: {real_images['frechet_distance']:.3g}"
        more = f". (More of them, such as {number}, would come closer.)"
        print(text + (more if fewer < number else ""))
    if any("accuracy" in r for r in results):
        print("\nShare of samples that the classifier takes for their label:\n")
        print(table(results, "accuracy"))
    print("\n± is half the range over seeds. In brackets: the actual evaluations.")
    missing = [r for r in results if r["outcome"] == "impossible"]
    if missing:
        names = dict.fromkeys(f"{r['sampler']} with {r['budget']}" for r in missing)
        print(f"Not possible: {', '.join(names)}.")


def draw_grid(results: list[dict[str, Any]], output: Path) -> None:
    """Sixteen samples for each sampler and number of evaluations, from the same noise."""
    names, budgets = samplers_in(results), budgets_in(results)
    seed, drawn = min(r["seed"] for r in results), {}
    for name, budget in ((name, budget) for name in names for budget in budgets):
        path = output / "first" / f"{name}-{budget}-{seed}.npz"
        outcomes = [
            r["outcome"] for r in results if (r["sampler"], r["budget"]) == (name, budget)
        ]
        if "finite" in outcomes and path.exists():
            with np.load(path) as file:
                images, gap = tiled(file["images"][:16]), [(0, 4), (0, 4), (0, 0)]
                drawn[name, budget] = np.pad(images, gap, constant_values=255)
    if not drawn:
        return
    blank = np.full_like(next(iter(drawn.values())), 255)
    cells = [[drawn.get((name, budget), blank) for budget in budgets] for name in names]
    draw_table(
        output / "grid.png",
        np.concatenate([np.concatenate(row, 1) for row in cells]),
        [textwrap.fill(SAMPLERS[name].name, 14) for name in names],
        [str(budget) for budget in budgets],
        "Evaluations of the network, at most",
        (max(1.6 + 1.3 * len(budgets), 4), 0.4 + 1.3 * len(names)),
    )
