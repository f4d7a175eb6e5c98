"""Measure how good the samples of a trained model are.

    python examples/evaluate.py runs/fashion-mnist/model.npz --data.name fashion_mnist
    python examples/evaluate.py model.npz --samplers gddim heun --evaluations 10 20 50
    python examples/evaluate.py checkpoint_15 --authors cifar10_cld --data.name cifar10 \
        --data.directory cifar-10-python.tar.gz --features inception \
        --weights pt_inception-2015-12-05-6726825d.pth --number 50000

For each sampler, number of evaluations of the network and seed it draws samples, and
compares them with the data. In the output directory it writes `results.json`, with the
protocol, and `grid.png`. Stop it and run it again, and it goes on where it was.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from einops import rearrange
from tqdm import tqdm
from train import Data, load, to_json

import gddim_eqx as gd


#
# Samplers
#


@dataclasses.dataclass(frozen=True)
class Sampler:
    name: str
    solver: dfx.AbstractSolver
    lam: float = 0.0
    grid: Literal["clock", "quadratic"] | None = "quadratic"
    """Of the times; `None` for steps that adapt to a tolerance."""
    evaluations_per_step: int = 1
    evaluations_at_start: int = 0
    only: type | None = None
    """The only kind of process that it is for."""

    def steps(self, evaluations: int) -> int:
        return (evaluations - self.evaluations_at_start) // self.evaluations_per_step


SAMPLERS = {
    "gddim": Sampler("gDDIM", gd.GDDIM(), grid="clock"),
    "gddim-paper": Sampler("gDDIM, as in the paper", gd.GDDIM(3, "noise")),
    "ddim": Sampler("gDDIM, order 1", gd.GDDIM(1, "noise")),
    "heun": Sampler("Heun", dfx.Heun(), evaluations_per_step=2),
    "tsit5": Sampler("Tsit5", dfx.Tsit5(), evaluations_per_step=6, evaluations_at_start=1),
    "dopri5": Sampler("Dopri5, adaptive", dfx.Dopri5(), grid=None),
    "euler": Sampler("Euler", dfx.Euler()),
    "ancestral": Sampler("Ancestral", gd.GDDIM(1), lam=1.0),
    "em": Sampler("Euler-Maruyama", dfx.Euler(), lam=1.0),
    "sscs": Sampler("SSCS", gd.SSCS(), lam=1.0, only=gd.CLD),
}


class Bench:
    """Draws samples of a model, in batches of one size."""

    def __init__(self, flow: gd.ProbabilityFlow, batch_size: int):
        devices = jax.devices()
        self.placement = gd.Placement(devices) if len(devices) > 1 else None
        if self.placement is not None:
            flow = self.placement.put(flow)
        self.flow = flow
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self._evaluations = 0
        self._tolerances: list[tuple[int, float]] = []

    def draw(self, sampler: Sampler, budget: int, key) -> tuple[np.ndarray, int]:
        """A batch of samples, and how often the network was evaluated.

        **Raises:** `FloatingPointError` if one is not finite.
        """
        flow = self.flow
        if sampler.grid is None:
            x, evaluations = self._adaptive(key, self._tolerance(budget))
        else:
            x, evaluations = gd.sample(
                flow.process,
                flow.model,
                key,
                self.batch_size,
                solver=sampler.solver,
                lam=sampler.lam,
                ts=gd.time_grid(flow.process, sampler.steps(budget), sampler.grid),
                predicts=flow.predicts,  # pyright: ignore[reportArgumentType]
                placement=self.placement,
            )
        return np.asarray(x), evaluations

    def can(self, sampler: Sampler, budget: int) -> bool:
        if sampler.only is not None and not isinstance(self.flow.process, sampler.only):
            return False
        if sampler.grid is None:
            return self._tolerance(budget) is not None
        return sampler.steps(budget) > 0

    def _tolerance(self, budget: int) -> float | None:
        """The least with which a batch takes no more evaluations than this."""
        tried = self._tolerances
        while not tried or (tried[-1][0] <= budget and tried[-1][1] > 1e-7):
            tolerance = 10 ** (1 - len(tried) / 4)
            tried.append((self._adaptive(jr.key(1000), tolerance)[1], tolerance))
        fit = [tolerance for used, tolerance in tried if used <= budget]
        return min(fit, default=None)

    def _adaptive(self, key, tolerance) -> tuple[np.ndarray, int]:
        self._evaluations = 0
        # As an array, to compile once for all.
        tolerance = jnp.asarray(tolerance)
        x = _adaptive(self.flow, key, tolerance, self.batch_size, self._count)
        jax.block_until_ready(x)
        jax.effects_barrier()
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError("Samples are not finite.")
        return np.asarray(x), self._evaluations

    def _count(self) -> None:
        self._evaluations += 1


@eqx.filter_jit
def _adaptive(flow, key, tolerance, number, count):
    def model(t, u, args):
        jax.debug.callback(count)
        return flow.model(t, u, args)

    process = flow.process
    solution = dfx.diffeqsolve(
        gd.ProbabilityFlow(process, model, flow.predicts, flow.factor),
        dfx.Dopri5(),
        process.t_max,
        process.t_min,
        None,
        process.prior(key, (number,)),
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=10_000,
    )
    return process.decode(solution.ys)[-1]


#
# Settings
#


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]
    """A file of `gddim_eqx.checkpoints.save`, or of the authors' code with `--authors`."""
    data: Data
    """What to compare with."""
    authors: str | None = None
    """What network a file of the authors' code has: `cifar10_cld`, `cifar10_bdm` or
    `celeba_cld`; or a file of their configuration, as JSON."""
    process: Literal["cld", "bdm"] = "cld"
    """The process of a file of the authors' code."""
    against: Literal["train", "test"] = "train"
    """Which part of the data to compare with."""
    features: Literal["pixels", "classifier", "inception"] = "classifier"
    """What to compare images by. The classifier is for Fashion-MNIST, Inception for
    images in colour, and pixels for any."""
    weights: Path | None = None
    """The file of Inception's weights."""
    samplers: tuple[str, ...] = ("gddim", "gddim-paper", "heun", "tsit5", "ancestral")
    evaluations: tuple[int, ...] = (10, 20, 50)
    """The most that each sampler may evaluate the network."""
    seeds: tuple[int, ...] = (0,)
    number: int = 10_000
    """Of samples for each sampler, number of evaluations and seed."""
    batch_size: int = 512
    """How many are drawn together. Rounded up to a multiple of the number of devices."""
    output: Path | None = None
    """By default `evaluation` beside the model."""
    cache: Path = Path.home() / ".cache" / "gddim_eqx"
    """Where to keep the features of data."""
    keep_images: bool = False
    """Write all samples too, as `images-*.npz`, for other tools."""


