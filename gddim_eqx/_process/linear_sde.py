from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from .._linear import (
    AbstractBasis,
    BlockLinearOperator,
    IdentityBasis,
    matmul,
    transposed,
)
from .._misc import as_constant, as_shape, check_instance, check_positive
from .base import AbstractProcess, check_times
from .edge_transitions import saturated_product
from .linear_sde_coefficients import as_blocks, Coefficients
from .linear_sde_solution import Solution


class LinearSDE(AbstractProcess):
    r"""Any linear diffusion, from its drift $F_t$ and diffusion $G_t$ alone.

    Transition, covariance and both square roots are solutions of ODEs, `factor` that of
    equation 17 of the paper. They are solved once, on the host and in float64 regardless
    of JAX's default, by spectral collocation on panels that are refined down to rounding
    errors, and stored as piecewise polynomials. There is a panel for each interval in which
    states decay or rotate noticeably, at most 1024; each takes about 2 ms to solve.

    The square root $R_t$ is determined up to a constant rotation. It equals the Cholesky
    factor at time 0. If the initial covariance is singular, the ODE cannot start there:
    $R_t$ then equals the Cholesky factor at `t_min / 1000`, and before that time the square
    roots are interpolated in the square root of time.

    !!! example

        ```python
        import gddim_eqx as gd

        slow_start = gd.LinearSDE((2,), lambda t: -5 * t, lambda t: (10 * t) ** 0.5)
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    basis: AbstractBasis
    data_scale: float = eqx.field(static=True)
    t_min: float = eqx.field(static=True)
    t_max: float = eqx.field(static=True)
    t_end: float = eqx.field(static=True)
    t_zero_signal = float("inf")
    _solution: Solution = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        drift: Callable,
        diffusion: Callable,
        initial_covariance: ArrayLike | BlockLinearOperator | None = None,
        *,
        basis: AbstractBasis | None = None,
        data_scale: float = 1.0,
        t_min: float = 1e-3,
        t_max: float | None = None,
        t_end: float = 1.0,
    ):
        r"""**Arguments:**

        - `shape`: the shape of one data sample.
        - `drift`, `diffusion`: functions from a scalar time to $F_t$ and $G_t$. Each is a
            [`gddim_eqx.BlockLinearOperator`][]; or an array of its blocks, `(n, n)` or
            `(n, n, *spectrum)`, for states of `n` components; or a scalar, for `n = 1`.
            They must be smooth on [0, t_end] and compute in the dtype of their argument.
        - `initial_covariance`: $\Sigma_0$, constant, in the same form; zero by default.
        - `basis`: the basis in which states are stored; the data's own by default.
        - `data_scale`: the mean of the state at time 0 is this times the data.
        - `t_min`, `t_max`: the sampling interval; `t_max` is `t_end` by default.
        - `t_end`: the end of the time axis.

        States of two components are a [`gddim_eqx.Phase`][], those of more a tuple. The
        first component carries the data.

        **Raises:** `ValueError` if the shapes do not match, the times are not in order, the
        coefficients are not finite or not smooth or have large rounding errors, or the
        covariance overflows or is not positive definite after time 0.
        """
        check_positive(data_scale=data_scale)
        self.t_min, self.t_end = as_constant("t_min", t_min), as_constant("t_end", t_end)
        self.t_max = self.t_end if t_max is None else as_constant("t_max", t_max)
        check_times(self.t_min, self.t_max, self.t_end)
        self.shape = as_shape(shape)
        self.basis = IdentityBasis() if basis is None else basis
        check_instance("basis", self.basis, AbstractBasis, "such as `CosineBasis()`")
        self.data_scale = float(data_scale)
        coefficients = Coefficients(self.shape, drift, diffusion, initial_covariance)
        _check_covariance(coefficients.initial_covariance)
        self.num_components = coefficients.num_components
        self._solution = Solution(coefficients, self.t_min, self.t_end)

    def _drift(self, t):
        t = _not_after(t, self.t_end)
        return as_blocks(self._solution.drift(t), t.dtype)

    def _diffusion(self, t):
        t = _not_after(t, self.t_end)
        return as_blocks(self._solution.diffusion(t), t.dtype)

    def _transition(self, t, s):
        within, between = self._solution.within, self._solution.between(t, s)
        before = self._operator(within(s)).inverse().blocks
        return saturated_product(saturated_product(within(t), between), before)

    def _covariance(self, t):
        cholesky = self._cholesky(t)
        return matmul(cholesky, transposed(cholesky))

    def _cholesky(self, t):
        return self._solution.cholesky(t)

    def _factor(self, t):
        return matmul(self._cholesky(t), self._solution.rotation(t))

    def _prior_factor(self):
        return self._cholesky(jnp.asarray(self.t_max))


def _check_covariance(covariance: np.ndarray) -> None:
    """Checked in units of each component's standard deviation, which may have any scale."""
    variances = np.linalg.diagonal(covariance)[..., None]
    unit = np.sqrt(np.where(variances > 0, variances, 1))
    correlation = covariance / (unit * unit.mT)
    if not np.abs(correlation - correlation.mT).max() < 1e-6:
        raise ValueError("`initial_covariance` must be symmetric and finite.")
    semidefinite = np.linalg.eigvalsh(correlation) >= -1e-12
    if not ((variances >= 0).all() and semidefinite.all()):
        raise ValueError("`initial_covariance` must be positive semi-definite.")


def _not_after(t: Array, end: float) -> Array:
    """Clip a time at the end of the time axis, which it may exceed by rounding, and beyond
    which the user's functions may be singular."""
    largest = np.nextafter(t.dtype.type(end), t.dtype.type(0))
    return t - lax.stop_gradient(t - jnp.minimum(t, largest))
