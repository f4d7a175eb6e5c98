from .diffrax_compat import unwrap as unwrap
from .model import (
    AbstractModel as AbstractModel,
    AbstractWrapper as AbstractWrapper,
    as_model as as_model,
    map_rows as map_rows,
)
from .prediction import (
    check_frame as check_frame,
    check_prediction as check_prediction,
    make_prediction as make_prediction,
    PerturbationKernel as PerturbationKernel,
)
from .probability_flow import (
    AbstractReverseTerm as AbstractReverseTerm,
    check_flow as check_flow,
    flow_first as flow_first,
    flow_of_ode as flow_of_ode,
    ProbabilityFlow as ProbabilityFlow,
    without_errors as without_errors,
)
from .reverse_sde import (
    reverse_sde as reverse_sde,
    ReverseSDE as ReverseSDE,
    unwrap_reverse as unwrap_reverse,
)
from .semilinear import LinearPart as LinearPart, Semilinear as Semilinear
from .started import (
    evaluated_model as evaluated_model,
    started_flow as started_flow,
    StartedModel as StartedModel,
)
from .stochasticity import as_lam as as_lam, lam_at as lam_at
from .times import real_time as real_time, step_faults as step_faults