def read_model(config: Config, shape: tuple[int, ...]) -> gd.ProbabilityFlow:
    if config.authors is not None:
        flow = read_authors(config.model, config.authors, config.process, shape)
    else:
        flow = gd.checkpoints.load(config.model)
        if isinstance(flow, gd.nn.NetworkModel):
            flow = gd.ProbabilityFlow(flow.process, flow)
    if not isinstance(flow, gd.ProbabilityFlow):
        raise ValueError(f"{config.model} holds a {type(flow).__name__}, not a model.")
    if flow.process.shape != shape:
        raise ValueError(
            f"{config.model} is for data of shape {flow.process.shape}; those of "
            f"{config.data.name} have {shape}."
        )
    return flow


def read_authors(
    path: Path, authors: str, process: str, shape: tuple[int, ...]
) -> gd.ProbabilityFlow:
    presets = ("cifar10_cld", "cifar10_bdm", "celeba_cld")
    mixed_score = False
    if authors in presets:
        network = gd.checkpoints.load_authors(path, getattr(gd.nn.presets, authors))
    elif Path(authors).is_file():
        settings = json.loads(Path(authors).read_text())
        network = gd.checkpoints.load_authors(path, settings, size=(shape[0], shape[1]))
        mixed_score = settings.get("model", settings).get("mixed_score", False)
    else:
        raise ValueError(
            f"`--authors` must be one of {', '.join(presets)}, or a file; got {authors!r}."
        )
    made = {"cld": gd.CLD, "bdm": gd.BDM}[process](shape)
    channels = made.num_components * shape[-1]
    if network.shape != (*shape[:2], channels):
        raise ValueError(
            f"{path} has a network for inputs of shape {network.shape}, and {process} "
            f"needs {(*shape[:2], channels)}. Choose another `--process` or `--data`."
        )
    return gd.ProbabilityFlow(made, gd.nn.NetworkModel(made, network, mixed_score))


def read_features(config: Config) -> gd.metrics.AbstractFeatures:
    if config.features == "pixels":
        return gd.metrics.Pixels()
    if config.features == "classifier":
        return gd.metrics.Classifier()
    if config.weights is None:
        raise ValueError("Inception is read from a file: give `--weights`.")
    return gd.metrics.Inception(config.weights)


