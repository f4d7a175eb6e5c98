import importlib.metadata

from . import (
    checkpoints as checkpoints,
    datasets as datasets,
    metrics as metrics,
    nn as nn,
    solvers as solvers,
    training as training,
)
from ._adapted_grid import (
    adapted_grid as adapted_grid,
    AdaptedGrid as AdaptedGrid,
)
from ._basis import (
    AbstractBasis as AbstractBasis,
    Cosine as Cosine,
    Identity as Identity,
)
from ._check_process import check_process as check_process
from ._grid import time_grid as time_grid
from ._guidance import (
    ClassifierFreeGuidance as ClassifierFreeGuidance,
    ClassifierGuidance as ClassifierGuidance,
    Clip as Clip,
    DataGuidance as DataGuidance,
    DynamicThreshold as DynamicThreshold,
)
from ._inversion import (
    generate as generate,
    Inversion as Inversion,
    invert as invert,
)
from ._likelihood import (
    bits_per_dimension as bits_per_dimension,
    dequantise as dequantise,
    Likelihood as Likelihood,
    log_density as log_density,
    log_likelihood as log_likelihood,
    log_likelihood_bound as log_likelihood_bound,
)
from ._mixture import GaussianMixture as GaussianMixture
from ._operator import BlockLinearOperator as BlockLinearOperator
from ._placement import Placement as Placement
from ._process import (
    AbstractDiagonalProcess as AbstractDiagonalProcess,
    AbstractProcess as AbstractProcess,
    AbstractScalarProcess as AbstractScalarProcess,
    AbstractSchedule as AbstractSchedule,
    BDM as BDM,
    CLD as CLD,
    CosineSquared as CosineSquared,
    Linear as Linear,
    LinearSDE as LinearSDE,
    SubVP as SubVP,
    VE as VE,
    VP as VP,
)
from ._reverse_sde import reverse_sde as reverse_sde
from ._reverse_transition import reverse_transition as reverse_transition
from ._sample import sample as sample, Samples as Samples
from ._state import Phase as Phase
from ._term import ProbabilityFlow as ProbabilityFlow
from .solvers import GDDIM as GDDIM, SSCS as SSCS


__version__ = importlib.metadata.version("gddim_eqx")
