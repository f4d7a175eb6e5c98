r"""Evaluate the samples of a trained model.

    python examples/evaluate.py runs/fashion-mnist/model.npz --data.name fashion_mnist
    python examples/evaluate.py runs/digits/model.npz --data.name digits \
        --samplers gddim heun --evaluations 10 20 50
    python examples/evaluate.py runs/photos/model.npz --data.name folder \
        --data.directory photos --data.size 32
    python examples/evaluate.py mine.npz --like mine:network --data.name digits
    python examples/evaluate.py checkpoint_15 --authors cifar10_cld --data.name cifar10 \
        --data.directory cifar-10-python.tar.gz --features inception \
        --weights pt_inception-2015-12-05-6726825d.pth --number 50000
    python examples/evaluate.py runs/fashion-mnist-classes/model.npz \
        --data.name fashion_mnist --guidance 2

For each sampler, number of network evaluations and seed, draws samples and compares them
with the data: of a folder, with the images that training held out. As a scale, it compares
other real images with them too. Writes `results.json`, with the protocol, and `grid.png` to
the output directory. If interrupted, run the same command again to resume.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import operator
import os
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import authors_config
import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tqdm import tqdm
from train import has_test, load, load_labels, OWN, Source, tiled, to_json

import gddim_eqx as gd


#
# Samplers
#


@dataclasses.dataclass(frozen=True)
class Sampler:
    name: str
    solver: dfx.AbstractSolver
    lam: float = 0.0
    grid: Literal["clock", "quadratic"] = "clock"
    """The time grid."""
    evaluations_per_step: int = 1
    evaluations_at_start: int = 0
    only: type = gd.AbstractProcess
    """The only kind of process that it applies to."""

    @property
    def described(self) -> str:
        return f"{self.solver!r}, lambda {self.lam}, grid {self.grid}"


SAMPLERS = {
    "gddim": Sampler("gDDIM", gd.GDDIM()),
    "gddim-paper": Sampler(
        "gDDIM, as in the paper", gd.GDDIM(3, "noise"), grid="quadratic"
    ),
    "ddim": Sampler("gDDIM, order 1", gd.GDDIM(1, "noise")),
    "heun": Sampler("Heun", dfx.Heun(), evaluations_per_step=2),
    "tsit5": Sampler("Tsit5", dfx.Tsit5(), evaluations_per_step=6, evaluations_at_start=1),
    "euler": Sampler("Euler", dfx.Euler()),
    "ancestral": Sampler("Ancestral", gd.GDDIM(1), lam=1.0),
    "em": Sampler("Euler-Maruyama", dfx.Euler(), lam=1.0),
    "sscs": Sampler("SSCS", gd.SSCS(), lam=1.0, only=gd.CLD),
}


def _names(samplers: dict[str, Sampler]) -> list[str]:
    return [f"`{name}` ({sampler.name})" for name, sampler in samplers.items()]


class Bench:
    """Draws samples from a model, in batches of one size."""

    def __init__(self, config: "Config", flow: gd.ProbabilityFlow):
        devices = jax.devices()
        self.placement = gd.Placement(devices) if len(devices) > 1 else None
        # Those of all samples, for a class-conditional model.
        self.labels = labels_of(config, flow)
        flow = guided(config, flow)
        self.flow = flow if self.placement is None else self.placement.put(flow)
        self.denoise: Any = config.denoise
        size = min(config.batch_size, config.number)
        self.batch_size = -(-size // len(devices)) * len(devices)

    def steps(self, sampler: Sampler, budget: int) -> int:
        """The number of steps; 0 if the sampler does not apply."""
        rest = budget - (self.denoise is not None) - sampler.evaluations_at_start
        applies = isinstance(self.flow.process, sampler.only)
        return max(rest, 0) // sampler.evaluations_per_step if applies else 0

    def draw(
        self, sampler: Sampler, budget: int, key, first: int, number: int
    ) -> tuple[np.ndarray, float]:
        """Some of all samples, and the number of evaluations of the model.

        **Raises:** `FloatingPointError` or `RuntimeError` if sampling fails.
        """
        # Whole batches, as those of another size are compiled again.
        rounded = -(-number // self.batch_size) * self.batch_size
        labels = self.labels
        if labels is not None:
            labels = labels[np.arange(first, first + rounded) % len(labels)]
        x, evaluations = gd.sample(
            self.flow,
            key,
            rounded,
            solver=sampler.solver,
            lam=sampler.lam,
            denoise=self.denoise,
            ts=gd.time_grid(self.flow.process, self.steps(sampler, budget), sampler.grid),
            args=labels,
            first=first,
            batch_size=self.batch_size,
            placement=self.placement,
        )
        assert evaluations is not None  # known for all samplers here
        return np.asarray(x[:number]), evaluations


#
# Settings
#


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]
    """A file written by `gddim_eqx.checkpoints.save`; or, with `--authors`, by the
    authors' code."""
    data: Source
    """What to compare with."""
    authors: str | None = None
    """The network in a checkpoint of the authors' code: `cifar10_cld`,
    `cifar10_bdm` or `celeba_cld`; or a JSON file with their configuration."""
    process: Literal["cld", "bdm"] | None = None
    """The process of a checkpoint of the authors' code; by default CLD."""
    like: str | None = None
    """For a model with a custom network or process: `module:name` of a function without
    arguments that returns a model of the same structure, as for
    `gddim_eqx.checkpoints.load(path, like=...)`. The module may be in this directory."""
    against: Literal["train", "test"] | None = None
    """Which split of the data to compare with: by default `test` for a folder or packed
    images of which some are held out, and otherwise `train`, as in the literature."""
    features: Literal["pixels", "classifier", "inception"] | None = None
    """The features to compare images by: by default Inception's with `weights`, the
    classifier's for Fashion-MNIST, and otherwise pixels, whose distances are no FIDs."""
    weights: Path | None = None
    """The file of Inception weights."""
    samplers: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="Any of " + ", ".join(_names(SAMPLERS)) + "."),
    ] = ("gddim", "gddim-paper", "heun", "tsit5", "ancestral")
    evaluations: tuple[int, ...] = (10, 20, 50)
    """Budgets: the maximum number of network evaluations for each sampler."""
    grid: Literal["clock", "quadratic"] | None = None
    """The time grid of all samplers; by default `clock`, and `quadratic` for gDDIM as in
    the paper. It can matter more than the sampler."""
    denoise: Literal["drift", "exact"] | None = None
    """How to remove the noise that is left at the end, as in `gddim_eqx.sample`. It uses
    one of the evaluations. The authors of the paper use `drift`."""
    guidance: float = 1.0
    """For a class-conditional model: the scale of classifier-free guidance. Unless it is 1,
    an evaluation of the model is two of its network."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds: everything is measured once with each."""
    number: int = 10_000
    """The number of samples for each sampler, number of evaluations and seed."""
    batch_size: int = 512
    """The number of samples per batch. Rounded up to a multiple of the device count."""
    output: Path | None = None
    """By default `evaluation` beside the model."""
    cache: Path = Path.home() / ".cache" / "gddim_eqx"
    """Where to cache the features of the data."""
    keep_images: bool = False
    """Save all samples that are drawn, as `images-*.npz`, for other tools."""


