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
import importlib.util
import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from common import digest, draw_table, keep_programs, read_flow, tiled, to_json
from data import has_test, load, load_labels, Source, standard_deviation

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
class Data(Source):
    """What to train on."""

    flip: bool = False  # Flip images horizontally, each with probability one half.
    labels: bool = False
    """Train a class-conditional model. The classes of a folder are its sub-folders."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What to train."""

    name: Literal["points", "mlp", "small", "cifar10_cld", "cifar10_bdm", "celeba_cld"]
    bfloat16: bool = False  # Compute in bfloat16. Parameters stay in single precision.
    checkpoint: bool = False
    """Use gradient checkpointing: recompute activations within blocks, to save memory."""
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
    warmup: int = 5000  # The number of warm-up steps of the learning rate.
    cosine: bool = False
    """Decay the learning rate to 0 at `--steps`, by a cosine schedule. A run that resumes
    with more steps follows the schedule of these. The paper does not decay it."""
    ema_decay: float = 0.9999
    debias: bool = False  # Remove the initial parameters from the EMA.
    accumulate: int = 1  # The number of parts for gradient accumulation, to save memory.


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
    steps: int  # The total number of training steps.
    batch_size: int = 128  # The batch size over all devices together.
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
    shard_parameters: bool = False  # Shard parameters over devices too.
    init: Path | None = None
    """A `model.npz` to start from, in place of random parameters; of the same network,
    process and prediction."""
    seed: int = 0
    processes: Processes = Processes()
    output: Path | None = None  # By default `runs/` followed by the name of the preset.
    save_every: int = 1000
    keep: int = 2  # The number of checkpoints to keep.
    log_every: int = 100
    samples_every: int = 5000
    """The number of steps between pictures of samples; 0 for none."""


# From the paper's Table 4 and the authors' configurations.
PAPER = Optimiser(2e-4, warmup=5000, ema_decay=0.9999, debias=False)

QUICK = Optimiser(2e-3, warmup=100, cosine=True, ema_decay=0.999, debias=True)

TOY = Config(
    Data("rings"),
    Network("points"),
    "cld",
    steps=10_000,
    batch_size=1024,
    optimiser=Optimiser(2e-3, warmup=500, ema_decay=0.99, debias=True),
    times="stratified",
    samples_every=2000,
)

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
    "toy": ("Five rings in the plane under CLD: a minute on a CPU.", TOY),
    "digits": (
        "Scans of digits, 8x8, under CLD: five minutes on two CPU cores.",
        replace(
            TOY,
            data=Data("digits"),
            network=Network("mlp", precondition=True),
            batch_size=256,
            optimiser=QUICK,
            samples_every=2500,
        ),
    ),
    "fashion-mnist": (
        "Fashion-MNIST, 28x28, under CLD: half an hour on one CPU core.",
        FASHION_MNIST,
    ),
    "fashion-mnist-classes": (
        "Fashion-MNIST by class, for classifier-free guidance: the same.",
        replace(FASHION_MNIST, data=replace(FASHION_MNIST.data, labels=True)),
    ),
    "fashion-mnist-gpu": (
        "The same, with sixteen times as many parameters: for a GPU.",
        replace(
            FASHION_MNIST,
            network=Network("small", features=64, bfloat16=True, precondition=True),
            steps=40_000,
            batch_size=128,
            optimiser=replace(QUICK, learning_rate=1e-3, warmup=1000),
            samples_every=5000,
        ),
    ),
    "cifar10-cld": (
        "CIFAR10 under CLD, with the values of the paper's Table 4.",
        CIFAR10_CLD,
    ),
    "cifar10-bdm": (
        "CIFAR10 under BDM, with the values of the paper's Table 4.",
        replace(CIFAR10_CLD, network=Network("cifar10_bdm"), process="bdm"),
    ),
    "celeba-cld": (
        "CELEBA, 64x64, under CLD, with the values of the paper's Table 4.",
        replace(
            CIFAR10_CLD,
            data=Data("folder", size=64, crop=140, held_out=0, flip=True),
            network=Network("celeba_cld"),
            steps=150_000,
            optimiser=replace(PAPER, ema_decay=0.999),
        ),
    ),
}


