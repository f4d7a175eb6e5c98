from .base import (
    AbstractDiagonalProcess as AbstractDiagonalProcess,
    AbstractProcess as AbstractProcess,
    AbstractScalarProcess as AbstractScalarProcess,
    as_shape as as_shape,
    as_time as as_time,
    as_times as as_times,
    check_positive as check_positive,
    normal_like as normal_like,
    require_process as require_process,
    time_for as time_for,
)
from .bdm import BDM as BDM
from .cld import CLD as CLD
from .linear_sde import LinearSDE as LinearSDE
from .schedule import (
    AbstractSchedule as AbstractSchedule,
    CosineSquared as CosineSquared,
    Linear as Linear,
)
from .sub_vp import SubVP as SubVP
from .ve import VE as VE
from .vp import VP as VP