def sampler_of(config: Config, name: str) -> Sampler:
    sampler = SAMPLERS[name]
    return dataclasses.replace(sampler, grid=config.grid or sampler.grid)


def read_model(config: Config, shape: tuple[int, ...]) -> gd.ProbabilityFlow:
    if config.authors is not None:
        process = config.process or "cld"
        flow = read_authors(config.model, config.authors, process, shape)
    else:
        flow = read_ours(config.model, config.like)
        if isinstance(flow, gd.nn.NetworkModel):
            flow = gd.ProbabilityFlow(flow.process, flow)
    if not isinstance(flow, gd.ProbabilityFlow):
        raise ValueError(
            f"{config.model} holds a {type(flow).__name__}, not a model and its process. "
            "Save a `gddim_eqx.ProbabilityFlow` of it, or a `gddim_eqx.nn.NetworkModel`."
        )
    if flow.process.shape != shape:
        raise ValueError(
            f"{config.model} is for data of shape {flow.process.shape}; those of "
            f"{config.data.name} have {shape}."
        )
    return flow


def num_classes_of(flow: gd.ProbabilityFlow) -> int | None:
    """The number of classes of a class-conditional model."""
    return getattr(getattr(flow.model, "network", None), "num_classes", None)


def metadata_of(config: Config) -> dict[str, Any]:
    """What `train.py` recorded with the model."""
    return {} if config.authors is not None else gd.checkpoints.metadata(config.model)


