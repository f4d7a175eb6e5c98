from .basis import (
    AbstractBasis as AbstractBasis,
    CosineBasis as CosineBasis,
    FourierBasis as FourierBasis,
    IdentityBasis as IdentityBasis,
)
from .covariance import (
    between as between,
    Covariance as Covariance,
    dot as dot,
    latent_given as latent_given,
    make_covariance as make_covariance,
)
from .operator import (
    append_axes as append_axes,
    apply as apply,
    BlockLinearOperator as BlockLinearOperator,
    combine as combine,
    matmul as matmul,
)
from .square_root import (
    align as align,
    square_root_of_sum as square_root_of_sum,
    transposed as transposed,
)
from .state import (
    add as add,
    at_least_single as at_least_single,
    batch_axes as batch_axes,
    check_real as check_real,
    check_state as check_state,
    coefficient_dtype as coefficient_dtype,
    join_components as join_components,
    Phase as Phase,
    subtract as subtract,
)
