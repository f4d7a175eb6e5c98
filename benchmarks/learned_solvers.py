"""Learned solvers with few evaluations, against `GDDIM()` on its default grid.

For each case a solver is learned from pilots by `fit_solver`: its times only; times,
weights and rates, for networks also shifts; and all these with a start in closed form. On
fresh noise, the distance to the endpoint of the exact flow, RMS per coordinate, divided by
that of `GDDIM()` with as many evaluations: the geometric mean over samples, the median, and
the root mean square. Cases: eight Gaussians on a ring under CLD (128 pilots, 512 samples);
a mixture around 500 images, whose scores are exact, under VP, CLD and BDM (64, 64); and the
included networks (64, 64).

    python benchmarks/learned_solvers.py
    python benchmarks/learned_solvers.py --cases "CLD ring" --steps 5
    python benchmarks/learned_solvers.py --cases "small at 32x32" --steps 8 --solvers all
    python benchmarks/learned_solvers.py --fid  # of the included solvers: half an hour
    python benchmarks/learned_solvers.py --quick  # only to see that it runs

Writes a table and a picture. Needs Debian's package `dataset-fashion-mnist`, but for the
ring and the networks.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


jax.config.update("jax_enable_x64", True)

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np


matplotlib.use("agg")

import matplotlib.pyplot as plt

import gddim_eqx as gd


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import data as data_sets


_here = Path(__file__).resolve().parent


class Case(NamedTuple):
    flow: gd.ProbabilityFlow
    data: gd.NormalData
    """The moments of the data."""
    dtype: Any
    pilots: int
    samples: int
    iterations: int


def _mixture(process: type, mixture: gd.GaussianMixture, *numbers: Any) -> Case:
    made = process(mixture.means.shape[1:])
    x = np.asarray(mixture.sample(jr.key(1), 20_000))
    data = gd.NormalData.from_samples(x, basis=made.basis if process is gd.BDM else None)
    flow = gd.ProbabilityFlow(made, mixture.model(made))
    return Case(flow, data, jnp.float64, *numbers)


def ring() -> gd.GaussianMixture:
    angle = np.pi / 4 * np.arange(8)
    return gd.GaussianMixture(np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)


def images() -> gd.GaussianMixture:
    return gd.GaussianMixture(data_sets.fashion_mnist()[:500] / 127.5 - 1, 0.02)


def _network(name: Any, iterations: int = 300) -> Case:
    flow = gd.checkpoints.pretrained(name)
    data = gd.checkpoints.pretrained_data("fashion-mnist")
    return Case(flow, data, jnp.float32, 64, 64, iterations)


def _untrained() -> Case:
    process = gd.VP((32, 32, 3))
    network = gd.nn.presets.small((32, 32, 3), key=jr.key(0))
    model = gd.nn.NetworkModel(process, network, data_std=0.5)
    data = gd.NormalData(jnp.zeros((32, 32, 3)), 0.25)
    flow = gd.ProbabilityFlow(process, model, "data")
    return Case(flow, data, jnp.float32, 64, 2, 6)


CASES: dict[str, Callable[[], Case]] = {
    "CLD ring": lambda: _mixture(gd.CLD, ring(), 128, 512, 400),
    "VP images": lambda: _mixture(gd.VP, images(), 64, 64, 400),
    "BDM images": lambda: _mixture(gd.BDM, images(), 64, 64, 400),
    "CLD images": lambda: _mixture(gd.CLD, images(), 64, 64, 400),
    "VP network": lambda: _network("fashion-mnist-vp"),
    "CLD network": lambda: _network("fashion-mnist-cld"),
    "BDM network": lambda: _network("fashion-mnist-bdm"),
    # Untrained, only for the time and memory of a few iterations.
    "small at 32x32": _untrained,
}


class Errors:
    """Distances to the exact flow, on fresh noise."""

    def __init__(self, case: Case):
        process = case.flow.process
        self.flow = case.flow
        self.u = process.prior(jr.key(0), (case.samples,), case.dtype)
        self.exact = self.run(gd.GDDIM(), gd.time_grid(process, 400, dtype=case.dtype))

    def run(self, solver, ts):
        return _run(self.flow, self.u, solver, ts)

    def __call__(self, solver, ts) -> np.ndarray:
        """Median, geometric mean and root mean square."""
        x = self.run(solver, ts)
        square = ((x - self.exact) ** 2).mean(tuple(range(1, x.ndim)))
        distance = np.sqrt(np.asarray(square, np.float64))
        rms = (distance**2).mean() ** 0.5
        return np.array([np.median(distance), np.exp(np.log(distance).mean()), rms])


@eqx.filter_jit
def _run(flow, u, solver, ts):
    return gd.generate(flow, u, solver=solver, ts=ts)


def measure(
    name: str, case: Case, steps: int, kinds: Sequence[str], output: Path
) -> list[dict[str, Any]]:
    """The errors of some solvers, in this case and with so many steps. Saves those that
    are learned."""
    process, errors = case.flow.process, Errors(case)
    grid = lambda *args: gd.time_grid(process, steps, *args, dtype=case.dtype)
    pilots = process.prior(jr.key(9), (case.pilots,), case.dtype)

    def learned(kind: str, learn: Any, start: gd.GaussianStart | None = None):
        began = time.perf_counter()
        fitted = gd.fit_solver(
            case.flow,
            pilots,
            steps,
            learn=learn,
            start=start,
            num_iterations=case.iterations,
            progress=False,
        )
        seconds = time.perf_counter() - began
        if kind == "start":
            label = name.lower().replace(" ", "-")
            gd.checkpoints.save(output / f"{label}-{steps}.npz", fitted.solver)
        return fitted.solver, fitted.ts, seconds

    every = ["times", "weights", "rate"]
    if case.dtype == jnp.float32:  # Shifts help networks only.
        every.append("shift")
    make = {
        "default": lambda: (gd.GDDIM(), grid(), 0.0),
        "paper": lambda: (gd.GDDIM(3, "noise"), grid("quadratic"), 0.0),
        "times": lambda: learned("times", ["times"]),
        "all": lambda: learned("all", every),
        "start": lambda: learned("start", every, gd.GaussianStart(case.data)),
    }
    solvers = {kind: make[kind]() for kind in make if kind in ("default", *kinds)}
    found = []
    for kind, (solver, ts, seconds) in solvers.items():
        median, mean, rms = errors(solver, ts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        numbers = dict(median=median, mean=mean, rms=rms, seconds=seconds, peak=peak)
        found.append(dict(case=name, steps=steps, solver=kind, **numbers))
    base = found[0]
    ratios = [
        "{} {:.3f} ({:.3f}, {:.3f})".format(
            r["solver"], *(r[k] / base[k] for k in ("mean", "median", "rms"))
        )
        for r in found[1:]
    ]
    last = found[-1]
    text = f"median of all {last['median']:.1e}; {last['seconds']:.0f} s"
    print(
        f"{name}, {steps}: {'; '.join(ratios)}; {text}, {last['peak']:.1f} GiB", flush=True
    )
    return found


def table(results: list[dict[str, Any]]) -> str:
    steps = sorted({r["steps"] for r in results})
    lines = ["| case | solver | " + " | ".join(map(str, steps)) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(steps))
    value = {(r["case"], r["solver"], r["steps"]): r for r in results}
    for case in dict.fromkeys(r["case"] for r in results):
        for solver in ("paper", "times", "all", "start"):
            row = []
            for n in steps:
                if (case, solver, n) not in value:
                    row.append("")
                    continue
                own, base = value[case, solver, n], value[case, "default", n]
                ratios = (own[k] / base[k] for k in ("mean", "median", "rms"))
                row.append("{:.2g} ({:.2g}, {:.2g})".format(*ratios))
            if any(row):
                lines.append(f"| {case} | {solver} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(r["case"] for r in results))
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.4 * len(names) + 1, 3),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names):
        for kind in ("paper", "default", "times", "all", "start"):
            own = [r for r in results if (r["case"], r["solver"]) == (name, kind)]
            own.sort(key=lambda r: r["steps"])
            x, y = [r["steps"] for r in own], [r["mean"] for r in own]
            axis.plot(x, y, marker=".", label=kind)
        axis.set(title=name, yscale="log", xticks=x, xlabel="evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("distance to the exact flow")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fid(output: Path) -> None:
    """Fashion-MNIST FIDs of 1,000 samples with the included learned solvers, with a start,
    and with `GDDIM()`: the mean over three seeds, and half the range."""
    features, seeds = gd.metrics.Classifier(), (0, 1, 2)
    budgets = (2, 3, 4, 5, 6, 8, 10)
    cache = Path.home() / ".cache" / "gddim_eqx"
    reference = gd.metrics.reference(data_sets.fashion_mnist(), features, cache)
    results = []
    for process in ("vp", "cld", "bdm"):
        name: Any = f"fashion-mnist-{process}"
        case, rows = _network(name), {}
        flow = case.flow

        def value(seed: int, **options: Any) -> float:
            x, _ = gd.sample(flow, jr.key(seed), 1000, batch_size=500, **options)
            vectors = features(gd.to_uint8(x))
            return gd.metrics.frechet_distance(vectors, reference.moments)

        for steps in budgets:
            grid = gd.time_grid(flow.process, steps, dtype=jnp.float32)
            learned = gd.checkpoints.pretrained_solver(name, steps)
            start = gd.GaussianStart(case.data, None, "sharpest")
            chosen: dict[str, dict[str, Any]] = {
                "default": dict(ts=grid),
                "start": dict(num_steps=steps, start=gd.GaussianStart(case.data)),
                "sharpest": dict(num_steps=steps, start=start),
                "known deviation": dict(num_steps=steps),
                "learned": dict(solver=learned),
            }
            for kind, options in chosen.items():
                values = [value(seed, **options) for seed in seeds]
                half = (max(values) - min(values)) / 2
                rows.setdefault(kind, {})[steps] = f"{np.mean(values):.3g} ± {half:.1g}"
                print(process, kind, steps, rows[kind][steps], flush=True)
        for kind, row in rows.items():
            cells = [row.get(n, "") for n in budgets]
            results.append(f"| {process.upper()}, {kind} | " + " | ".join(cells) + " |")
    head = "| Fashion-MNIST FID | " + " | ".join(map(str, budgets)) + " |\n"
    head += "| --- |" + " --- |" * len(budgets) + "\n"
    (output / "fid.md").write_text(head + "\n".join(results) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:-1])
    parser.add_argument("--steps", nargs="+", type=int, default=[3, 5, 8, 10])
    kinds = ["paper", "times", "all", "start"]
    parser.add_argument("--solvers", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fid", action="store_true", help="only measure FIDs")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    if arguments.output is None:
        quick = Path("runs") / "learned_solvers_quick"
        arguments.output = quick if arguments.quick else _here / "learned_solvers"
    cases = {name: CASES[name] for name in arguments.cases}
    if arguments.quick:
        make = lambda: _mixture(gd.VP, ring(), 9, 8, 3)
        cases, arguments.steps, arguments.solvers = {"VP ring": make}, [3], ["start"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.fid:
        return fid(arguments.output)
    path, results = arguments.output / "results.json", []
    if path.exists():
        results = json.loads(path.read_text())
    for name, make in cases.items():
        case = make()
        for steps in arguments.steps:
            found = measure(name, case, steps, arguments.solvers, arguments.output)
            key = lambda r: (r["case"], r["steps"], r["solver"])
            new = {key(r) for r in found}
            results = [r for r in results if key(r) not in new] + found
            path.write_text(json.dumps(results, indent=1))
        jax.clear_caches()
    text = table(results)
    (arguments.output / "table.md").write_text(text + "\n")
    draw(results, arguments.output / "errors.png")
    print(f"\nGeometric mean (median, RMS) of the error, divided by GDDIM()'s\n\n{text}")


if __name__ == "__main__":
    main()