def check(config: Config) -> None:
    unknown = [name for name in config.samplers if name not in SAMPLERS]
    if unknown:
        raise ValueError(f"There is no sampler {unknown[0]!r}, but {', '.join(SAMPLERS)}.")
    for name in ("number", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be positive; got {getattr(config, name)}.")
    if min(config.evaluations, default=0) < 1:
        raise ValueError(f"`evaluations` must be positive; got {config.evaluations}.")


#
# One sampler, number of evaluations and seed
#


def draw_parts(
    config: Config,
    bench: Bench,
    features: gd.metrics.AbstractFeatures,
    directory: Path,
    cell: tuple[str, int, int],
    progress: tqdm,
) -> list[dict[str, np.ndarray]]:
    """Samples and their features, batch by batch; batches that are in the directory are
    not drawn again."""
    name, budget, seed = cell
    parts = []
    for n in range(-(-config.number // bench.batch_size)):
        path = directory / f"{n:05d}.npz"
        if not path.exists():
            key = jr.fold_in(jr.key(seed), n)
            start = time.perf_counter()
            x, evaluations = bench.draw(SAMPLERS[name], budget, key)
            seconds = time.perf_counter() - start
            images = gd.metrics.to_uint8(x[: config.number - n * bench.batch_size])
            write(
                path,
                images=images,
                vectors=features(images),
                evaluations=np.array(evaluations),
                seconds=np.array(seconds),
            )
        with np.load(path) as file:
            parts.append({key: file[key] for key in file.files})
        progress.update()
    return parts


def measure(
    parts: list[dict[str, np.ndarray]], reference: gd.metrics.Reference
) -> dict[str, float]:
    metrics = gd.metrics
    moments = functools.reduce(
        operator.add, (metrics.Moments.of(part["vectors"]) for part in parts)
    )
    data = reference.vectors
    some = np.concatenate([part["vectors"] for part in parts])[: len(data)]
    kernel = metrics.kernel_distance(some, data, 20, min(1000, len(some), len(data)))
    precision, recall = metrics.precision_recall(some, data)
    return {
        "frechet_distance": metrics.frechet_distance(moments, reference.moments),
        "kernel_distance": kernel.mean,
        "sliced_wasserstein": metrics.sliced_wasserstein(some, data),
        "precision": precision,
        "recall": recall,
    }


def run_cell(
    config: Config,
    bench: Bench,
    features: gd.metrics.AbstractFeatures,
    reference: gd.metrics.Reference,
    output: Path,
    cell: tuple[str, int, int],
    progress: tqdm,
) -> dict[str, Any]:
    name, budget, seed = cell
    found: dict[str, Any] = {"sampler": name, "budget": budget, "seed": seed}
    if not bench.can(SAMPLERS[name], budget):
        return found | {"outcome": "impossible"}
    text = f"{name}-{budget}-{seed}"
    directory = output / "parts" / text
    directory.mkdir(parents=True, exist_ok=True)
    try:
        parts = draw_parts(config, bench, features, directory, cell, progress)
    except FloatingPointError as error:
        shutil.rmtree(directory)
        return found | {"outcome": "diverged", "message": str(error)}
    if config.keep_images:
        images = np.concatenate([part["images"] for part in parts])
        write(output / f"images-{text}.npz", images=images)
    write(output / "first" / f"{text}.npz", images=parts[0]["images"][:16])
    found |= {
        "outcome": "finite",
        "evaluations": float(np.mean([part["evaluations"] for part in parts])),
        "seconds": round(float(sum(part["seconds"] for part in parts)), 2),
        **measure(parts, reference),
    }
    shutil.rmtree(directory)
    return found


def write(path: Path, **arrays: np.ndarray) -> None:
    """Never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(path)


#
# All of them
#


def protocol(
    config: Config,
    features: gd.metrics.AbstractFeatures,
    images: np.ndarray,
    batch_size: int,
) -> dict[str, Any]:
    """All that the numbers depend on, besides sampler, budget and seed."""
    data = to_json(config.data)
    return {
        "frechet_distance": features.name,
        "features": features.key,
        "model": hashlib.sha256(config.model.read_bytes()).hexdigest(),
        "authors": config.authors and [config.authors, config.process],
        "data": {key: data[key] for key in ("name", "size", "crop")},
        "against": f"{config.against}, {len(images)} images",
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "number_of_samples": config.number,
        "batch_size": batch_size,
        "pixels": "rounded to uint8, not resized",
        "vectors_for_other_measures": min(config.number, len(images), 10_000),
    }


def read_results(path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        before, results = found["protocol"], found["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it to begin anew."
        ) from error
    for key, value in wanted.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} was measured with another {key}: {before.get(key)!r} instead of "
                f"{value!r}. Give another `--output`."
            )
    return results


def evaluate(config: Config) -> list[dict[str, Any]]:
    check(config)
    output = config.output or config.model.parent / "evaluation"
    images = load(config.data, train=config.against == "train")
    if images.dtype != np.uint8:
        raise ValueError(f"{config.data.name} has no images.")
    flow, features = read_model(config, images.shape[1:]), read_features(config)
    bench = Bench(flow, min(config.batch_size, config.number))
    wanted = protocol(config, features, images, bench.batch_size)
    results = read_results(output / "results.json", wanted)
    print(f"Comparing with {len(images)} images.", file=sys.stderr)
    number = wanted["vectors_for_other_measures"]
    reference = gd.metrics.reference(images, features, config.cache, number)
    done = {(r["sampler"], r["budget"], r["seed"]) for r in results}
    # Seed by seed, for a whole table early on.
    cells = [
        (name, budget, seed)
        for seed in config.seeds
        for name in config.samplers
        for budget in config.evaluations
        if (name, budget, seed) not in done
    ]
    num_parts = -(-config.number // bench.batch_size)
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=num_parts * len(cells), unit=" batches", mininterval=1) as progress:
        for n, cell in enumerate(cells):
            progress.set_description(" ".join(map(str, cell)), refresh=False)
            results.append(
                run_cell(config, bench, features, reference, output, cell, progress)
            )
            text = json.dumps({"protocol": wanted, "results": results}, indent=1)
            partial = output / ".results.json"
            partial.write_text(text)
            partial.replace(output / "results.json")
            progress.update((n + 1) * num_parts - progress.n)
    draw_grid(results, output)
    print(f"{features.name} ({config.number} samples, against {wanted['against']}):\n")
    print(table(results))
    print(f"\nAll measures: {output / 'results.json'}. Samples: {output / 'grid.png'}.")
    return results


def samplers_in(results: list[dict[str, Any]]) -> list[str]:
    names = {r["sampler"] for r in results if r["outcome"] != "impossible"}
    return [name for name in SAMPLERS if name in names]


def budgets_in(results: list[dict[str, Any]]) -> list[int]:
    return sorted({r["budget"] for r in results})


def table(results: list[dict[str, Any]], metric: str = "frechet_distance") -> str:
    """In Markdown: the mean over seeds, and half the range if there are several. Where
    the evaluations made are fewer than allowed by more than a tenth, their number."""
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
            row.append(text if used >= 0.9 * budget else f"{text} ({used:.0f})")
        lines.append(f"| {SAMPLERS[name].name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw_grid(results: list[dict[str, Any]], output: Path) -> None:
    """Sixteen samples for each sampler and number of evaluations, from the same noise."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names, budgets = samplers_in(results), budgets_in(results)
    if not names:
        return
    seed = min(r["seed"] for r in results)
    figure, axes = plt.subplots(
        len(names),
        len(budgets),
        figsize=(1.6 + 1.3 * len(budgets), 0.4 + 1.3 * len(names)),
        squeeze=False,
        layout="constrained",
    )
    for axis, budget in zip(axes[0], budgets):
        axis.set_title(budget)
    for row, name in zip(axes, names):
        row[0].set_ylabel(
            textwrap.fill(SAMPLERS[name].name, 14), rotation=0, ha="right", va="center"
        )
        for axis, budget in zip(row, budgets):
            axis.set(xticks=[], yticks=[])
            path = output / "first" / f"{name}-{budget}-{seed}.npz"
            if path.exists():
                with np.load(path) as file:
                    images = tiled(file["images"][:16])
                axis.imshow(images, cmap="gray", vmin=0, vmax=255)
            else:
                axis.set_frame_on(False)
    figure.suptitle("Evaluations of the network, at most")
    figure.savefig(output / "grid.png", dpi=120)
    plt.close(figure)


def tiled(images: np.ndarray) -> np.ndarray:
    """A square of images; the last places stay black."""
    side = math.isqrt(len(images) - 1) + 1
    images = np.pad(images, [(0, side**2 - len(images)), (0, 1), (0, 1), (0, 0)])
    grid = rearrange(images, "(a b) h w c -> (a h) (b w) c", a=side)
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    try:
        evaluate(config)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