def check_held_out(config: Config, other: np.ndarray | None) -> None:
    """Warn unless the model was trained on the other images, and not on those that samples
    are compared with."""
    if config.against != "test" or config.data.name not in OWN:
        return
    recorded = metadata_of(config).get("trained_on")
    if recorded is None:
        message = "It is not recorded what the model was trained on"
    elif recorded != gd.training.Batches(other, 1).fingerprint():
        message = "The model was not trained on the other images of these data"
    else:
        return
    print(f"{message}: it may have been on those held out.", file=sys.stderr)


def guided(config: Config, flow: gd.ProbabilityFlow) -> gd.ProbabilityFlow:
    if config.guidance == 1:
        return flow
    if num_classes_of(flow) is None:
        raise ValueError(f"`--guidance` needs a class-conditional model: {config.model}.")
    return gd.classifier_free_guidance(flow, scale=config.guidance)


def labels_of(config: Config, flow: gd.ProbabilityFlow) -> np.ndarray | None:
    """The labels of the samples of a class-conditional model, as frequent as in the
    data."""
    if (num_classes := num_classes_of(flow)) is None:
        return None
    known = metadata_of(config).get("classes")
    labels, classes = load_labels(config.data, config.against != "test", known)
    if labels.max() >= num_classes or list(classes) != (known or list(classes)):
        names = f", {', '.join(known)}" if known else ""
        raise ValueError(
            f"{config.model} is for {num_classes} classes{names}, but {config.data.name} "
            f"has {len(classes)}: {', '.join(classes)}."
        )
    places = (np.arange(config.number) + 0.5) * len(labels) / config.number
    labels = np.sort(labels)[places.astype(int)]
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def read_ours(path: Path, like: str | None) -> Any:
    if like is not None:
        return gd.checkpoints.load(path, like=named(like)())
    try:
        return gd.checkpoints.load(path)
    except ValueError as error:
        if "like=" in str(error):
            raise ValueError(f"{error} Here: `--like module:function`.") from error
        raise


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
    path: Path, authors: str, process: str, shape: tuple[int, ...]
) -> gd.ProbabilityFlow:
    presets = ("cifar10_cld", "cifar10_bdm", "celeba_cld")
    mixed_score = False
    if authors in presets:
        network = gd.checkpoints.load_authors(path, getattr(gd.nn.presets, authors))
    elif Path(authors).is_file():
        settings = json.loads(Path(authors).read_text())
        states = shape[-1] * (2 if process == "cld" else 1)
        network = authors_config.network(settings, states, (shape[0], shape[1]))
        network = gd.checkpoints.load_authors(path, network)
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


def features_of(config: Config) -> str:
    if config.features is not None:
        return config.features
    if config.weights is not None:
        return "inception"
    return "classifier" if config.data.name == "fashion_mnist" else "pixels"


def read_features(config: Config, shape: tuple[int, ...]) -> gd.metrics.AbstractFeatures:
    name = features_of(config)
    print(f"Features: {name}.", file=sys.stderr)
    if name == "pixels":
        return gd.metrics.Pixels()
    if name == "classifier":
        found = gd.metrics.Classifier()
        if shape != found.classifier.shape:
            raise ValueError(
                f"`--features classifier` is for images of shape {found.classifier.shape}; "
                f"got {shape}. Use `--features pixels`."
            )
        return found
    if config.weights is None or shape[-1] != 3:
        raise ValueError(
            f"`--features inception` is for images in colour, of shape {shape} here, and "
            "read from a file: give `--weights`. Or use `--features pixels`, whose "
            "distances are not FIDs."
        )
    return gd.metrics.Inception(config.weights)


