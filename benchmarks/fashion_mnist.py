"""The paper's comparison on real images: one network trained under VP, BDM and CLD, and
all samplers evaluated at the same numbers of network evaluations.

    python benchmarks/fashion_mnist.py          # hours on two CPU cores
    python benchmarks/fashion_mnist.py --gpu    # a larger network, minutes on a GPU
    python benchmarks/fashion_mnist.py --quick  # digits, only to see that it runs

It trains with `examples/train.py` and evaluates with `examples/evaluate.py`. If
interrupted, run the same command again to resume. `--tables` only shows the results so far.
Results, tables and pictures are written to `benchmarks/fashion_mnist`. Needs Debian's
package `dataset-fashion-mnist`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib


matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


_root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_root / "examples"))
import evaluate
import train
from results import budgets_in, SAMPLERS, samplers_in, table


_processes = ("vp", "bdm", "cld")
_samplers = [name for name in SAMPLERS if name != "ddim"]
_budgets = (5, 8, 10, 15, 20, 30, 50, 100, 200)
_repeated = (5, 10, 20, 50)  # with several seeds
# With --gpu, minutes in place of hours.
_samplers_gpu = ["gddim", "gddim-paper", "heun", "euler", "ancestral"]
_budgets_gpu = (5, 10, 20)


def call(example: ModuleType, quick: bool, *arguments: Any) -> None:
    words = list(map(str, arguments))
    if quick:
        return example.main(words)
    # In a separate process, whose memory is freed afterwards.
    subprocess.run([sys.executable, str(example.__file__), *words], check=True)


def train_model(process: str, output: Path, arguments: argparse.Namespace) -> None:
    if train.is_finished(output):
        return
    preset = "fashion-mnist-gpu" if arguments.gpu else "fashion-mnist"
    options = []
    if arguments.steps is not None:
        options = ["--steps", arguments.steps]
    if arguments.quick:
        preset = "digits"
        options = ["--steps", 2, "--batch-size", 4, "--optimiser.warmup", 1]
        options += ["--samples-every", 0]
    to = ("--process", process, "--output", output)
    call(train, arguments.quick, preset, *to, *options)


def measure(
    process: str, run: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results, and those on the quadratic grid."""
    samplers = _samplers_gpu if arguments.gpu else _samplers
    kinds = [run / "evaluation", run / "evaluation-quadratic"]

    def evaluate_some(seeds, budgets, samplers=samplers, output=kinds[0], options=()):
        call(
            evaluate,
            arguments.quick,
            run / "model.npz",
            *("--data.name", "digits" if arguments.quick else "fashion_mnist"),
            *("--number", arguments.number),
            *("--batch-size", 2500 if arguments.gpu else 500),
            *("--samplers", *samplers, "--evaluations", *budgets, "--seeds", *seeds),
            *("--output", output, *options),
        )

    def evaluate_all():
        options = ("--grid", "quadratic")
        if arguments.quick:
            evaluate_some([0], [3], ["gddim", "euler"])
            evaluate_some([0], [3], ["euler"], kinds[1], options)
            return
        evaluate_some([0], _budgets_gpu if arguments.gpu else _budgets)
        if arguments.seeds > 1:
            evaluate_some(range(1, arguments.seeds), _repeated)
        if process == "bdm" and not arguments.gpu:
            evaluate_some([0], [1000], ["ancestral"])
        other_grid = [name for name in samplers if SAMPLERS[name].grid == "clock"]
        evaluate_some([0], _budgets_gpu[1:], other_grid, kinds[1], options)

    if not arguments.tables:
        evaluate_all()
    found, other = (json.loads((kind / "results.json").read_text()) for kind in kinds)
    return found, other


