import importlib.metadata

from . import (
    checkpoints as checkpoints,
    datasets as datasets,
    metrics as metrics,
    nn as nn,
    results as results,
    solvers as solvers,
    training as training,
)
from ._exponential import reverse_transition as reverse_transition
from ._linear import (
    AbstractBasis as AbstractBasis,
    BlockLinearOperator as BlockLinearOperator,
    CosineBasis as CosineBasis,
    FourierBasis as FourierBasis,
    IdentityBasis as IdentityBasis,
    Phase as Phase,
)
from ._model import (
    classifier_free_guidance as classifier_free_guidance,
    classifier_guidance as classifier_guidance,
    Clip as Clip,
    data_guidance as data_guidance,
    DynamicThreshold as DynamicThreshold,
    GaussianMixture as GaussianMixture,
    NormalData as NormalData,
    posterior_guidance as posterior_guidance,
    with_args as with_args,
    WithTime as WithTime,
)
from ._pixels import (
    bits_per_dimension as bits_per_dimension,
    dequantise as dequantise,
    to_uint8 as to_uint8,
)
from ._process import (
    AbstractDiagonalProcess as AbstractDiagonalProcess,
    AbstractProcess as AbstractProcess,
    AbstractScalarProcess as AbstractScalarProcess,
    AbstractSchedule as AbstractSchedule,
    BDM as BDM,
    BlurringCLD as BlurringCLD,
    check_process as check_process,
    CLD as CLD,
    CosineSchedule as CosineSchedule,
    DiscreteVP as DiscreteVP,
    EDM as EDM,
    GaussianPath as GaussianPath,
    HOLD as HOLD,
    Langevin as Langevin,
    LinearSchedule as LinearSchedule,
    LinearSDE as LinearSDE,
    PSLD as PSLD,
    RectifiedFlow as RectifiedFlow,
    SubVP as SubVP,
    TrigonometricFlow as TrigonometricFlow,
    VE as VE,
    VP as VP,
)
from ._sampling import (
    fit_solver as fit_solver,
    GaussianStart as GaussianStart,
    generate as generate,
    invert as invert,
    log_density as log_density,
    log_likelihood as log_likelihood,
    log_likelihood_bound as log_likelihood_bound,
    process_from_config as process_from_config,
    sample as sample,
    time_grid as time_grid,
)
from ._sharding import Placement as Placement
from ._term import (
    AbstractModel as AbstractModel,
    ProbabilityFlow as ProbabilityFlow,
    reverse_sde as reverse_sde,
    Semilinear as Semilinear,
)
from .solvers import (
    ExponentialAdams as ExponentialAdams,
    GDDIM as GDDIM,
    LearnedGDDIM as LearnedGDDIM,
    SSCS as SSCS,
)


__version__ = importlib.metadata.version("gddim_eqx")


def __getattr__(name: str):
    """Until the release: an error that names what was renamed."""
    renamed = {
        "ClassifierFreeGuidance": "classifier_free_guidance(flow)",
        "ClassifierGuidance": "classifier_guidance(flow, log_likelihood)",
        "DataGuidance": "data_guidance(flow, function)",
        "PosteriorGuidance": "posterior_guidance(flow, y, measurement, noise)",
        "WithArgs": "with_args(flow, args)",
    }
    hint = f" Use `{renamed[name]}`, which returns a flow." if name in renamed else ""
    if name in vars(results):
        hint = f" Use `gddim_eqx.results.{name}`."
    elif name in ("adapted_grid", "AdaptedGrid"):
        hint = " Use `fit_solver(flow, u, num_steps, solver, 'times')`, for its `ts`."
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
