"""Train a diffusion model: on one CPU core, on GPUs, or on many machines.

    python examples/train.py digits
    python examples/train.py digits --steps 500 --output runs/short
    python examples/train.py cifar10-cld --data.directory cifar-10-batches-py

The first argument is a preset; the options that follow override any of its settings. Writes
checkpoints, the training metrics as JSON Lines, pictures of samples, and with every
checkpoint `model.npz`, for `gddim_eqx.checkpoints.load`, to the output directory.

Ctrl-C or SIGTERM saves a checkpoint and stops; a second Ctrl-C stops at once. Run the same
command again to resume, with the same result as an uninterrupted run. To train for longer,
resume with more `--steps`. What is logged, drawn, kept and saved may change too, and the
devices; the data and other settings may not. To fine-tune a model, give `--init` and
another `--output`. For several machines, or several processes, give each process
`--processes.coordinator`, `--processes.number` and `--processes.index`.
"""

import contextlib
import dataclasses
import functools as ft
import hashlib
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import data as data_sets
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from einops import rearrange

import gddim_eqx as gd
from gddim_eqx.training import (
    Augmentation,
    Batches,
    Checkpoints,
    DataWeighting,
    DenoisingLoss,
    fit,
    JSONLines,
    StratifiedTimes,
    Trainer,
    TrainState,
    UniformTimes,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the data are read from."""

    name: Literal[
        "rings", "digits", "mnist", "fashion_mnist", "cifar10", "folder", "packed"
    ]
    directory: Path | None = None
    """The location of its files. Not needed for rings and digits. For `packed`, a file that
    `examples/data.py` wrote, for more images than fit in memory."""
    verify: bool = True
    """Verify the files against their published checksums."""
    size: int | None = None
    """For a folder of images: the size to resize them to. For packed images: their size,
    which is checked."""
    crop: int | None = None
    """For a folder of images: the size of a centre crop before resizing; CELEBA: 140.
    Packed images have been cropped before."""
    channels: Literal[1, 3] | None = None
    """For a folder of images: 1 to read them as greyscale; 3 by default. For packed images:
    the number of their channels, which is checked."""
    held_out: float | None = None
    """For a folder of images: the share that training leaves out, for evaluation; 0.1 by
    default, or 0 with `test`."""
    test: Path | None = None
    """A second folder, or packed file, of images that are held out."""


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """What to train on."""

    flip: bool = False
    """Flip images horizontally, each with probability one half."""
    dequantise: bool = False
    """Dequantise pixel levels with uniform noise. The paper does not."""
    labels: bool = False
    """Train a class-conditional model. The classes of a folder are its sub-folders."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What to train."""

    name: Literal["points", "mlp", "small", "cifar10_cld", "cifar10_bdm", "celeba_cld"]
    bfloat16: bool = False
    """Compute in bfloat16. Parameters stay in single precision."""
    checkpoint: bool = False
    """Use gradient checkpointing: recompute activations within blocks, to save memory."""
    mixed_score: bool = False
    """For CLD: add to the output the noise prediction if the velocity were pure noise."""
    features: int | None = None
    """For U-Nets: the number of channels at full resolution; 32 by default for `small`."""
    patch: int | None = None
    """For U-Nets: the patch size in pixels. Larger patches are faster, but coarser."""
    precondition: bool = False
    """Precondition the network: its output is then the data minus their posterior mean
    given the state, in units of their posterior standard deviation, if they were normal."""


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """Adam, and the EMA of the parameters."""

    learning_rate: float = 2e-4
    warmup: int = 5000
    """The number of warm-up steps of the learning rate."""
    cosine: bool = False
    """Decay the learning rate to 0 at `--steps`, by a cosine schedule. A run that resumes
    with more steps follows the schedule of these. The paper does not decay it."""
    clip: float = 1.0
    """The global norm to which gradients are clipped."""
    ema_decay: float = 0.9999
    debias: bool = False
    """Remove the initial parameters from the EMA."""
    accumulate: int = 1
    """The number of parts for gradient accumulation, to save memory."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """For distributed training with several processes."""

    coordinator: str | None = None
    """Address and port of the first process, such as 10.0.0.1:1234."""
    number: int | None = None
    index: int | None = None
    timeout: int = 100
    """The number of seconds without a heartbeat after which the other processes stop."""


@dataclasses.dataclass(frozen=True)
class Config:
    data: Data
    network: Network
    process: Literal["vp", "sub_vp", "ve", "cld", "bdm"]
    steps: int
    """The total number of training steps."""
    batch_size: int = 128
    """The batch size over all devices together."""
    optimiser: Optimiser = Optimiser()
    predicts: Literal["noise", "data", "score", "v", "flow"] | None = None
    """By default data for a preconditioned network, and otherwise noise."""
    times: Literal["uniform", "stratified"] = "uniform"
    """How to sample times: independently, or one in each of equal intervals."""
    weighting: Literal["prediction", "noise", "likelihood", "data"] | None = None
    """Which error has equal weight at all times. By default that of the noise for a
    preconditioned network, as in the paper, and otherwise that of the prediction. `data` is
    for the prediction of data or noise: that of the data, in units of what can be known."""
    label_dropout: float = 0.1
    """With labels: the probability of training without, for classifier-free guidance."""
    shard_parameters: bool = False
    """Shard parameters over devices too."""
    init: Path | None = None
    """A `model.npz` to start from, in place of random parameters; of the same network,
    process and prediction."""
    seed: int = 0
    processes: Processes = Processes()
    output: Path | None = None
    """By default `runs/` followed by the name of the preset."""
    save_every: int = 1000
    keep: int = 2
    """The number of checkpoints to keep."""
    log_every: int = 100
    samples_every: int = 5000
    """The number of steps between pictures of samples; 0 for none."""


# From the paper's Table 4 and the authors' configurations.
PAPER = Optimiser(2e-4, warmup=5000, ema_decay=0.9999, debias=False)

QUICK = Optimiser(2e-3, warmup=100, cosine=True, ema_decay=0.999, debias=True)

FASHION_MNIST = Config(
    Data("fashion_mnist"),
    Network("small", features=16, patch=2, precondition=True),
    "cld",
    steps=8000,
    batch_size=64,
    optimiser=QUICK,
    times="stratified",
    samples_every=2000,
)

CIFAR10_CLD = Config(
    Data("cifar10", flip=True),
    Network("cifar10_cld"),
    "cld",
    steps=1_000_000,
    optimiser=PAPER,
    save_every=10_000,
)

PRESETS = {
    "toy": (
        "Five rings in the plane under CLD: a minute on a CPU.",
        Config(
            Data("rings"),
            Network("points"),
            "cld",
            steps=10_000,
            batch_size=1024,
            optimiser=Optimiser(2e-3, warmup=500, ema_decay=0.99, debias=True),
            times="stratified",
            samples_every=2000,
        ),
    ),
    "digits": (
        "Scans of digits, 8x8, under CLD: five minutes on two CPU cores.",
        Config(
            Data("digits"),
            Network("mlp", precondition=True),
            "cld",
            steps=10_000,
            batch_size=256,
            optimiser=QUICK,
            times="stratified",
            samples_every=2500,
        ),
    ),
    "fashion-mnist": (
        "Fashion-MNIST, 28x28, under CLD: half an hour on one CPU core.",
        FASHION_MNIST,
    ),
    "fashion-mnist-classes": (
        "Fashion-MNIST by class, for classifier-free guidance: the same.",
        dataclasses.replace(
            FASHION_MNIST, data=dataclasses.replace(FASHION_MNIST.data, labels=True)
        ),
    ),
    "fashion-mnist-gpu": (
        "The same, with sixteen times as many parameters: for a GPU.",
        Config(
            Data("fashion_mnist"),
            Network("small", features=64, bfloat16=True, precondition=True),
            "cld",
            steps=40_000,
            batch_size=128,
            optimiser=dataclasses.replace(QUICK, learning_rate=1e-3, warmup=1000),
            times="stratified",
        ),
    ),
    "cifar10-cld": (
        "CIFAR10 under CLD, with the values of the paper's Table 4.",
        CIFAR10_CLD,
    ),
    "cifar10-bdm": (
        "CIFAR10 under BDM, with the values of the paper's Table 4.",
        dataclasses.replace(CIFAR10_CLD, network=Network("cifar10_bdm"), process="bdm"),
    ),
    "celeba-cld": (
        "CELEBA, 64x64, under CLD, with the values of the paper's Table 4.",
        Config(
            Data("folder", size=64, crop=140, held_out=0, flip=True),
            Network("celeba_cld"),
            "cld",
            steps=150_000,
            optimiser=dataclasses.replace(PAPER, ema_decay=0.999),
            save_every=10_000,
        ),
    ),
}


def check(config: Config) -> None:
    """Refuse invalid settings before any expensive work."""
    optimiser, network, several = config.optimiser, config.network, config.processes
    positive = {
        "--steps": config.steps,
        "--save-every": config.save_every,
        "--log-every": config.log_every,
        "--keep": config.keep,
        "--optimiser.learning-rate": optimiser.learning_rate,
        "--optimiser.clip": optimiser.clip,
    }
    for option, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{option}` must be positive; got {value}.")
    if optimiser.accumulate < 1 or config.batch_size % optimiser.accumulate:
        raise ValueError(
            f"`--batch-size` {config.batch_size} cannot be divided into "
            f"`--optimiser.accumulate` {optimiser.accumulate} equal parts."
        )
    if several.coordinator is None and (several.number, several.index) != (None, None):
        raise ValueError(
            "`--processes.number` and `--processes.index` need `--processes.coordinator`."
        )
    check_warmup(config)
    if not 0 <= config.label_dropout < 1:
        raise ValueError(
            f"`--label-dropout` must be in [0, 1); got {config.label_dropout}."
        )
    if config.weighting == "data" and config.predicts not in ("noise", "data"):
        raise ValueError("`--weighting data` is for `--predicts data` or `noise`.")
    for option, value, predicts in (
        ("precondition", network.precondition, "data"),
        ("mixed-score", network.mixed_score, "noise"),
    ):
        if value and config.predicts != predicts:
            raise ValueError(
                f"`--network.{option}` is for `--predicts {predicts}`: leave out "
                f"`--predicts`, or give `--network.no-{option}`."
            )
    if config.samples_every and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            'Pictures need matplotlib: `pip install "gddim_eqx[examples]"`, or give '
            "`--samples-every 0`."
        )


def completed(config: Config) -> Config:
    """With the defaults that depend on other settings."""
    preconditioned = config.network.precondition
    predicts = config.predicts or ("data" if preconditioned else "noise")
    weighting = config.weighting or ("noise" if preconditioned else "prediction")
    return dataclasses.replace(config, predicts=predicts, weighting=weighting)


def check_warmup(config: Config) -> None:
    steps, warmup = config.steps, config.optimiser.warmup
    if steps > warmup:
        return
    message = f"`--steps` {steps} should be more than `--optimiser.warmup` {warmup}"
    if config.optimiser.cosine:
        raise ValueError(
            f"{message}: no steps would be left for the decay of `--optimiser.cosine`. "
            "Give more steps, or a shorter warm-up."
        )
    print(f"{message}: training ends before the warm-up does.", file=sys.stderr)


OWN = ("folder", "packed")  # Images of one's own.

_CLASSES = {
    "fashion_mnist": (
        "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()
    ),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
}


def check_source(data: Source) -> None:
    own = (data.size, data.crop, data.channels, data.held_out, data.test)
    if data.name not in OWN and own != (None,) * 5:
        raise ValueError(
            "`--data.size`, `--data.crop`, `--data.channels`, `--data.held-out` and "
            f"`--data.test` are for a folder, not for {data.name}."
        )
    if data.name in ("rings", "digits", *OWN) and not data.verify:
        raise ValueError(f"{data.name} is not verified: leave out `--data.no-verify`.")
    if data.name in ("rings", "digits") and data.directory is not None:
        raise ValueError(
            f"{data.name} is not read from files: leave out `--data.directory`."
        )
    if data.directory is None and data.name not in ("rings", "digits", "fashion_mnist"):
        raise ValueError(f"{data.name} is read from files: give `--data.directory`.")
    if not 0 <= (data.held_out or 0) < 1:
        raise ValueError(f"`--data.held-out` must be in [0, 1); got {data.held_out}.")
    if data.held_out and (data.test is not None or data.name == "packed"):
        raise ValueError(
            "`--data.held-out` is for a folder without `--data.test`. For packed images, "
            "pack a second folder: `--data.test`."
        )
    if data.test is not None and data.directory is not None:
        if data.test.resolve().is_relative_to(data.directory.resolve()):
            raise ValueError(
                f"`--data.test` {data.test} must not be in `--data.directory` "
                f"{data.directory}: it would be trained on. Move it beside it."
            )


def has_test(data: Source) -> bool:
    """Whether there are images that training leaves out."""
    if data.name in OWN:
        return data.test is not None or (data.name == "folder" and data.held_out != 0)
    return data.name not in ("rings", "digits")


def load(data: Source, train: bool = True) -> np.ndarray:
    check_source(data)
    if not (train or has_test(data)):
        raise ValueError(f"{data.name} has no test set.")
    if data.name in ("rings", "digits"):
        return getattr(data_sets, data.name)()
    if data.name not in OWN:
        directory = {} if data.directory is None else {"directory": data.directory}
        read = getattr(data_sets, data.name)
        return read(train=train, verify=data.verify, **directory)
    directory = data.directory if train or data.test is None else data.test
    assert directory is not None
    if data.name == "folder":
        images = data_sets.folder(directory, data.size, data.crop, data.channels or 3)
        return part_of(images, data, train)
    images = data_sets.packed(directory)
    if data.size is not None and images.shape[1:3] != (data.size, data.size):
        raise ValueError(
            f"{directory} holds images of {images.shape[1]} x {images.shape[2]}, "
            f"and `--data.size` is {data.size}: pack them with this size."
        )
    if data.channels not in (None, images.shape[3]):
        raise ValueError(
            f"{directory} holds images of {images.shape[3]} channels, and "
            f"`--data.channels` is {data.channels}: pack them with `channels`."
        )
    return images


def part_of(values: np.ndarray, data: Source, train: bool) -> np.ndarray:
    """What belongs to the images of a folder for training, or to those held out: of equally
    many consecutive ones, one each, at random."""
    if data.test is not None or data.held_out == 0:
        return values
    share = 0.1 if data.held_out is None else data.held_out
    number = len(values)
    held_out = min(max(round(share * number), 1), number - 1)
    edges = np.linspace(0, number, held_out + 1).astype(int)
    chosen = np.zeros(number, bool)
    chosen[np.random.default_rng(0).integers(edges[:-1], edges[1:])] = True
    return values[~chosen if train else chosen]


def load_labels(
    data: Source, train: bool = True, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels, and the names of the classes. For a folder, `classes` are those of a
    model, by default its own."""
    if data.name in ("rings", "packed"):
        raise ValueError(f"The data {data.name!r} have no labels.")
    if data.name == "digits":
        return data_sets.digits_labels(), tuple(map(str, range(10)))
    if data.name == "folder":
        assert data.directory is not None
        labels, found = data_sets.folder_labels(data.directory, classes)
        if not train and data.test is not None:
            return data_sets.folder_labels(data.test, found)
        labels = part_of(labels, data, train)
        if train and classes is None and len(np.unique(labels)) < len(found):
            (first, *_) = (name for n, name in enumerate(found) if n not in labels)
            raise ValueError(
                f"All images of the class {first} are held out. Give it more, or "
                "`--data.held-out 0`."
            )
        return labels, found
    directory = {} if data.directory is None else {"directory": data.directory}
    read = getattr(data_sets, f"{data.name}_labels")
    names = _CLASSES.get(data.name, map(str, range(10)))
    return read(train=train, verify=data.verify, **directory), tuple(names)


def make_model(
    config: Config, data: np.ndarray, key, num_classes: int | None = None
) -> gd.nn.NetworkModel:
    shape = data.shape[1:]
    processes = dict(vp=gd.VP, sub_vp=gd.SubVP, ve=gd.VE, cld=gd.CLD, bdm=gd.BDM)
    process = processes[config.process](shape)
    network = config.network
    input_shape = (*shape[:-1], process.num_components * shape[-1])
    options = {
        "dtype": jnp.bfloat16 if network.bfloat16 else None,
        "checkpoint": network.checkpoint or None,
        "features": network.features,
        "patch": network.patch,
        "num_classes": num_classes,
        "out_channels": shape[-1] if network.precondition else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    sizes = {"points": (math.prod(input_shape),), "mlp": (input_shape,)}
    sizes |= {"small": (input_shape,)}
    preset = getattr(gd.nn.presets, network.name)
    make = ft.partial(preset, *sizes.get(network.name, ()), **options)
    try:
        made_for = eqx.filter_eval_shape(make, key=key).shape
    except TypeError as error:
        raise ValueError(f"{network.name} does not have all these options: {error}.")
    if made_for != input_shape:
        raise ValueError(
            f"{network.name} is for inputs of shape {made_for}, but {config.data.name} "
            f"under {config.process} gives {input_shape}."
        )
    std = standard_deviation(data) if network.precondition else None
    return gd.nn.NetworkModel(process, make(key=key), network.mixed_score, std)


def read_init(config: Config, model: gd.nn.NetworkModel) -> gd.nn.NetworkModel:
    """The model to start from.

    **Raises:** `ValueError` unless it has the structure of `model`, which is what was asked
    for.
    """
    assert config.init is not None
    found: Any = gd.checkpoints.load(config.init)
    if isinstance(found, gd.nn.NetworkModel):
        predicts: Any = found.predicts or "noise"
        found = gd.ProbabilityFlow(found.process, found, predicts)
    if not isinstance(getattr(found, "model", None), gd.nn.NetworkModel):
        kind = type(found).__name__
        raise ValueError(f"`--init` {config.init} holds a {kind}, not a model.")
    there, here = found.model, model
    if there.data_std is not None and here.data_std is not None:
        # That of the data it was trained on, which its parameters expect.
        here = gd.nn.NetworkModel(here.process, here.network, data_std=there.data_std)
    arrays = (eqx.filter(x.network, eqx.is_array) for x in (there, here))
    networks = (eqx.tree_pformat(jax.tree.map(jnp.shape, x)).splitlines() for x in arrays)
    for name, old, new in (
        ("process", there.process, here.process),
        ("predicts", found.predicts, config.predicts),
        ("frame", found.frame, "R"),
        ("data_std", there.data_std, here.data_std),
        ("mixed_score", there.mixed_score, here.mixed_score),
        *(("network", *lines) for lines in itertools.zip_longest(*networks)),
    ):
        if old != new:
            old, new = (" ".join(repr(x).split()) for x in (old, new))
            raise ValueError(
                f"`--init` {config.init} is another model ({name}: {old:.200} there, "
                f"{new:.200} here). Give the options it was trained with."
            )
    return found.model


def standard_deviation(data: np.ndarray) -> float:
    """The standard deviation of the data as the model sees them."""
    # In parts, as the data may be larger than memory.
    sums = np.zeros(2)
    for part in np.array_split(data, max(1, len(data) // 1000)):
        part = np.asarray(part, np.float64)
        sums += part.sum(), (part**2).sum()
    mean, square = sums / data.size
    std = max(square - mean**2, 0.0) ** 0.5
    return std / (127.5 if data.dtype == np.uint8 else 1)


def draw(path: Path, flow: gd.ProbabilityFlow, classes: Sequence[str] = ()) -> None:
    """Draw a picture of samples, with 20 evaluations of the model; of at most 16 classes, a
    row of each."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = np.unique(np.linspace(0, len(classes) - 1, 16).astype(int)) if classes else []
    rows = len(shown) or 8
    args = np.repeat(shown, 8).astype(np.int32) if classes else None
    try:
        x = gd.sample(flow, jr.key(0), 8 * rows, num_steps=20, args=args).x
    except FloatingPointError as error:
        # Early in training, samples may diverge.
        print(f"No {path.name}: {error}")
        return
    x = np.asarray(x)
    figure, axis = plt.subplots(figsize=(4, rows / 2), layout="constrained")
    if x.ndim == 2:
        axis.scatter(*x.T, s=2)
        axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    else:
        axis.imshow(tiled(gd.to_uint8(x), rows), cmap="gray", vmin=0, vmax=255)
        axis.spines[:].set_visible(False)
        height = x.shape[1] + 1
        axis.set_yticks(
            (np.arange(len(shown)) + 0.5) * height - 1,
            [classes[int(n)] for n in shown],
            parse_math=False,
        )
        axis.set_xticks([])
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tiled(images: np.ndarray, rows: int | None = None) -> np.ndarray:
    """Tile images in rows, by default as many as columns; unused places stay black."""
    rows = rows or math.isqrt(len(images) - 1) + 1
    images = np.pad(images, [(0, -len(images) % rows), (0, 1), (0, 1), (0, 0)])
    grid = rearrange(images, "(a b) h w c -> (a h) (b w) c", a=rows)
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def train(config: Config) -> TrainState:
    placement = gd.Placement(shard_parameters=config.shard_parameters)
    placement.check_batch(config.batch_size)
    x = load(config.data)
    labels, classes = load_labels(config.data) if config.data.labels else (None, ())
    num_classes = len(classes) or None
    data = x if labels is None else (x, labels)
    batches = Batches(data, config.batch_size, config.seed, placement)
    model_key, train_key = jr.split(jr.key(config.seed))
    model = make_model(config, x, model_key, num_classes)
    if config.init is not None:
        model = read_init(config, model)
    process, first = model.process, jax.process_index() == 0
    if first:
        if config.data.name == "folder" and has_test(config.data):
            print(f"Training on {len(x)} images; the others are held out, for evaluation.")
    weighting: Any = config.weighting
    if weighting == "data":
        weighting = DataWeighting(process, standard_deviation(x))
    times = {"uniform": UniformTimes, "stratified": StratifiedTimes}[config.times]
    predicts: Any = config.predicts  # It is completed.
    loss = DenoisingLoss(
        process,
        predicts,
        times=times(1e-5),  # As in the authors' code.
        weighting=weighting,
        dropout=isinstance(model.network, gd.nn.NCSNpp) and model.network.dropout > 0,
        condition_dropout=0.0 if labels is None else config.label_dropout,
        no_condition=num_classes,
    )
    optimiser = config.optimiser
    rate, warmup = optimiser.learning_rate, optimiser.warmup
    schedule = optax.warmup_constant_schedule(0.0, rate, warmup)
    if optimiser.cosine:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
    trainer = Trainer(
        loss,
        optax.chain(optax.clip_by_global_norm(optimiser.clip), optax.adam(schedule)),
        ema_decay=optimiser.ema_decay,
        debias=optimiser.debias,
        accumulate=optimiser.accumulate,
        prepare=Augmentation(config.data.flip, config.data.dequantise),
        placement=placement,
    )
    output = config.output
    assert output is not None
    # Without the settings that may change when a run resumes.
    names = ("data", "network", "process", "batch_size", "optimiser", "predicts", "times")
    names = (*names, "weighting", "label_dropout", "seed")
    kept = {name: to_json(getattr(config, name)) for name in names}
    # What is read shows in the fingerprint.
    for name in ("directory", "verify", "channels", "held_out", "test"):
        del kept["data"][name]
    kept["data"] |= batches.fingerprint()
    kept["classes"] = list(classes)
    kept["init"] = config.init and hashlib.sha256(config.init.read_bytes()).hexdigest()
    metadata = {"classes": classes, "trained_on": Batches(x, 1).fingerprint()}
    metadata["steps"] = config.steps
    path = output / "model.npz"
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(output / "checkpoints", kept, config.keep)
        )
        done = max(checkpoints.steps, default=0)
        if first and done:
            print(f"Resuming from step {done} in {output}.")
            before = gd.checkpoints.metadata(path).get("steps") if path.exists() else None
            if optimiser.cosine and before not in (None, config.steps):
                print(f"The cosine schedule is now of {config.steps} steps, not {before}.")
        logs: list[Any] = []
        if first:
            logs.append(stack.enter_context(JSONLines(output / "metrics.jsonl", done)))

        def flow(state):
            model = placement.gather(state.averaged)
            return gd.ProbabilityFlow(process, model, predicts)

        def write(state):
            written = flow(state)
            if first:
                about = metadata | {"step": int(state.step)}
                gd.checkpoints.save(path, written, about)

        def samples(state):
            drawn = flow(state)
            if first:
                draw(output / "samples" / f"{int(state.step):07d}.png", drawn, classes)

        every = config.samples_every
        state = fit(
            trainer,
            # No other reference is kept, so its memory is freed after the first step.
            trainer.init(model, train_key),
            batches,
            config.steps,
            checkpoints=checkpoints,
            save_every=config.save_every,
            logs=logs,
            log_every=config.log_every,
            callbacks=[(config.save_every, write), *([(every, samples)] if every else [])],
        )
        write(state)
    done = int(state.step)
    if first and done < config.steps:
        print(f"Stopped at step {done}. Run the same command again to resume.")
    if first and done > config.steps:
        print(f"The run has {done} steps already, more than `--steps` {config.steps}.")
    if first:
        print(f"The model: {path}")
    return state


def is_finished(output: Path) -> bool:
    """Whether a run has written its last model."""
    path = output / "model.npz"
    about = gd.checkpoints.metadata(path) if path.exists() else {"steps": 1}
    return about.get("step", 0) >= about.get("steps", 0)


def to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: to_json(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.extras.overridable_config_cli(
        PRESETS, description=__doc__, args=arguments
    )
    if config.output is None:
        config = dataclasses.replace(config, output=Path("runs") / arguments[0])
    config, several = completed(config), config.processes
    try:
        check(config)
        if several.coordinator is not None:
            jax.distributed.initialize(
                several.coordinator,
                several.number,
                several.index,
                heartbeat_timeout_seconds=several.timeout,
            )
        train(config)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Run the same command again to resume from the last checkpoint "
            f"in {config.output}, if there is one.",
            file=sys.stderr,
        )
        # The conventional exit status after SIGINT.
        sys.exit(130)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        sys.exit(
            f"{error}\nProbably another process died. Restart all processes to resume from "
            "the last checkpoint."
        )


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