def check(config: Config) -> None:
    unknown = [name for name in config.samplers if name not in SAMPLERS]
    if unknown:
        raise ValueError(f"No sampler {unknown[0]!r}. Choose from {', '.join(SAMPLERS)}.")
    for name in ("samplers", "evaluations", "seeds"):
        given = getattr(config, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"`{name}` must not be empty or have duplicates; got {given}.")
    if config.number < 4:
        raise ValueError(f"`number` must be at least 4; got {config.number}.")
    if min(config.batch_size, *config.evaluations) < 1:
        raise ValueError("`evaluations` and `batch_size` must be positive.")
    if config.weights is not None and config.features not in (None, "inception"):
        raise ValueError("`weights` are for `--features inception`.")
    if config.authors is None and config.process is not None:
        raise ValueError("`process` is for `--authors`; other files record theirs.")
    if config.authors is not None and config.like is not None:
        raise ValueError("`like` is not for `--authors`, which specifies the network.")


#
# One sampler, number of evaluations and seed
#


class Cell(NamedTuple):
    sampler: str
    budget: int
    seed: int

    def __str__(self):
        return f"{self.sampler}-{self.budget}-{self.seed}"


# The minimum number of samples that are drawn, measured and saved at a time.
_per_part = 2048


_subsets = 20  # For the kernel distance.


def measure(
    vectors: np.ndarray, moments: gd.metrics.Moments, reference: gd.metrics.Reference
) -> dict[str, float]:
    metrics, number = gd.metrics, min(len(vectors), len(reference.vectors))
    some, data = vectors[:number], reference.vectors[:number]
    kernel = metrics.kernel_distance(some, data, _subsets, min(1000, number))
    precision, recall = metrics.precision_recall(some, data)
    return {
        "frechet_distance": metrics.frechet_distance(moments, reference.moments),
        "kernel_distance": kernel.mean,
        "sliced_wasserstein": metrics.sliced_wasserstein(some, data),
        "precision": precision,
        "recall": recall,
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    config: Config
    bench: Bench
    features: gd.metrics.AbstractFeatures
    reference: gd.metrics.Reference
    output: Path
    parts: Path
    """A directory for the samples of cells that are not complete."""

    @property
    def size(self) -> int:
        """The number of samples in each part but the last."""
        return -(-_per_part // self.bench.batch_size) * self.bench.batch_size

    def draw(self, cell: Cell, progress: tqdm) -> dict[str, list[np.ndarray]]:
        """Draw samples and compute their features, part by part; parts that are in the
        directory are not drawn again."""
        found: dict[str, list] = {"images": [], "vectors": [], "evaluations": []}
        sampler, key = sampler_of(self.config, cell.sampler), jr.key(cell.seed)
        for first in range(0, self.config.number, self.size):
            path = self.parts / str(cell) / f"{first:08d}.npz"
            if not path.exists():
                number = min(self.size, self.config.number - first)
                x, evaluations = self.bench.draw(sampler, cell.budget, key, first, number)
                images = gd.to_uint8(x)
                vectors = self.features(images)
                write_arrays(path, images, vectors=vectors, evaluations=evaluations)
            with np.load(path) as file:
                for name, values in found.items():
                    values.append(file[name])
            progress.update()
        return found

    def __call__(self, cell: Cell, progress: tqdm) -> dict[str, Any]:
        """The result of a cell."""
        sampler = sampler_of(self.config, cell.sampler)
        result: dict[str, Any] = {**cell._asdict(), "solver": sampler.described}
        try:
            if not self.bench.steps(sampler, cell.budget):
                return result | {"outcome": "impossible"}
            drawn = self.draw(cell, progress)
        except (FloatingPointError, RuntimeError) as error:
            return result | {"outcome": "diverged", "message": str(error)}
        images, vectors = (np.concatenate(drawn[name]) for name in ("images", "vectors"))
        if self.config.keep_images:
            write_arrays(self.output / f"images-{cell}.npz", images)
        write_arrays(self.output / "first" / f"{cell}.npz", images[:16])
        moments = map(gd.metrics.Moments.of, drawn["vectors"])
        result |= {
            "outcome": "finite",
            "evaluations": float(np.mean(drawn["evaluations"])),
            **measure(vectors, functools.reduce(operator.add, moments), self.reference),
        }
        if self.bench.labels is not None and isinstance(
            self.features, gd.metrics.Classifier
        ):
            # The share of samples that the classifier takes for their label.
            found = jax.vmap(self.features.classifier.last)(jnp.asarray(vectors)).argmax(1)
            result["accuracy"] = float((np.asarray(found) == self.bench.labels).mean())
        return result


def write_arrays(path: Path, images: np.ndarray, **arrays: Any) -> None:
    write(path, lambda file: np.savez(file, images=images, **arrays))


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name first, so that it is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        save(file)
    partial.replace(path)


#
# All of them
#


def protocol(
    config: Config,
    flow: gd.ProbabilityFlow,
    features: gd.metrics.AbstractFeatures,
    images: np.ndarray,
    batch_size: int,
) -> dict[str, Any]:
    """Everything that the numbers depend on, besides sampler, budget and seed."""
    like, authors = config.like, config.authors
    if authors is not None and Path(authors).is_file():
        authors = digest(Path(authors).read_bytes())
    if like is not None:
        file = inspect.getsourcefile(named(like))
        like += f" {file and digest(Path(file).read_bytes())}"
    dtype = jax.tree_util.tree_leaves(flow.process.prior(jr.key(0), (1,)))[0].dtype
    used = min(config.number, len(images), 10_000)
    return {
        "frechet_distance": features.name,
        "features": features.key,
        "model": digest(config.model.read_bytes()),
        "authors": authors,
        "like": like,
        "data": {k: to_json(config.data)[k] for k in ("name", "size", "crop")},
        "against": f"{config.against}, {len(images)} images",
        "images": digest(np.ascontiguousarray(images).data),
        "number_of_samples": config.number,
        "batch_size": batch_size,
        "denoise": config.denoise,
        "guidance": None if config.guidance == 1 else config.guidance,
        "grid": config.grid or "that of each sampler",
        "last_time": flow.process.t_min,
        "pixels": "rounded to uint8, not resized",
        "kernel_distance": f"{_subsets} subsets of {min(1000, used)}",
        "sliced_wasserstein": f"256 directions, {used} images",
        "precision_and_recall": f"3 neighbours, {used} images",
        "computed": f"{dtype} on {jax.default_backend()}, jax {jax.__version__}, "
        f"gddim_eqx {gd.__version__}",
    }


def digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def read_results(
    config: Config, path: Path, wanted: dict[str, Any]
) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    before, results = found["protocol"], found["results"]
    # A run that failed before it drew anything leaves no samples of another protocol.
    if not results and not any((path.parent / "parts").glob("*/*/*.npz")):
        return []
    for r in results:
        name, solver = r["sampler"], r["solver"]
        known = name in SAMPLERS and sampler_of(config, name).described
        before, wanted = before | {name: solver}, wanted | {name: known}
    for key in {**wanted, **before}:
        if before.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} was measured with another {key}: {before.get(key)!r} instead of "
                f"{wanted.get(key)!r}. Give another `--output`."
            )
    return results


