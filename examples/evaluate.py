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
import inspect
import itertools
import json
import operator
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import digest, keep_programs, named, read_authors, read_flow, to_json
from data import has_test, load, load_labels, OWN, Source
from results import draw_grid, report, Sampler, SAMPLERS
from tqdm import tqdm

import gddim_eqx as gd
from gddim_eqx._misc import write_whole


_NAMES = ", ".join(f"`{name}` ({sampler.name})" for name, sampler in SAMPLERS.items())


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]
    """A file written by `gddim_eqx.checkpoints.save`; or, with `--authors`, by the
    authors' code."""
    data: Source  # What to compare with.
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
    weights: Path | None = None  # The file of Inception weights.
    samplers: Annotated[tuple[str, ...], tyro.conf.arg(help=f"Any of {_NAMES}.")] = (
        *("gddim", "gddim-paper", "heun", "tsit5", "ancestral"),
    )
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
    seeds: tuple[int, ...] = (0,)  # Random seeds: everything is measured once with each.
    number: int = 10_000
    """The number of samples for each sampler, number of evaluations and seed."""
    batch_size: int = 512
    """The number of samples per batch. Rounded up to a multiple of the device count."""
    output: Path | None = None  # By default `evaluation` beside the model.
    cache: Path = Path.home() / ".cache" / "gddim_eqx"
    """Where to cache the features of the data."""
    keep_images: bool = False
    """Save all samples that are drawn, as `images-*.npz`, for other tools."""


def checked(config: Config) -> Config:
    """With the defaults that depend on other settings.

    **Raises:** `ValueError` for invalid settings.
    """
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
    held_out = config.data.name in OWN and has_test(config.data)
    against = config.against or ("test" if held_out else "train")
    return dataclasses.replace(config, against=against, features=features_of(config))


def features_of(config: Config) -> Any:
    if config.features is not None or config.weights is not None:
        return config.features or "inception"
    return "classifier" if config.data.name == "fashion_mnist" else "pixels"


def read_features(config: Config, shape: tuple[int, ...]) -> gd.metrics.AbstractFeatures:
    print(f"Features: {config.features}.", file=sys.stderr)
    if config.features == "pixels":
        return gd.metrics.Pixels()
    if config.features == "classifier":
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


def read_model(config: Config, shape: tuple[int, ...]) -> gd.ProbabilityFlow:
    if config.authors is None:
        flow = read_flow(config.model, config.like)
    else:
        process = config.process or "cld"
        flow = read_authors(config.model, config.authors, process, shape)
    if flow.process.shape != shape:
        raise ValueError(
            f"{config.model} is for data of shape {flow.process.shape}; those of "
            f"{config.data.name} have {shape}."
        )
    return flow


def metadata_of(config: Config) -> dict[str, Any]:
    """What `train.py` recorded with the model."""
    return {} if config.authors is not None else gd.checkpoints.metadata(config.model)


def check_held_out(config: Config, other: np.ndarray | None) -> None:
    """Warn unless the model was trained on the other images, and not on those that samples
    are compared with."""
    if config.against != "test" or config.data.name not in OWN:
        return
    message = "The model was not trained on the other images of these data"
    recorded = metadata_of(config).get("trained_on")
    if recorded is None:
        message = "It is not recorded what the model was trained on"
    if recorded is None or recorded != gd.training.Batches(other, 1).fingerprint():
        print(f"{message}: it may have been on those held out.", file=sys.stderr)


def labels_of(config: Config, flow: gd.ProbabilityFlow) -> np.ndarray | None:
    """The labels of the samples of a class-conditional model, as frequent as in the
    data."""
    network = getattr(flow.model, "network", None)
    if (num_classes := getattr(network, "num_classes", None)) is None:
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


