import abc
import functools as ft
import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._custom_types import RealScalarLike
from .._linear import IdentityBasis
from .._misc import as_shape, check_not_negative, check_positive, constant_field
from .base import AbstractProcess
from .linear_sde import LinearSDE


# As in base.py.
if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractAugmentedProcess(AbstractProcess):
    r"""A process of the data and auxiliary variables, such as a velocity, at the rate
    $\beta_t = \beta_0 + \beta_1 t$. Some signal remains at `t_end`, where sampling
    starts."""

    beta: AbstractVar[float]
    beta_slope: AbstractVar[float]

    basis = IdentityBasis()
    data_scale = 1.0

    @property
    def t_max(self) -> float:
        return self.t_end

    t_zero_signal = math.inf

    def __check_init__(self):
        if self.beta < 0 or not self._rate(self.t_end) > 0:
            raise ValueError(
                "`beta + beta_slope * t` must be positive on (0, t_end]; got "
                f"beta={self.beta} and beta_slope={self.beta_slope}."
            )

    def _rate(self, t):
        return self.beta + self.beta_slope * t

    def _rescaled(self, t, start: RealScalarLike = 0.0):
        return (t - start) * (self.beta + 0.5 * self.beta_slope * (t + start))


class AbstractLangevin(AbstractAugmentedProcess):
    r"""A process whose coefficients are constant up to the rate,
    $\mathrm{d}u = \beta_t A u\,\mathrm{d}t + \sqrt{\beta_t} B\,\mathrm{d}w$.

    Subclasses specify $A$, $B$, the initial covariance and the prior. Everything else
    follows from a [`gddim_eqx.LinearSDE`][] in the rescaled time $\int \beta$, which is
    solved once for all processes with the same coefficients.
    """

    @abc.abstractmethod
    def _coefficients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """$A$, $B$ and the initial covariance."""

    @abc.abstractmethod
    def _prior_std(self) -> list[float]:
        """The standard deviation of each component under the prior."""

    @property
    def num_components(self) -> int:
        return len(self._prior_std())

    def _sde(self) -> LinearSDE:
        matrices = tuple(tuple(map(tuple, x.tolist())) for x in self._coefficients())
        return _solved(matrices, self._rescaled(self.t_min), self._rescaled(self.t_end))

    def _drift(self, t):
        return jnp.asarray(self._coefficients()[0], t.dtype) * self._rate(t)

    def _diffusion(self, t):
        return jnp.asarray(self._coefficients()[1], t.dtype) * jnp.sqrt(self._rate(t))

    def _transition(self, t, s):
        return self._sde()._transition(self._rescaled(t), self._rescaled(s))

    def _covariance(self, t):
        return self._sde()._covariance(self._rescaled(t))

    def _factor(self, t):
        return self._sde()._factor(self._rescaled(t))

    def _cholesky(self, t):
        return self._sde()._cholesky(self._rescaled(t))

    def _prior_factor(self):
        return jnp.diag(jnp.array(self._prior_std()))


@ft.lru_cache(maxsize=64)
def _solved(matrices, t_min: float, t_end: float) -> LinearSDE:
    drift, diffusion, covariance = (np.array(x) for x in matrices)
    constant = lambda x: lambda t: jnp.asarray(x, t.dtype)
    return LinearSDE(
        (1,), constant(drift), constant(diffusion), covariance, t_min=t_min, t_end=t_end
    )


class Langevin(AbstractLangevin):
    r"""Langevin diffusion with any damping: data $x$ with a velocity $v$,

    $$\mathrm{d}x = \beta_t M^{-1} v\,\mathrm{d}t, \qquad
    \mathrm{d}v = -\beta_t (x + \Gamma M^{-1} v)\,\mathrm{d}t
    + \sqrt{2 \Gamma \beta_t}\,\mathrm{d}w, \qquad \Gamma = 2 \zeta \sqrt{M}.$$

    With the damping ratio $\zeta = 1$ this is [`gddim_eqx.CLD`][]. For smaller ratios the
    process is underdamped and oscillates; for larger ones it is overdamped and converges
    more slowly.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `damping`: the damping ratio; 1 is critical.
    - `beta`, `beta_slope`: the rate is `beta + beta_slope * t`.
    - `mass_inverse`: 1 / M.
    - `gamma`: the variance of the initial velocity, divided by the mass.
    - `epsilon`: added to both initial variances, so that the covariance is non-singular at
        time 0.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    damping: float = constant_field("damping", 1.0, check_positive)
    beta: float = constant_field("beta", 4.0)
    beta_slope: float = constant_field("beta_slope", 0.0)
    mass_inverse: float = constant_field("mass_inverse", 4.0, check_positive)
    gamma: float = constant_field("gamma", 0.04, check_not_negative)
    epsilon: float = constant_field("epsilon", 1e-6, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    def _coefficients(self):
        friction = 2 * self.damping * math.sqrt(self.mass_inverse)
        return phase_space(0.0, friction, self.mass_inverse, self.gamma, self.epsilon)

    def _prior_std(self):
        return [1.0, self.mass_inverse**-0.5]


def phase_space(
    nu: float, friction: float, mass_inverse: float, gamma: float, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """$A$, $B$ and the initial covariance for a position and a velocity, with friction and
    noise in both."""
    drift = np.array([[-nu, mass_inverse], [-1.0, -friction]])
    diffusion = np.diag([math.sqrt(2 * nu), math.sqrt(2 * friction / mass_inverse)])
    return drift, diffusion, np.diag([epsilon, gamma / mass_inverse + epsilon])
