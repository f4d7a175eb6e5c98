from .base import (
    AbstractProcess as AbstractProcess,
    log_norm as log_norm,
    normal_like as normal_like,
    require_process as require_process,
)
from .bdm import BDM as BDM
from .blurring_cld import BlurringCLD as BlurringCLD
from .check_process import check_process as check_process
from .cld import CLD as CLD
from .diagonal import (
    AbstractDiagonalProcess as AbstractDiagonalProcess,
    AbstractScalarProcess as AbstractScalarProcess,
)
from .discrete import DiscreteVP as DiscreteVP
from .edm import EDM as EDM
from .flow_matching import (
    RectifiedFlow as RectifiedFlow,
    TrigonometricFlow as TrigonometricFlow,
)
from .gaussian_path import GaussianPath as GaussianPath
from .hold import HOLD as HOLD
from .langevin import AbstractLangevin as AbstractLangevin, Langevin as Langevin
from .linear_sde import LinearSDE as LinearSDE
from .progress import (
    bounded_log_snr as bounded_log_snr,
    clock as clock,
    clock_table as clock_table,
    log_snr_at_start as log_snr_at_start,
    log_snr_table as log_snr_table,
    log_snr_table_from as log_snr_table_from,
)
from .psld import PSLD as PSLD
from .schedule import (
    AbstractSchedule as AbstractSchedule,
    CosineSchedule as CosineSchedule,
    LinearSchedule as LinearSchedule,
)
from .sub_vp import SubVP as SubVP
from .tables import coarse_and_rest as coarse_and_rest
from .time_axis import (
    as_grid as as_grid,
    as_time as as_time,
    as_times as as_times,
    latest as latest,
    on_time_axis as on_time_axis,
    time_for as time_for,
)
from .ve import VE as VE
from .vp import VP as VP