def differences(results: list[dict[str, Any]], first: Path) -> list[dict[str, Any]]:
    """The RMS difference of samples from those of gDDIM with the most evaluations, for the
    same flow and noise."""

    def images(sampler: str, budget: int) -> np.ndarray:
        with np.load(first / f"{sampler}-{budget}-0.npz") as file:
            return file["images"].astype(float)

    flows = [name for name, sampler in SAMPLERS.items() if sampler.lam == 0]
    results = [r for r in results if r["seed"] == 0 and r["sampler"] in flows]
    best = images("gddim", max(r["budget"] for r in results))
    for r in results:
        if r["outcome"] == "finite":
            difference = images(r["sampler"], r["budget"]) - best
            r["difference"] = float((difference**2).mean() ** 0.5)
    return results


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(2.2 + 3.8 * len(found), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    axes = axes[0]
    for axis, (process, content) in zip(axes, found.items()):
        results = [r for r in content["results"] if r["outcome"] == "finite"]
        for name in samplers_in(results):
            mine = [r for r in results if r["sampler"] == name]
            groups = [[r for r in mine if r["budget"] == n] for n in budgets_in(mine)]
            x = [np.mean([r["evaluations"] for r in group]) for group in groups]
            y = [[r["frechet_distance"] for r in group] for group in groups]
            style = "-" if name.startswith("gddim") else "--"
            (line,) = axis.plot(
                x, [np.mean(v) for v in y], style, marker=".", label=SAMPLERS[name].name
            )
            low, high = ([f(v) for v in y] for f in (min, max))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        axis.set(xscale="log", yscale="log", title=process.upper())
        axis.set_xlabel("evaluations of the network")
        most = budgets_in(results)[-1]
        ticks = [n for n in (5, 10, 20, 50, 100, 200, 1000) if n <= most]
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yticks(ticks := [1, 2, 5, 10, 20, 50], labels=map(str, ticks))
    axes[0].set_ylabel(next(iter(found.values()))["protocol"]["frechet_distance"])
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--number", type=int, help="samples; 1000, or 10,000 with --gpu")
    parser.add_argument(
        "--seeds", type=int, help="number of seeds; by default 3, or 1 with --gpu"
    )
    parser.add_argument("--processes", nargs="+", default=_processes, choices=_processes)
    parser.add_argument("--steps", type=int, help="training steps; by default the preset's")
    parser.add_argument("--gpu", action="store_true", help="train a larger network")
    parser.add_argument("--tables", action="store_true", help="only show results so far")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    if arguments.number is None:
        default = 10_000 if arguments.gpu else 1000
        arguments.number = 16 if arguments.quick else default
    if arguments.seeds is None:
        arguments.seeds = 1 if arguments.gpu else 3
    kind = "_gpu" if arguments.gpu else "_quick" if arguments.quick else ""
    runs = arguments.runs or Path("runs") / f"fashion_mnist{kind}"
    output = arguments.output
    if output is None:
        output = runs if arguments.quick else _root / "benchmarks" / f"fashion_mnist{kind}"
    output.mkdir(parents=True, exist_ok=True)
    found, text = {}, []
    for process in _processes[-1:] if arguments.quick else arguments.processes:
        run = runs / process
        if not arguments.tables:
            train_model(process, run, arguments)
        content, other = measure(process, run, arguments)
        found[process] = content
        for name, kind in ((process, content), (f"{process}-quadratic", other)):
            (output / f"{name}.json").write_text(json.dumps(kind, indent=1))
        with Image.open(run / "evaluation" / "grid.png") as grid:
            grid.convert("L").quantize(32).save(output / f"{process}.png", optimize=True)
        protocol = content["protocol"]
        for metric in ("frechet_distance", "precision", "recall"):
            name = protocol.get(metric, metric.capitalize())
            text += [
                f"### {process.upper()}: {name}, {protocol['number_of_samples']} samples",
                table(content["results"], metric),
            ]
        text += [
            f"### {process.upper()}: RMS difference from the flow's samples in "
            "grey levels (0 to 255), over 16 images",
            table(differences(content["results"], run / "evaluation/first"), "difference"),
            f"### {process.upper()}: {protocol['frechet_distance']}, quadratic grid",
            table(other["results"]),
        ]
    (output / "tables.md").write_text("\n\n".join(text) + "\n")
    draw(found, output / "figure.png")
    print("\n\n".join(text))
    print(f"\nTables, pictures and results: {output}")


if __name__ == "__main__":
    main()
