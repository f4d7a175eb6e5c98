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
    StepInfo as StepInfo,
    Trainer as Trainer,
    TrainState as TrainState,
)
from ._weighting import DataWeighting as DataWeighting


# Until the release.
_former = {
    "adam": "Use `optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))`; "
    "`schedule` is `optax.warmup_constant_schedule(0.0, learning_rate, warmup)`, or with "
    "`num_steps` `optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, "
    "num_steps)`.",
    "Metrics": "It was renamed: use `StepInfo`.",
}


def __getattr__(name: str):
    if name in _former:
        # Not an `AttributeError`, whose message `from ... import` drops.
        raise ImportError(f"`gddim_eqx.training` has no {name!r}. {_former[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
