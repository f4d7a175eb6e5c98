from .coordinate import (
    AbstractCoordinate as AbstractCoordinate,
    Clock as Clock,
    LogSNR as LogSNR,
    slowing as slowing,
    Time as Time,
)
from .interpolation import Exponential as Exponential, interpolation as interpolation
from .polynomial import (
    integral as integral,
    lagrange as lagrange,
    weighted_sum as weighted_sum,
    weights as weights,
)
from .quadrature import step_nodes as step_nodes
from .reverse_transition import (
    noise_transition as noise_transition,
    NoiseTransition as NoiseTransition,
    reverse_transition as reverse_transition,
)
from .semilinear import SemilinearSplitting as SemilinearSplitting
from .splitting import (
    AbstractSplitting as AbstractSplitting,
    DataSplitting as DataSplitting,
    NoiseSplitting as NoiseSplitting,
    StepCoefficients as StepCoefficients,
)
