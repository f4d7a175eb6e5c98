from ._exponential_adams import ExponentialAdams as ExponentialAdams
from ._gddim import GDDIM as GDDIM
from ._learned import LearnedGDDIM as LearnedGDDIM
from ._sscs import SSCS as SSCS


if __name__ != "gddim_eqx.solvers":
    raise ImportError(
        "Import this package as `gddim_eqx.solvers`, not as `solvers`, which would make "
        "a second copy of its classes."
    )
