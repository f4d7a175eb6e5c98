"""Tables 1 to 3 and figures 1 and 2 of the gDDIM paper, without trained networks.

The data are mixtures of Gaussians, whose scores are known exactly: a ring of eight in two
dimensions, and mixtures around real images. The results therefore isolate the samplers. The
paper's numbers, FIDs on CIFAR10 with trained networks, are shown alongside to compare
trends.

    python benchmarks/paper_tables.py            # everything; about an hour on 2 cores
    python benchmarks/paper_tables.py --data ring
    python benchmarks/paper_tables.py --quick    # only to see that it runs
    python benchmarks/paper_tables.py --help
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gddim_eqx as gd
from gddim_eqx import AbstractProcess
from gddim_eqx.metrics import frechet_distance, sliced_wasserstein


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import data as data_sets
from quickstart import load_images


_key = jr.key(0)
_row = 12  # The number of samples in a row of figure 1.
_metrics = {
    "median": "median distance to the exact flow, RMS per coordinate",
    "rms": (
        "the same, root mean square over samples: dominated by those that end in a "
        "different mode"
    ),
    "frechet": "Frechet distance to data",
    "sliced": "sliced Wasserstein distance to data",
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set: a mixture of Gaussians around points."""

    name: str
    centres: np.ndarray
    scale: float
    number: int
    """The number of samples to draw."""

    def mixture(self) -> gd.GaussianMixture:
        return gd.GaussianMixture(jnp.asarray(self.centres), self.scale)

    def draw(self, seed: int) -> np.ndarray:
        return _flat(self.mixture().sample(jr.key(1000 + seed), self.number))

    def processes(self) -> dict[str, AbstractProcess]:
        shape = self.centres.shape[1:]
        found: dict[str, AbstractProcess] = {"DDPM": gd.VP(shape), "CLD": gd.CLD(shape)}
        if len(shape) == 3:  # Blurring needs images.
            found["BDM"] = gd.BDM(shape)
        return found


