"""Work-precision diagrams: error against evaluations of the model, and against time.

Eight Gaussians on a ring under VP and CLD, and one around each of 500 real images under VP,
with exact models. `GDDIM()` on its default grid and on one from `gddim_eqx.fit_solver`
(optimised on other samples), the paper's sampler and DDIM are compared with Diffrax's
solvers: with fixed steps, on the better of two grids, and with adaptive steps, at the best
of several ratios of `atol` to `rtol`. (Kvaerno5 only in 2-D, with separate steps for each
sample.)

Errors are distances to the endpoint of the exact flow, root mean square over coordinates.
The picture, `benchmarks/work_precision.png`, shows the median over samples. The tables show
the smallest number of evaluations, counted at run time, that reaches a given error: for the
median, and in brackets for the root mean square over samples, which is dominated by the few
that end in a different mode. Takes several minutes per case on two CPU cores, most of it
compilation.

    make work-precision
    python benchmarks/work_precision.py --quick  # only to see that it runs
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import few_steps
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import matplotlib
import numpy as np
from tqdm import tqdm

import gddim_eqx as gd


matplotlib.use("agg")

import matplotlib.pyplot as plt


_targets = (1e-2, 1e-3, 1e-4)
_quick = ("GDDIM(), adapted", "Diffrax Heun", "Diffrax Kvaerno5, adaptive")


class Point(NamedTuple):
    evaluations: int
    median: float
    mean_square: float
    seconds: float


class Case:
    def __init__(self, process, mixture, number, quick):
        self.process, self.number = process, number
        self.steps = (3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 150)
        self.tolerances = tuple(10.0**-k for k in range(1, 8))
        self.adapted_steps = (5, 10, 20)
        if quick:
            self.steps, self.tolerances = self.steps[:2], self.tolerances[:1]
            self.adapted_steps = self.adapted_steps[:1]
        self.model = mixture.model(process)
        self.u = process.prior(jax.random.key(0), (number,))
        self.pilot = process.prior(jax.random.key(1), (min(number, 128),))
        self.exact = eqx.filter_jit(few_steps.exact_flow)(process, self.model, self.u)
        self.counter = few_steps.Counter(self.model)

    def measure(self, run: Callable, *arguments, one_by_one: bool = False) -> Point:
        """Count the evaluations of one solve, and time the fastest of three others."""
        some = 8 if one_by_one else 1
        u = jtu.tree_map(lambda x: x[:some], self.u) if one_by_one else self.u
        _, count = self.counter(run, u, *arguments)
        x = run(self.model, self.u, *arguments)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(run(self.model, self.u, *arguments))
            seconds.append(time.perf_counter() - start)
        square = ((x - self.exact) ** 2).reshape(self.number, -1).mean(1)
        square = jnp.where(jnp.isfinite(square), square, jnp.inf)
        return Point(
            count // some,
            float(jnp.sqrt(jnp.median(square))),
            float(jnp.sqrt(square.mean())),
            min(seconds),
        )

    def fixed(self, solver: dfx.AbstractSolver, *grids: Callable, steps=None):
        """The points of a solver on grids of several lengths, compiled once."""

        def run(model, u, ts):
            flow = gd.ProbabilityFlow(self.process, model)
            return few_steps.step_through(flow, solver, u, ts)

        return [self.measure(run, grid(n)) for grid in grids for n in steps or self.steps]

    def adaptive(self, solver: dfx.AbstractSolver, *ratios: float, one_by_one=False):
        """The points of a solver with adaptive steps, for all tolerances. With
        `one_by_one`, each sample has its own steps, and implicit solvers solve small
        systems."""

        @eqx.filter_jit
        def run(model, u, rtol, atol):
            solve = lambda u: one(model, u, rtol, atol)
            return jax.vmap(solve)(u) if one_by_one else solve(u)

        def one(model, u, rtol, atol):
            sol = dfx.diffeqsolve(
                gd.ProbabilityFlow(self.process, model),
                solver,
                self.process.t_max,
                self.process.t_min,
                None,
                u,
                stepsize_controller=dfx.PIDController(rtol, atol),
                throw=False,
            )
            return self.process.decode(jtu.tree_map(lambda y: y[-1], sol.ys))

        return [
            self.measure(run, jnp.asarray(t), jnp.asarray(r * t), one_by_one=one_by_one)
            for r, t in itertools.product(ratios, self.tolerances)
        ]


def samplers(case: Case) -> dict[str, Callable[[], list[Point]]]:
    process = case.process
    grid = lambda name: lambda number: gd.time_grid(process, number, name)
    flow = gd.ProbabilityFlow(process, case.model)

    def adapted(number):
        return gd.fit_solver(
            flow, case.pilot, number, learn="times", start=None, progress=False
        ).ts

    def both(solver):
        return lambda: case.fixed(solver, grid("quadratic"), grid("clock"))

    def tolerances(solver):
        return lambda: case.adaptive(solver, 1.0, 0.1, 0.01)

    found = {
        "GDDIM(), adapted": lambda: case.fixed(
            gd.GDDIM(), adapted, steps=case.adapted_steps
        ),
        "GDDIM()": lambda: case.fixed(gd.GDDIM(), grid("clock")),
        'GDDIM(3, "noise"): the paper': lambda: case.fixed(
            gd.GDDIM(3, "noise"), grid("quadratic")
        ),
        'GDDIM(1, "noise"): DDIM': lambda: case.fixed(
            gd.GDDIM(1, "noise"), grid("quadratic")
        ),
        "GDDIM(), adaptive": tolerances(gd.GDDIM()),
        "Diffrax Heun": both(dfx.Heun()),
        "Diffrax Tsit5": both(dfx.Tsit5()),
        "Diffrax Tsit5, adaptive": tolerances(dfx.Tsit5()),
        "Diffrax Dopri8": both(dfx.Dopri8()),
        "Diffrax Dopri8, adaptive": tolerances(dfx.Dopri8()),
    }
    if process.shape == (2,):
        found["Diffrax Kvaerno5, adaptive"] = lambda: case.adaptive(
            dfx.Kvaerno5(), 1.0, one_by_one=True
        )
    return found


def cheapest(points: list[Point], target: float, error: Callable) -> int | None:
    reached = [p.evaluations for p in points if error(p) <= target]
    return min(reached, default=None)


def front(points: list[Point], cost: Callable) -> list[Point]:
    """The Pareto front: the points that no cheaper one beats."""
    best, kept = np.inf, []
    for point in sorted(points, key=cost):
        if point.median < best:
            best = point.median
            kept.append(point)
    return kept


def table(name: str, results: dict[str, list[Point]]) -> str:
    lines = [
        f"| {name} | " + " | ".join(f"{t:.0e}" for t in _targets) + " |",
        "| --- |" + " --- |" * len(_targets),
    ]
    for sampler, points in results.items():
        cells = []
        for target in _targets:
            found = [
                cheapest(points, target, error)
                for error in (lambda p: p.median, lambda p: p.mean_square)
            ]
            median, mean_square = ("-" if n is None else str(n) for n in found)
            cells.append(f"{median} ({mean_square})")
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(everything: dict[str, dict[str, list[Point]]], path: Path) -> None:
    figure, axes = plt.subplots(
        2,
        len(everything),
        figsize=(4.6 * len(everything), 8),
        squeeze=False,
        layout="constrained",
    )
    costs = [
        ("evaluations of the model", lambda p: p.evaluations),
        ("milliseconds", lambda p: 1e3 * p.seconds),
    ]
    for column, (name, results) in zip(axes.T, everything.items()):
        for axis, (label, cost) in zip(column, costs):
            for sampler, points in results.items():
                points = front(points, cost)
                ours = sampler.startswith("GDDIM()")
                axis.loglog(
                    [cost(p) for p in points],
                    [p.median for p in points],
                    "o-" if ours else ".--",
                    linewidth=2 if ours else 1,
                    markersize=4,
                    label=sampler,
                )
            axis.set(xlabel=label, ylabel="median error", ylim=(1e-6, 2))
            axis.grid(alpha=0.3)
        column[0].set_title(name)
        column[0].set_xlim(2.5, 1500)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--fashion-mnist", type=Path, default=few_steps.fashion_mnist)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    quick = arguments.quick
    data = few_steps.mixtures(arguments.fashion_mnist, others=False, quick=quick)
    cases = [("ring, VP", gd.VP, "8 in 2-D"), ("ring, CLD", gd.CLD, "8 in 2-D")]
    if quick:
        cases = [("two points, VP", gd.VP, "2 in 2-D")]
    elif "images" in data:
        cases.append(("images, VP", gd.VP, "images"))
    everything = {}
    for name, kind, which in cases:
        mixture, number = data[which]
        case = Case(kind(mixture.means.shape[1:]), mixture, number, quick)
        every = samplers(case)
        if quick:
            every = {sampler: every[sampler] for sampler in _quick}
        everything[name] = {
            sampler: run() for sampler, run in tqdm(every.items(), desc=name)
        }
        print("\n" + table(name, everything[name]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "work_precision.png"
    draw(everything, path)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
