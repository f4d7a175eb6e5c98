from .base import (
    AbstractDiagonalProcess as AbstractDiagonalProcess,
    AbstractProcess as AbstractProcess,
    AbstractScalarProcess as AbstractScalarProcess,
    check_process as check_process,
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