class Bench:
    """Draws samples from a model, in batches of one size."""

    def __init__(self, config: Config, flow: gd.ProbabilityFlow):
        devices = jax.devices()
        self.placement = gd.Placement(devices) if len(devices) > 1 else None
        # Those of all samples, for a class-conditional model.
        self.labels = labels_of(config, flow)
        if config.guidance != 1:
            if self.labels is None:
                raise ValueError(
                    f"`--guidance` needs a class-conditional model: {config.model}."
                )
            flow = gd.classifier_free_guidance(flow, scale=config.guidance)
        self.flow = flow if self.placement is None else self.placement.put(flow)
        self.denoise: Any = config.denoise
        size = min(config.batch_size, config.number)
        self.batch_size = -(-size // len(devices)) * len(devices)

    def steps(self, sampler: Sampler, budget: int) -> int:
        """The number of steps; 0 if the sampler does not apply."""
        return sampler.steps(self.flow.process, budget - (self.denoise is not None))

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


class Cell(NamedTuple):
    """What one result is of."""

    sampler: str
    budget: int
    seed: int

    def __str__(self):
        return f"{self.sampler}-{self.budget}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    config: Config
    bench: Bench
    features: gd.metrics.AbstractFeatures
    images: np.ndarray
    output: Path

    @functools.cached_property
    def reference(self) -> gd.metrics.Reference:
        return gd.metrics.reference(self.images, self.features, self.config.cache)

    @property
    def size(self) -> int:
        """The number of samples in each part but the last."""
        return -(-_per_part // self.bench.batch_size) * self.bench.batch_size

    def sampler(self, name: str) -> Sampler:
        sampler = SAMPLERS[name]
        return dataclasses.replace(sampler, grid=self.config.grid or sampler.grid)

    def draw(self, cell: Cell, parts: Path) -> Iterator[Any]:
        """Draw samples and compute their features, part by part; parts that are in the
        directory are not drawn again."""
        sampler, key = self.sampler(cell.sampler), jr.key(cell.seed)
        for first in range(0, self.config.number, self.size):
            path = parts / str(cell) / f"{first:08d}.npz"
            if not path.exists():
                number = min(self.size, self.config.number - first)
                x, evaluations = self.bench.draw(sampler, cell.budget, key, first, number)
                images = gd.to_uint8(x)
                vectors = self.features(images)
                write_arrays(path, images, vectors=vectors, evaluations=evaluations)
            with np.load(path) as file:
                yield file["images"], file["vectors"], file["evaluations"]

    def result(self, cell: Cell, parts: Path, progress: tqdm) -> dict[str, Any]:
        sampler, drawn = self.sampler(cell.sampler), []
        result: dict[str, Any] = {**cell._asdict(), "solver": sampler.described}
        try:
            if not self.bench.steps(sampler, cell.budget):
                return result | {"outcome": "impossible"}
            for part in self.draw(cell, parts):
                drawn.append(part)
                progress.update()
        except (FloatingPointError, RuntimeError) as error:
            return result | {"outcome": "diverged", "message": str(error)}
        images, vectors = (np.concatenate([part[i] for part in drawn]) for i in (0, 1))
        if self.config.keep_images:
            write_arrays(self.output / f"images-{cell}.npz", images)
        write_arrays(self.output / "first" / f"{cell}.npz", images[:16])
        moments = map(gd.metrics.Moments.of, (part[1] for part in drawn))
        result |= {
            "outcome": "finite",
            "evaluations": float(np.mean([part[2] for part in drawn])),
            **measure(vectors, functools.reduce(operator.add, moments), self.reference),
        }
        labels, features = self.bench.labels, self.features
        if labels is not None and isinstance(features, gd.metrics.Classifier):
            # The share of samples that the classifier takes for their label.
            found = jax.vmap(features.classifier.last)(jnp.asarray(vectors)).argmax(1)
            result["accuracy"] = float((np.asarray(found) == labels).mean())
        return result

    def protocol(self) -> dict[str, Any]:
        """Everything that the numbers depend on, besides sampler, budget and seed."""
        config, process = self.config, self.bench.flow.process
        like, authors = config.like, config.authors
        if authors is not None and Path(authors).is_file():
            authors = digest(Path(authors).read_bytes())
        if like is not None:
            file = inspect.getsourcefile(named(like))
            like += f" {file and digest(Path(file).read_bytes())}"
        dtype = jax.tree.leaves(process.prior(jr.key(0), (1,)))[0].dtype
        used = min(config.number, len(self.images), 10_000)
        return {
            "frechet_distance": self.features.name,
            "features": self.features.key,
            "model": digest(config.model.read_bytes()),
            "authors": authors,
            "like": like,
            "data": {k: to_json(config.data)[k] for k in ("name", "size", "crop")},
            "against": f"{config.against}, {len(self.images)} images",
            "images": digest(np.ascontiguousarray(self.images).data),
            "number_of_samples": config.number,
            "batch_size": self.bench.batch_size,
            "denoise": config.denoise,
            "guidance": None if config.guidance == 1 else config.guidance,
            "grid": config.grid or "that of each sampler",
            "last_time": process.t_min,
            "pixels": "rounded to uint8, not resized",
            "kernel_distance": f"{_subsets} subsets of {min(1000, used)}",
            "sliced_wasserstein": f"256 directions, {used} images",
            "precision_and_recall": f"3 neighbours, {used} images",
            "computed": f"{dtype} on {jax.default_backend()}, jax {jax.__version__}, "
            f"gddim_eqx {gd.__version__}",
        }

    def results_of(self, path: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
        """The results of an earlier run."""
        if not path.exists():
            return []
        found = json.loads(path.read_text())
        before, results = found["protocol"], found["results"]
        # A run that failed before it drew anything leaves no samples of another protocol.
        if not results and not any((path.parent / "parts").glob("*/*/*.npz")):
            return []
        for r in results:
            name = r["sampler"]
            known = name in SAMPLERS and self.sampler(name).described
            before, protocol = before | {name: r["solver"]}, protocol | {name: known}
        for key in {**protocol, **before}:
            if before.get(key) != protocol.get(key):
                raise ValueError(
                    f"{path} was measured with another {key}: {before.get(key)!r} instead "
                    f"of {protocol.get(key)!r}. Give another `--output`."
                )
        return results

    def run(self, other: np.ndarray | None) -> dict[str, Any]:
        """All results, with those for `other` real images."""
        path, protocol = self.output / "results.json", self.protocol()
        results = self.results_of(path, protocol)
        found = {"protocol": protocol, "real_images": None, "results": results}

        def save() -> None:
            self.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=1)
            write_whole(path, lambda file: file.write(text.encode()))

        # Before anything is drawn, so that no samples are taken for another protocol's.
        save()
        parts = self.output / "parts" / digest(json.dumps(protocol).encode())[:16]
        print(f"Comparing with {len(self.images)} images.", file=sys.stderr)
        reference, config = self.reference, self.config
        if other is not None and len(other) >= 4:
            vectors = gd.metrics.reference(other, self.features, config.cache).vectors
            vectors = vectors[: config.number]
            measured = measure(vectors, gd.metrics.Moments.of(vectors), reference)
            found["real_images"] = {"number": len(vectors), **measured}
        save()
        done = {(r["sampler"], r["budget"], r["seed"]) for r in results}
        # Seed by seed, so that a whole table is complete early.
        all_cells = itertools.product(config.seeds, config.samplers, config.evaluations)
        cells = [Cell(name, budget, seed) for seed, name, budget in all_cells]
        cells = [cell for cell in cells if cell not in done]
        each = -(-config.number // self.size)
        with tqdm(total=each * len(cells), unit=" parts", mininterval=1) as progress:
            for n, cell in enumerate(cells):
                progress.set_description(str(cell), refresh=False)
                results.append(self.result(cell, parts, progress))
                save()
                shutil.rmtree(parts / str(cell), ignore_errors=True)
                if n % 32 == 31:
                    # Programs take hundreds of memory maps, which Linux limits to 65,530.
                    jax.clear_caches()
                progress.update((n + 1) * each - progress.n)
        shutil.rmtree(parts.parent, ignore_errors=True)
        return found


def write_arrays(path: Path, images: np.ndarray, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.savez(file, images=images, **arrays))


def evaluate(config: Config) -> None:
    config = checked(config)
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
    output = config.output or config.model.parent / "evaluation"
    found = Evaluation(config, Bench(config, flow), features, images, output).run(other)
    draw_grid(found["results"], output)
    report(config.number, **found)
    print(f"All metrics: {output / 'results.json'}. Samples: {output / 'grid.png'}.")


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


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    try:
        evaluate(config)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    keep_programs()
    main()
