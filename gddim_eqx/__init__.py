import typing as _typing
from importlib.metadata import version as _version

from . import (
    checkpoints as checkpoints,
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


__version__ = _version("gddim_eqx")

# Until the release: former names, and what to use.
_former = {
    "datasets": "Copy `examples/data.py` of the repository, or pass NumPy arrays.",
    "adapted_grid": "Use `fit_solver(flow, u, num_steps, solver, 'times')`, for its `ts`.",
    "ClassifierFreeGuidance": "Use `classifier_free_guidance(flow)`, which returns a flow.",
    "ClassifierGuidance": "Use `classifier_guidance(flow, log_likelihood)`.",
    "DataGuidance": "Use `data_guidance(flow, function)`, which returns a flow.",
    "PosteriorGuidance": "Use `posterior_guidance(flow, y, measurement, noise)`.",
    "WithArgs": "Use `with_args(flow, args)`, which returns a flow.",
} | {name: f"Use `gddim_eqx.results.{name}`." for name in vars(results) if name[0] != "_"}

# Hidden from type checkers, which would accept any name.
if not _typing.TYPE_CHECKING:

    def __getattr__(name: str):
        cure = _former.get(name, "")
        raise AttributeError(f"`gddim_eqx` has no {name!r}. {cure}".rstrip())