def evaluate(config: Config) -> list[dict[str, Any]]:
    check(config)
    output = config.output or config.model.parent / "evaluation"
    if config.against is None:
        own = config.data.name in OWN and has_test(config.data)
        config = dataclasses.replace(config, against="test" if own else "train")
    images = load(config.data, train=config.against == "train")
    if images.dtype != np.uint8:
        raise ValueError(f"{config.data.name} has no images.")
    if len(images) < 4:
        raise ValueError(
            f"There are {len(images)} images to compare with, and 4 are needed at least. "
            "Give more, by `--data.test` or a larger `--data.held-out`; or `--against "
            "train`."
        )
    other = other_split(config)
    check_held_out(config, other)
    flow = read_model(config, images.shape[1:])
    features = read_features(config, images.shape[1:])
    bench = Bench(config, flow)
    wanted = protocol(config, flow, features, images, bench.batch_size)
    return run_cells(config, bench, features, images, other, wanted, output)


def other_split(config: Config) -> np.ndarray | None:
    """Real images besides those to compare with, if there are any."""
    if not has_test(config.data):
        return None
    try:
        return load(config.data, train=config.against == "test")
    except ValueError as error:
        if config.data.name in OWN:
            raise
        print(f"There are no other images as a scale: {error}", file=sys.stderr)
        return None


def measure_real(
    config: Config,
    features: gd.metrics.AbstractFeatures,
    reference: gd.metrics.Reference,
    images: np.ndarray | None,
) -> dict[str, Any] | None:
    """As for samples, for some real images; `None` if there are too few."""
    if images is None or len(images) < 4:
        return None
    vectors = gd.metrics.reference(images, features, config.cache).vectors[: config.number]
    measured = measure(vectors, gd.metrics.Moments.of(vectors), reference)
    return {"number": len(vectors), **measured}


