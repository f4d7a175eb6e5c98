from .guidance import (
    ClassifierFreeGuidance as ClassifierFreeGuidance,
    ClassifierGuidance as ClassifierGuidance,
    Clip as Clip,
    DataGuidance as DataGuidance,
    DynamicThreshold as DynamicThreshold,
    WithArgs as WithArgs,
)
from .mixture import GaussianMixture as GaussianMixture
from .normal import NormalData as NormalData
from .posterior import PosteriorGuidance as PosteriorGuidance
from .precondition import (
    check_normal_data as check_normal_data,
    error_of_output as error_of_output,
    normal_data as normal_data,
    precondition as precondition,
)
from .with_time import WithTime as WithTime
