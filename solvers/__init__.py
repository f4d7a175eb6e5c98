from gddim_eqx._exponential import (
    AbstractCoordinate as AbstractCoordinate,
    AbstractSplitting as AbstractSplitting,
    Clock as Clock,
    DataSplitting as DataSplitting,
    LogSNR as LogSNR,
    NoiseSplitting as NoiseSplitting,
    SemilinearSplitting as SemilinearSplitting,
    StepCoefficients as StepCoefficients,
    Time as Time,
)

from ._corrector import (
    AbstractCorrector as AbstractCorrector,
    FreeCorrector as FreeCorrector,
    NoCorrector as NoCorrector,
    Reevaluate as Reevaluate,
)
from ._exponential_adams import ExponentialAdams as ExponentialAdams
from ._gddim import GDDIM as GDDIM
from ._learned import LearnedGDDIM as LearnedGDDIM
from ._multistep import (
    AbstractExponentialMultistep as AbstractExponentialMultistep,
    Problem as Problem,
)
from ._predictor import (
    AbstractPredictor as AbstractPredictor,
    AdamsBashforth as AdamsBashforth,
)
from ._sscs import SSCS as SSCS


if __name__ != "gddim_eqx.solvers":
    raise ImportError(
        "Import this package as `gddim_eqx.solvers`, not as `solvers`, which would make "
        "a second copy of its classes."
    )
