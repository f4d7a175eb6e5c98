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
from .with_time import WithTime as WithTime