def completed(config: Config) -> Config:
    """With the defaults that depend on other settings.

    **Raises:** `ValueError` for invalid settings, before any expensive work.
    """
    optimiser, several = config.optimiser, config.processes
    for option in ("steps", "save_every", "log_every", "keep", "optimiser.learning_rate"):
        value = operator.attrgetter(option)(config)
        if not 0 < value < math.inf:
            name = option.replace("_", "-")
            raise ValueError(f"`--{name}` must be positive; got {value}.")
    if optimiser.accumulate < 1 or config.batch_size % optimiser.accumulate:
        raise ValueError(
            f"`--batch-size` {config.batch_size} cannot be divided into "
            f"`--optimiser.accumulate` {optimiser.accumulate} equal parts."
        )
    if several.coordinator is None and (several.number, several.index) != (None, None):
        raise ValueError(
            "`--processes.number` and `--processes.index` need `--processes.coordinator`."
        )
    if config.steps <= optimiser.warmup:
        text = f"`--steps` {config.steps} should be more than `--optimiser.warmup` "
        text += f"{optimiser.warmup}: training ends before the warm-up does"
        if optimiser.cosine:
            raise ValueError(f"{text}, without the decay of `--optimiser.cosine`.")
        print(f"{text}.", file=sys.stderr)
    if not 0 <= config.label_dropout < 1:
        raise ValueError(
            f"`--label-dropout` must be in [0, 1); got {config.label_dropout}."
        )
    preconditioned = config.network.precondition
    predicts = config.predicts or ("data" if preconditioned else "noise")
    weighting = config.weighting or ("noise" if preconditioned else "prediction")
    if weighting == "data" and predicts not in ("noise", "data"):
        raise ValueError("`--weighting data` is for `--predicts data` or `noise`.")
    if preconditioned and predicts != "data":
        raise ValueError(
            "`--network.precondition` is for `--predicts data`: leave out `--predicts`, or "
            "give `--network.no-precondition`."
        )
    if config.samples_every and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            'Pictures need matplotlib: `pip install "gddim_eqx[examples]"`, or give '
            "`--samples-every 0`."
        )
    return replace(config, predicts=predicts, weighting=weighting)