def _flat(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x.reshape(x.shape[0], -1)


def ring() -> Data:
    angle = 2 * np.pi * np.arange(8) / 8
    return Data("ring", np.stack([np.cos(angle), np.sin(angle)], -1), 0.05, 16_384)


def digits(quick: bool = False) -> Data:
    images = np.asarray(load_images(jr.key(0)), np.float64)
    if quick:
        return Data("digits", images[:20], 0.02, _row)
    return Data("digits", images[:1000], 0.02, 1024)


def fashion(directory: Path) -> Data:
    images = data_sets.fashion_mnist(directory)
    return Data("fashion-mnist", images[:500] / 127.5 - 1, 0.02, 256)


@dataclasses.dataclass
class Cell:
    evaluations: int
    metrics: dict[str, float]


class Bench:
    """The samplers and metrics for one process and data set."""

    def __init__(self, data: Data, process: AbstractProcess):
        self.data, self.process = data, process
        self.model = data.mixture().model(process)
        self.real = data.draw(0)
        self.exact: np.ndarray | None = None
        self._adaptive: dict[type, Callable] = {}
        self._evaluations = 0

    def measure(self, x, evaluations: int, deterministic: bool) -> Cell:
        x = _flat(x)
        metrics = {
            "frechet": frechet_distance(x, self.real),
            "sliced": sliced_wasserstein(x, self.real),
        }
        if deterministic:
            if self.exact is None:
                tolerance = 1e-9 if x.shape[1] < 100 else 1e-7
                self.exact = _flat(self.adaptive(dfx.Dopri8(), tolerance)[0])
            distance = np.sqrt(((x - self.exact) ** 2).mean(axis=1))
            metrics["median"] = float(np.median(distance))
            metrics["rms"] = float(np.sqrt((distance**2).mean()))
        return Cell(evaluations, metrics)

    def fixed(
        self, solver: dfx.AbstractSolver, lam: float | jax.Array = 0.0, per_step: int = 1
    ) -> Callable:
        """A sampler with fixed steps, as a function of the number of evaluations."""
        deterministic = isinstance(lam, float) and lam == 0

        def run(evaluations: int) -> Cell:
            try:
                x, used = gd.sample(
                    gd.ProbabilityFlow(self.process, self.model),
                    _key,
                    self.data.number,
                    solver=solver,
                    lam=lam,
                    ts=gd.time_grid(self.process, evaluations // per_step, "quadratic"),
                )
            except FloatingPointError:
                return Cell(evaluations, {name: np.inf for name in _metrics})
            assert used is not None  # known for all samplers here
            return self.measure(x, used, deterministic)

        return run

    def adaptive(self, solver: dfx.AbstractSolver, tolerance: float):
        """The samples and the number of evaluations of an adaptive solver."""

        def counted(t, u, model):
            jax.debug.callback(self._count)
            return model(t, u, None)

        if type(solver) not in self._adaptive:
            term = gd.ProbabilityFlow(self.process, counted)

            @eqx.filter_jit
            def run(model, tolerance):
                u = self.process.prior(_key, (self.data.number,))
                sol = dfx.diffeqsolve(
                    term,
                    solver,
                    self.process.t_max,
                    self.process.t_min,
                    None,
                    u,
                    model,
                    stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
                    max_steps=10_000,
                )
                return self.process.decode(sol.ys)[-1]

            self._adaptive[type(solver)] = run
        self._evaluations = 0
        run = self._adaptive[type(solver)]
        x = jax.block_until_ready(run(self.model, jnp.asarray(tolerance)))
        jax.effects_barrier()
        return x, self._evaluations

    def _count(self) -> None:
        self._evaluations += 1

    def rk45(self) -> Callable:
        """Dopri5, at the tolerance for which the number of evaluations is closest."""
        cells: list[Cell] = []

        def run(evaluations: int) -> Cell:
            if not cells:
                for tolerance in 10.0 ** np.arange(1, -9, -0.5):
                    x, used = self.adaptive(dfx.Dopri5(), tolerance)
                    cells.append(self.measure(x, used, True))
                    if used > 1000:
                        break
            return min(cells, key=lambda c: abs(np.log(c.evaluations / evaluations)))

        return run


@dataclasses.dataclass
class Row:
    name: str
    run: Callable[[float], Cell]
    paper: Sequence[object] | None = None
    """The paper's FID, column by column."""


def table(
    title: str, columns: Sequence[float], rows: list[Row], data: Data, quick: bool
) -> str:
    """Run a table, and write it in Markdown, with one block per metric."""
    if quick:
        rows = rows[-1:]
    cells: list[list[Cell]] = []
    for row in rows:
        start = time.perf_counter()
        cells.append([row.run(column) for column in columns])
        spent = time.perf_counter() - start
        print(f"{title}, {data.name}: {row.name} ({spent:.0f} s)", file=sys.stderr)
    lines = [f"### {title}: {data.name}", ""]
    pairs = [(data.draw(2 * i), data.draw(2 * i + 1)) for i in range(1, 4)]
    floors = {
        "frechet": np.mean([frechet_distance(a, b) for a, b in pairs]),
        "sliced": np.mean([sliced_wasserstein(a, b) for a, b in pairs]),
    }
    for metric, description in _metrics.items():
        if not any(metric in cell.metrics for row in cells for cell in row):
            continue
        floor = f"; data against data: {floors[metric]:.2g}" if metric in floors else ""
        lines += [f"{description[0].upper()}{description[1:]}{floor}.", ""]
        lines += ["| | " + " | ".join(f"{c:g}" for c in columns) + " |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        for row, found in zip(rows, cells):
            if any(metric in cell.metrics for cell in found):
                texts = [_text(cell, metric, c) for cell, c in zip(found, columns)]
                lines.append(f"| {row.name} | " + " | ".join(texts) + " |")
            if row.paper is not None and metric == "frechet":
                paper = " | ".join(str(x) for x in row.paper[: len(columns)])
                lines.append(f"| *the paper's FID* | {paper} |")
        lines.append("")
    text = "\n".join(lines)
    print(text, flush=True)
    return text


def _text(cell: Cell, metric: str, column: float) -> str:
    if metric not in cell.metrics:
        return ""
    value = cell.metrics[metric]
    text = "diverged" if not value < 1e3 else f"{value:.2g}"
    # Columns above 1 are numbers of evaluations: show the actual one where it differs.
    met = column <= 1 or abs(cell.evaluations - column) <= 1
    return text if met else f"{text} ({cell.evaluations})"


def table_1(data: Data, quick: bool) -> str:
    bench = Bench(data, data.processes()["CLD"])
    columns = (10, 20, 30, 40, 50, 100, 200)[: 1 if quick else None]
    paper = {
        "cholesky": ("", 368, 167, 4.12, 3.31, "", ""),
        "R": ("", "3.90", 2.64, 2.37, 2.26, "", ""),
    }
    frames: list[tuple[Literal["cholesky", "R"], str]] = [("cholesky", "L_t"), ("R", "R_t")]
    rows = [
        Row(
            f"{name}, order {order}",
            bench.fixed(gd.GDDIM(order, "noise", frame=factor)),
            paper[factor] if order == 3 else None,
        )
        for factor, name in frames
        for order in (1, 3)
    ]
    return table("Table 1, CLD, L_t against R_t", columns, rows, data, quick)


def table_2(data: Data, quick: bool) -> str:
    bench = Bench(data, data.processes()["CLD"])
    evaluations = 10 if quick else 50

    def row(name, solver, paper=None):
        # An array, so as to compile once for all levels.
        run = lambda lam: bench.fixed(solver, jnp.asarray(lam))(evaluations)
        return Row(name, run, paper)

    rows = [
        row("gDDIM, order 1", gd.GDDIM(1, "noise"), (5.17, 5.51, 12.13, 33, 41, 49)),
        row("gDDIM, order 2", gd.GDDIM(2, "noise")),
        row("gDDIM, order 3", gd.GDDIM(3, "noise")),
        row("EM", dfx.Euler(), (346, 168, 137, 89, 45, 57)),
    ]
    columns = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
    title = f"Table 2, CLD, stochasticity, {evaluations} evaluations"
    return table(title, columns, rows, data, quick)


def table_3(data: Data, most: int, quick: bool) -> str:
    columns = tuple(n for n in (10, 20, 50, 100, 1000) if n <= most)
    parts = []
    processes = data.processes()
    for name in ("CLD",) if quick else ("DDPM", "BDM", "CLD"):
        if name not in processes:
            continue
        bench = Bench(data, processes[name])
        em, heun = bench.fixed(dfx.Euler(), 1.0), bench.fixed(dfx.Heun(), per_step=2)
        order_1, order_3 = (
            bench.fixed(gd.GDDIM(1, "noise")),
            bench.fixed(gd.GDDIM(3, "noise")),
        )
        ancestral = bench.fixed(gd.GDDIM(1, "noise"), 1.0)
        big = ">100"
        rows = {
            "DDPM": [
                Row("EM", em, (big, big, 31.2, 12.2, 2.64)),
                Row("Ancestral", ancestral),
                Row("RK45", bench.rk45(), (big, 52.5, 6.62, 2.63, 2.56)),
                Row("Heun", heun, (66.25, 6.62, 2.65, 2.57, 2.56)),
                Row("gDDIM, order 1", order_1),
                Row("gDDIM, order 3", order_3, (4.17, 3.03, 2.59, 2.56, 2.56)),
            ],
            "BDM": [
                Row("Ancestral", ancestral, (big, big, 29.8, 9.73, 2.51)),
                Row("RK45", bench.rk45(), (big, 68.2, 7.12, 2.58, 2.46)),
                Row("gDDIM, order 1", order_1),
                Row("gDDIM, order 3", order_3, (4.52, 2.97, 2.49, 2.47, 2.46)),
            ],
            "CLD": [
                Row("EM", em, (big, big, 57.72, 13.21, 2.39)),
                Row("Ancestral", ancestral),
                Row("SSCS", bench.fixed(gd.SSCS(), 1.0)),
                Row("RK45", bench.rk45(), (big, big, 31.7, 4.56, 2.25)),
                Row("gDDIM, order 1", order_1),
                Row("gDDIM, order 3", order_3, (13.41, 3.39, 2.26, 2.26, 2.25)),
            ],
        }[name]
        parts.append(table(f"Table 3, {name}", columns, rows, data, quick))
    return "\n".join(parts)


def _along_the_flow(bench: Bench, u, ts):
    """States along the exact flow."""
    sol = dfx.diffeqsolve(
        gd.ProbabilityFlow(bench.process, bench.model),
        dfx.Dopri8(),
        ts[0],
        ts[-1],
        None,
        u,
        stepsize_controller=dfx.PIDController(rtol=1e-9, atol=1e-9),
        saveat=dfx.SaveAt(ts=ts),
        max_steps=10_000,
    )
    assert sol.ys is not None
    return sol.ys


def figure_1(data: Data, path: Path, quick: bool) -> None:
    """Under CLD, positions oscillate along the flow, and so does the noise prediction with
    respect to L_t, but not the one with respect to R_t. Below, the resulting samples."""
    process = data.processes()["CLD"]
    bench = Bench(data, process)
    ts = gd.time_grid(process, 400, "quadratic")
    ys = _along_the_flow(bench, process.prior(_key), ts)
    flow = gd.ProbabilityFlow(process, bench.model)
    frames = {
        frame: jax.vmap(lambda t, y: flow.noise(t, y, None, frame))(ts, ys)
        for frame in ("R", "cholesky")
    }
    pixels = np.random.default_rng(1).integers(0, data.centres[0].size, 5)
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.9))
    top, bottom = halves[:, 0]
    axes = top.subplots(1, 4, sharex=True)
    curves = [
        (ys.x, "$x$ along the flow"),
        (frames["cholesky"].v, r"$\epsilon^{(L)}$, velocity"),
        (frames["R"].x, r"$\epsilon^{(R)}$, position"),
        (frames["R"].v, r"$\epsilon^{(R)}$, velocity"),
    ]
    for axis, (values, title) in zip(axes, curves):
        axis.plot(ts, values.reshape(len(ts), -1)[:, pixels], linewidth=1)
        axis.set(title=title, xlabel="$t$")
        axis.set_ylim(-3.5, 3.5)
    methods: list[tuple[str, dfx.AbstractSolver, tuple[int, int]]] = [
        ("Euler", dfx.Euler(), (500, 1000)),
        ("$L_t$, order 1", gd.GDDIM(1, "noise", frame="cholesky"), (100, 200)),
        ("$R_t$, order 1", gd.GDDIM(1, "noise"), (10, 50)),
        ("$R_t$, order 3", gd.GDDIM(3, "noise"), (10, 20)),
    ]
    if quick:
        methods = [(name, solver, (10, 10)) for name, solver, _ in methods[-1:]]
    rows = [
        (
            f"{name}\n{n} evaluations",
            gd.sample(gd.ProbabilityFlow(process, bench.model), _key, _row, n, solver).x,
        )
        for name, solver, numbers in methods
        for n in numbers
    ]
    bench = Bench(dataclasses.replace(data, number=_row), process)
    for tolerance in (3e-1, 1e-3):
        x, used = bench.adaptive(dfx.Dopri5(), tolerance)
        rows.insert(2, (f"RK45\n{used} evaluations", x))
    rows[2:4] = sorted(rows[2:4], key=lambda row: int(row[0].split()[1]))
    grid = bottom.subplots(len(rows), 1)
    for axis, (name, x) in zip(grid, rows):
        axis.imshow(np.concatenate(np.asarray(x)[..., 0], axis=1), "gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figure_2(path: Path) -> None:
    """Two points in one dimension: noise predictions along the exact flow change only
    while the flow commits to one of them."""
    process = gd.VP((1,))
    data = Data("two points", np.array([[-1.0], [1.0]]), 0.0, 1)
    bench = Bench(data, process)
    ts = gd.time_grid(process, 400, "quadratic")
    starts = jnp.asarray([[-1.6], [-0.5], [-0.08], [0.03], [0.3], [1.2]])
    ys = _along_the_flow(bench, starts, ts)
    flow = gd.ProbabilityFlow(process, bench.model)
    noise = jax.vmap(lambda t, y: flow.noise(t, y, None))(ts, ys)
    us = np.linspace(-3, 3, 401)
    mean = np.asarray(jax.vmap(lambda t: process.transition(t, 0.0).blocks[0, 0])(ts))
    std = np.asarray(jax.vmap(lambda t: process.factor(t).blocks[0, 0])(ts))
    density = sum(
        np.exp(-0.5 * ((us[:, None] - m * mean) / std) ** 2) / std for m in (-1, 1)
    )
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    axes[0].pcolormesh(ts, us, np.asarray(density) ** 0.25, cmap="viridis", rasterized=True)
    axes[0].set(title="density $p_t(u)$", xlabel="$t$", ylabel="$u$")
    axes[1].plot(ts, ys[..., 0])
    axes[1].set(title="the exact flow $u(t)$", xlabel="$t$", ylim=(-3, 3))
    axes[2].plot(ts, noise[..., 0])
    axes[2].set(title=r"exact $\epsilon$ along it", xlabel="$t$", ylim=(-3, 3))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables with exact scores.")
    parser.add_argument("--data", nargs="+", choices=("ring", "digits", "fashion-mnist"))
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="directory of the data set; Debian's package dataset-fashion-mnist",
    )
    parser.add_argument("--most", type=int, default=1000, help="maximum NFE of table 3")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    quick = arguments.quick
    names = arguments.data or ["ring", "digits", "fashion-mnist"]
    if quick:
        names, arguments.most = ["digits"], 10
    if "fashion-mnist" in names and not arguments.fashion_mnist.exists():
        message = (
            f"{arguments.fashion_mnist} is missing (apt install dataset-fashion-mnist)"
        )
        if arguments.data:
            parser.error(message)
        print(f"Skipping Fashion-MNIST: {message}.", file=sys.stderr)
        names.remove("fashion-mnist")
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure_2(arguments.output / "figure_2.png")
    for name in names:
        data = {
            "ring": ring,
            "digits": lambda: digits(quick),
            "fashion-mnist": lambda: fashion(arguments.fashion_mnist),
        }[name]()
        parts = [
            table_1(data, quick),
            table_2(data, quick),
            table_3(data, arguments.most, quick),
        ]
        (arguments.output / f"tables_{name}.md").write_text("\n".join(parts))
        if name != "ring":
            figure_1(data, arguments.output / "figure_1.png", quick)


if __name__ == "__main__":
    main()