def run_cells(
    config: Config,
    bench: Bench,
    features: gd.metrics.AbstractFeatures,
    images: np.ndarray,
    other: np.ndarray | None,
    wanted: dict[str, Any],
    output: Path,
) -> list[dict[str, Any]]:
    path = output / "results.json"
    results = read_results(config, path, wanted)
    real: dict[str, Any] | None = None

    def save() -> None:
        found = {"protocol": wanted, "real_images": real, "results": results}
        text = json.dumps(found, indent=1)
        write(path, lambda file: file.write(text.encode()))

    # Before anything is drawn, so that no samples are taken for another protocol's.
    save()
    parts = output / "parts" / digest(json.dumps(wanted).encode())[:16]
    print(f"Comparing with {len(images)} images.", file=sys.stderr)
    reference = gd.metrics.reference(images, features, config.cache)
    real = measure_real(config, features, reference, other)
    save()
    evaluation = Evaluation(config, bench, features, reference, output, parts)
    done = {(r["sampler"], r["budget"], r["seed"]) for r in results}
    # Seed by seed, so that a whole table is complete early.
    cells = [
        cell
        for seed in config.seeds
        for name in config.samplers
        for budget in config.evaluations
        if (cell := Cell(name, budget, seed)) not in done
    ]
    each = -(-config.number // evaluation.size)
    with tqdm(total=each * len(cells), unit=" parts", mininterval=1) as progress:
        for n, cell in enumerate(cells):
            progress.set_description(str(cell), refresh=False)
            results.append(evaluation(cell, progress))
            save()
            shutil.rmtree(parts / str(cell), ignore_errors=True)
            # Compiled programs take hundreds of memory maps, which Linux limits to 65,530.
            if n % 32 == 31:
                jax.clear_caches()
            progress.update((n + 1) * each - progress.n)
    shutil.rmtree(output / "parts", ignore_errors=True)
    draw_grid(results, output)
    print(f"{features.name} ({config.number} samples, against {wanted['against']}):\n")
    print(table(results))
    print(described(config, real))
    if any("accuracy" in r for r in results):
        print("\nShare of samples that the classifier takes for their label:\n")
        print(table(results, "accuracy"))
    print("\n± is half the range over seeds. In brackets: the actual evaluations.")
    missing = [r for r in results if r["outcome"] == "impossible"]
    if missing:
        names = dict.fromkeys(f"{r['sampler']} with {r['budget']}" for r in missing)
        print(f"Not possible: {', '.join(names)}.")
    print(f"All metrics: {path}. Samples: {output / 'grid.png'}.")
    return results


def described(config: Config, real: dict[str, Any] | None) -> str:
    if real is None:
        return (
            "\nNo real images are left to compare with. For a folder, `--data.test` or "
            "`--data.held-out` gives some."
        )
    kind = "training" if config.against == "test" else "held-out"
    text = f"\n{real['number']} real {kind} images: {real['frechet_distance']:.3g}"
    if real["number"] < config.number:
        text += f". (More of them, such as {config.number}, would come closer.)"
    return text


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


def draw_grid(results: list[dict[str, Any]], output: Path) -> None:
    """Sixteen samples for each sampler and number of evaluations, from the same noise."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names, budgets = samplers_in(results), budgets_in(results)
    if not names:
        return
    seed = min(r["seed"] for r in results)
    finite = {(r["sampler"], r["budget"]) for r in results if r["outcome"] == "finite"}
    figure, axes = plt.subplots(
        len(names),
        len(budgets),
        figsize=(max(1.6 + 1.3 * len(budgets), 4), 0.4 + 1.3 * len(names)),
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
            path = output / "first" / f"{Cell(name, budget, seed)}.npz"
            if (name, budget) in finite and path.exists():
                with np.load(path) as file:
                    images = tiled(file["images"][:16])
                axis.imshow(images, cmap="gray", vmin=0, vmax=255)
            else:
                axis.set_frame_on(False)
    figure.suptitle("Evaluations of the network, at most")
    figure.savefig(output / "grid.png", dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    try:
        evaluate(config)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