def make_model(
    config: Config, data: np.ndarray, key, num_classes: int | None = None
) -> gd.nn.NetworkModel:
    shape = data.shape[1:]
    processes = dict(vp=gd.VP, sub_vp=gd.SubVP, ve=gd.VE, cld=gd.CLD, bdm=gd.BDM)
    process = processes[config.process](shape)
    network = config.network
    input_shape = (*shape[:-1], process.num_components * shape[-1])
    options = {
        "shape": input_shape if network.name in ("mlp", "small") else None,
        "size": math.prod(input_shape) if network.name == "points" else None,
        "dtype": jnp.bfloat16 if network.bfloat16 else None,
        "checkpoint": network.checkpoint or None,
        "features": network.features,
        "patch": network.patch,
        "num_classes": num_classes,
        "out_channels": shape[-1] if network.precondition else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    make = ft.partial(getattr(gd.nn.presets, network.name), **options)
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
    return gd.nn.NetworkModel(process, make(key=key), data_std=std)


def read_init(config: Config, model: gd.nn.NetworkModel) -> gd.nn.NetworkModel:
    """The model to start from.

    **Raises:** `ValueError` unless it has the structure of `model`, which is what was asked
    for.
    """
    assert config.init is not None
    flow = read_flow(config.init)
    there: Any = flow.model
    # The standard deviation is that of the data it was trained on.
    std, *both = (getattr(x, "data_std", None) for x in (model, there, model))
    arrays = (eqx.filter(getattr(x, "network", x), eqx.is_array) for x in (there, model))
    networks = (eqx.tree_pformat(jax.tree.map(jnp.shape, x)).splitlines() for x in arrays)
    for name, old, new in (
        ("process", flow.process, model.process),
        ("predicts", flow.predicts, config.predicts),
        ("frame", flow.frame, "R"),
        ("data_std", *(both if None in both else (std, std))),
        *(("network", *lines) for lines in itertools.zip_longest(*networks)),
    ):
        if old != new:
            old, new = (" ".join(repr(x).split()) for x in (old, new))
            raise ValueError(
                f"`--init` {config.init} is another model ({name}: {old:.200} there, "
                f"{new:.200} here). Give the options it was trained with."
            )
    return there


def draw(path: Path, flow: gd.ProbabilityFlow, classes: Sequence[str] = ()) -> None:
    """Draw a picture of samples, with 20 evaluations of the model; of at most 16 classes, a
    row of each."""
    shown = np.unique(np.linspace(0, len(classes) - 1, 16).astype(int)) if classes else []
    rows = len(shown) or 8
    args = np.repeat(shown, 8).astype(np.int32) if classes else None
    try:
        x = np.asarray(gd.sample(flow, jr.key(0), 8 * rows, num_steps=20, args=args).x)
    except FloatingPointError as error:
        # Early in training, samples may diverge.
        print(f"No {path.name}: {error}")
        return
    if x.ndim == 2:
        # Points in the plane, from -3 to 3.
        pixels = np.zeros((200, 200, 1), np.uint8)
        column, row = ((x * (1, -1) + 3) / 6 * 200).clip(0, 199).astype(int).T
        pixels[row, column] = 255
    else:
        pixels = tiled(gd.to_uint8(x), rows)
    draw_table(path, pixels, [classes[int(n)] for n in shown], size=(4, rows / 2))


def make_trainer(
    config: Config, model: gd.nn.NetworkModel, data: np.ndarray, placement: gd.Placement
) -> Trainer:
    process, network = model.process, model.network
    num_classes = getattr(network, "num_classes", None)
    weighting: Any = config.weighting
    if weighting == "data":
        weighting = DataWeighting(process, standard_deviation(data))
    times = {"uniform": UniformTimes, "stratified": StratifiedTimes}[config.times]
    predicts: Any = config.predicts
    loss = DenoisingLoss(
        process,
        predicts,
        times=times(1e-5),  # As in the authors' code.
        weighting=weighting,
        dropout=isinstance(network, gd.nn.NCSNpp) and network.dropout > 0,
        condition_dropout=0.0 if num_classes is None else config.label_dropout,
        no_condition=num_classes,
    )
    optimiser = config.optimiser
    rate, warmup = optimiser.learning_rate, optimiser.warmup
    schedule = optax.warmup_constant_schedule(0.0, rate, warmup)
    if optimiser.cosine:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
    return Trainer(
        loss,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        ema_decay=optimiser.ema_decay,
        debias=optimiser.debias,
        accumulate=optimiser.accumulate,
        prepare=Augmentation(config.data.flip),
        placement=placement,
    )


def defines_run(config: Config, batches: Batches, classes: Sequence[str]) -> dict[str, Any]:
    """The settings, without those that may change when a run resumes."""
    names = ("data", "network", "process", "batch_size", "optimiser", "predicts", "times")
    names = (*names, "weighting", "label_dropout", "seed")
    kept = {name: to_json(getattr(config, name)) for name in names}
    # What is read shows in the fingerprint.
    for name in ("directory", "verify", "channels", "held_out", "test"):
        del kept["data"][name]
    kept["data"] |= batches.fingerprint()
    init = config.init and digest(config.init.read_bytes())
    return kept | {"classes": list(classes), "init": init}


def train(config: Config) -> TrainState:
    assert config.output is not None
    placement = gd.Placement(shard_parameters=config.shard_parameters)
    placement.check_batch(config.batch_size)
    x = load(config.data)
    labels, classes = load_labels(config.data) if config.data.labels else (None, ())
    data = x if labels is None else (x, labels)
    batches = Batches(data, config.batch_size, config.seed, placement)
    model_key, train_key = jr.split(jr.key(config.seed))
    model = make_model(config, x, model_key, len(classes) or None)
    model = model if config.init is None else read_init(config, model)
    # The other processes of several print and write nothing.
    first = jax.process_index() == 0
    say = print if first else lambda text: None
    if config.data.name == "folder" and has_test(config.data):
        say(f"Training on {len(x)} images; the others are held out, for evaluation.")
    trainer = make_trainer(config, model, x, placement)
    path = config.output / "model.npz"
    about = {"classes": classes, "trained_on": Batches(x, 1).fingerprint()}
    about["steps"] = config.steps

    def on_first(function: Callable[[gd.ProbabilityFlow, int], Any]) -> Callable:
        """A callback for all processes, of which the first calls the function."""

        def callback(state: TrainState) -> None:
            model = placement.gather(state.averaged)
            if first:
                flow = gd.ProbabilityFlow(model.process, model, trainer.loss.predicts)
                function(flow, int(state.step))

        return callback

    write = on_first(
        lambda flow, step: gd.checkpoints.save(path, flow, about | {"step": step})
    )
    samples = path.parent / "samples"
    picture = on_first(lambda flow, step: draw(samples / f"{step:07d}.png", flow, classes))
    with contextlib.ExitStack() as stack:
        kept = defines_run(config, batches, classes)
        checkpoints = Checkpoints(path.parent / "checkpoints", kept, config.keep)
        stack.enter_context(checkpoints)
        done = max(checkpoints.steps, default=0)
        if done:
            say(f"Resuming from step {done} in {path.parent}.")
            before = gd.checkpoints.metadata(path).get("steps") if path.exists() else None
            if config.optimiser.cosine and before not in (None, config.steps):
                say(f"The cosine schedule is now of {config.steps} steps, not {before}.")
        metrics = path.parent / "metrics.jsonl"
        logs = [stack.enter_context(JSONLines(metrics, done))] if first else []
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
            callbacks=[(config.save_every, write), *([(every, picture)] if every else [])],
        )
        write(state)
    done = int(state.step)
    if done < config.steps:
        say(f"Stopped at step {done}. Run the same command again to resume.")
    if done > config.steps:
        say(f"The run has {done} steps already, more than `--steps` {config.steps}.")
    say(f"The model: {path}")
    return state


def is_finished(output: Path) -> bool:
    """Whether a run has written its last model."""
    path = output / "model.npz"
    about = gd.checkpoints.metadata(path) if path.exists() else {"steps": 1}
    return about.get("step", 0) >= about.get("steps", 0)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.extras.overridable_config_cli(
        PRESETS, description=__doc__, args=arguments
    )
    output, several = config.output or Path("runs", arguments[0]), config.processes
    try:
        config = completed(replace(config, output=output))
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
            "\nInterrupted. Run the same command again to resume from the last checkpoint "
            f"in {output}, if there is one.",
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
    keep_programs()
    main()
