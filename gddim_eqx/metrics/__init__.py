from ._features import (
    AbstractFeatures as AbstractFeatures,
    Classifier as Classifier,
    Inception as Inception,
    Pixels as Pixels,
)
from ._frechet import frechet_distance as frechet_distance
from ._kernel import kernel_distance as kernel_distance, KernelDistance as KernelDistance
from ._moments import Moments as Moments
from ._precision_recall import (
    precision_recall as precision_recall,
    PrecisionRecall as PrecisionRecall,
)
from ._reference import Reference as Reference, reference as reference
from ._sliced import sliced_wasserstein as sliced_wasserstein
