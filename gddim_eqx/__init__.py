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
    ClassifierFreeGuidance as ClassifierFreeGuidance,
    ClassifierGuidance as ClassifierGuidance,
    Clip as Clip,
    DataGuidance as DataGuidance,
    DynamicThreshold as DynamicThreshold,
    GaussianMixture as GaussianMixture,
    NormalData as NormalData,
    PosteriorGuidance as PosteriorGuidance,
    WithArgs as WithArgs,
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
    # Until the release.
    if name in vars(results):
        raise AttributeError(f"`gddim_eqx.{name}` is now `gddim_eqx.results.{name}`.")
    if name in ("adapted_grid", "AdaptedGrid"):
        raise AttributeError(
            "`adapted_grid` is now a part of `fit_solver`: "
            "`fitted = fit_solver(flow, u, num_steps, solver, 'times')`, with `fitted.ts`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
