from ._batches import Augmentation as Augmentation, Batches as Batches
from ._checkpoints import Checkpoints as Checkpoints
from ._fit import fit as fit, JSONLines as JSONLines
from ._loss import DenoisingLoss as DenoisingLoss, NoisedBatch as NoisedBatch
from ._times import (
    AbstractTimeSampler as AbstractTimeSampler,
    ImportanceTimes as ImportanceTimes,
    StratifiedTimes as StratifiedTimes,
    UniformTimes as UniformTimes,
)
from ._trainer import (
    Metrics as Metrics,
    Trainer as Trainer,
    TrainState as TrainState,
)
from ._weighting import DataWeighting as DataWeighting


def __getattr__(name: str):
    # Until the release. Not an `AttributeError`, whose message `from ... import` drops.
    if name == "adam":
        raise ImportError(
            "`gddim_eqx.training.adam` is gone. It was `optax.chain("
            "optax.clip_by_global_norm(1.0), optax.adam(schedule))`, where `schedule` is "
            "`optax.warmup_constant_schedule(0.0, learning_rate, warmup)`, or with "
            "`num_steps` `optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, "
            "num_steps)`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
