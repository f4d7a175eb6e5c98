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
    adam as adam,
    Metrics as Metrics,
    Trainer as Trainer,
    TrainState as TrainState,
)
from ._weighting import DataWeighting as DataWeighting
