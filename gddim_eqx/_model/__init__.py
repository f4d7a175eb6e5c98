from .guidance import (
    ClassifierFreeGuidance as ClassifierFreeGuidance,
    ClassifierGuidance as ClassifierGuidance,
    Clip as Clip,
    DataGuidance as DataGuidance,
    DynamicThreshold as DynamicThreshold,
)
from .mixture import GaussianMixture as GaussianMixture
from .with_time import WithTime as WithTime
