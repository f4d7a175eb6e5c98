from .guidance import (
    classifier_free_guidance as classifier_free_guidance,
    classifier_guidance as classifier_guidance,
    Clip as Clip,
    data_guidance as data_guidance,
    DynamicThreshold as DynamicThreshold,
    with_args as with_args,
)
from .mixture import GaussianMixture as GaussianMixture
from .normal import NormalData as NormalData
from .posterior import posterior_guidance as posterior_guidance
from .precondition import (
    check_normal_data as check_normal_data,
    error_of_output as error_of_output,
    normal_data as normal_data,
    precondition as precondition,
)
from .with_time import WithTime as WithTime
