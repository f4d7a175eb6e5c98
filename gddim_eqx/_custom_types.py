from collections.abc import Callable, Sequence
from typing import Any, Literal, TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Inexact, PyTree, Real


if TYPE_CHECKING:
    RealScalarLike = float | int | Array | np.ndarray
    BoolScalarLike = bool | Array | np.ndarray
    Key = jax.Array
else:
    from jaxtyping import PRNGKeyArray, UInt32

    RealScalarLike = Real[ArrayLike, ""]
    BoolScalarLike = Bool[ArrayLike, ""]
    Key = PRNGKeyArray | UInt32[Array, "2"]


# One array, a `Phase`, or a tuple of arrays; each `(*batch, *shape)`.
State = PyTree[Inexact[Array, "..."], "State"]
Args = PyTree[Any]
# Times to step to, as an array or a list.
Times = Real[ArrayLike, " times"] | Sequence[RealScalarLike]
# The stochasticity of a reverse diffusion, constant or as a function of time.
Stochasticity = RealScalarLike | Callable[[Array], RealScalarLike]
# What models predict.
PredictionName = Literal["noise", "data", "score", "v", "flow"]
# The frame in which noise is predicted: the square root of the covariance, R or L.
FrameName = Literal["R", "cholesky"]
