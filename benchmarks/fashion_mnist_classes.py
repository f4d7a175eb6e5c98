"""Class-conditional models of Fashion-MNIST, with and without classifier-free guidance.

    python benchmarks/fashion_mnist_classes.py           # two hours on two CPU cores
    python benchmarks/fashion_mnist_classes.py --quick   # digits, only to see that it runs

Trains with `examples/train.py` under VP and CLD, and evaluates with `examples/evaluate.py`
at guidance scales of 1, 2 and 4: the distance from the data, and the share of samples that
a classifier takes for their label. If interrupted, run the same command again to resume.
Writes results and a picture to `benchmarks/fashion_mnist`. Needs Debian's package
`dataset-fashion-mnist`.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import gddim_eqx as gd


_root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_root / "examples"))
import evaluate
import train
from fashion_mnist import call
from results import table


_processes = ("vp", "cld")
_scales = (1, 2, 4)


def measure(process: str, run: Path, quick: bool) -> dict[str, dict]:
    """The results at each guidance scale, for a model that is trained if need be."""
    preset, options = "fashion-mnist-classes", []
    if quick:
        preset, options = "digits", ["--data.labels", "--steps", 2, "--batch-size", 4]
        options += ["--optimiser.warmup", 1, "--samples-every", 0]
    if not train.is_finished(run):
        call(train, quick, preset, "--process", process, "--output", run, *options)
    found = {}
    for scale in _scales[1:2] if quick else _scales:
        output = run / f"evaluation-{scale}"
        call(
            evaluate,
            quick,
            run / "model.npz",
            *("--data.name", "digits" if quick else "fashion_mnist"),
            *("--number", 16 if quick else 1000, "--batch-size", 500),
            *("--samplers", "gddim", "--evaluations", *((3,) if quick else (10, 20, 50))),
            *("--seeds", *((0, 1, 2) if scale == 1 and not quick else (0,))),
            *("--guidance", scale, "--output", output),
        )
        found[f"{process}, guidance {scale}"] = json.loads(
            (output / "results.json").read_text()
        )
    return found


def rows(flow: gd.ProbabilityFlow, num_classes: int) -> list[np.ndarray]:
    """Two samples of each class at each guidance scale, from the same noise."""
    labels = np.repeat(np.arange(num_classes), 2)
    made = []
    for scale in _scales:
        guided = gd.classifier_free_guidance(flow, scale=scale)
        x, _ = gd.sample(guided, jax.random.key(0), len(labels), 20, args=labels)
        made.append(np.hstack(list(gd.to_uint8(x))).squeeze())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_mnist_classes"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    output = arguments.output
    if output is None:
        output = _root / "benchmarks" / "fashion_mnist"
        output = arguments.runs / "quick" if arguments.quick else output
    output.mkdir(parents=True, exist_ok=True)
    found, picture = {}, []
    for process in _processes[-1:] if arguments.quick else _processes:
        run = arguments.runs / process
        found |= measure(process, run, arguments.quick)
        flow = gd.checkpoints.load(run / "model.npz")
        picture += rows(flow, flow.model.network.num_classes)
    (output / "classes.json").write_text(json.dumps(found, indent=1))
    Image.fromarray(np.vstack(picture)).save(output / "classes.png", optimize=True)
    for name, content in found.items():
        print(f"\n{name}: {content['protocol']['frechet_distance']}\n")
        print(table(content["results"]))
        if "accuracy" in content["results"][0]:
            print("\nThe share that is classified as its label:\n")
            print(table(content["results"], "accuracy"))
    print(f"\nResults and a picture: {output}")


if __name__ == "__main__":
    main()
