import abc

import lineax as lx
from jaxtyping import Array

from .._linear import (
    AbstractBasis,
    BlockLinearOperator,
    IdentityBasis,
)
from .base import AbstractProcess
from .times import as_time, as_times


class AbstractDiagonalProcess(AbstractProcess):
    r"""A process of one component, so that every matrix is one number per coordinate. Its
    two square roots of the covariance coincide.

    Subclasses provide `prior_factor`, the attributes of [`gddim_eqx.AbstractProcess`][]
    except `num_components`, and these four functions of scalar times. Each returns an
    array in the dtype of its arguments: a scalar shared by all coordinates, or one number
    per coordinate in the basis of states, with as many axes as the data and a shape that
    broadcasts to `shape`.

    - `_drift(t)`: $f_t$, in $\mathrm{d}u = f_t\,u\,\mathrm{d}t +
        g_t\,\mathrm{d}w$.
    - `_diffusion(t)`: $g_t$.
    - `_transition(t, s)`: $\exp \int_s^t f$, the ratio of the means at `t` and `s`.
    - `_std(t)`: the standard deviation of $u_t$ given data; its square has the derivative
        $2 f_t \sigma_t^2 + g_t^2$.
    """

    @abc.abstractmethod
    def _drift(self, t: Array) -> Array:
        """$f_t$."""

    @abc.abstractmethod
    def _diffusion(self, t: Array) -> Array:
        """$g_t$."""

    @abc.abstractmethod
    def _transition(self, t: Array, s: Array) -> Array:
        """The ratio of the means at `t` and `s`. Either time may be the later."""

    @abc.abstractmethod
    def _std(self, t: Array) -> Array:
        """The standard deviation given data."""

    @property
    def num_components(self) -> int:
        return 1

    def _operator(self, value: Array, tags: object = frozenset()) -> BlockLinearOperator:
        return BlockLinearOperator(value[None, None], self.shape, tags)

    def drift(self, t):
        return self._operator(self._drift(as_time(t)))

    def diffusion(self, t):
        return self._operator(self._diffusion(as_time(t)))

    def transition(self, t, s):
        return self._operator(self._transition(*as_times(t, s)))

    def covariance(self, t):
        std = self._std(as_time(t))
        return self._operator(std**2, lx.positive_semidefinite_tag)

    def factor(self, t):
        return self._operator(self._std(as_time(t)))

    def cholesky(self, t):
        return self.factor(t)


class AbstractScalarProcess(AbstractDiagonalProcess):
    """A diagonal process that acts on all coordinates of the data alike: `_drift`,
    `_diffusion`, `_transition` and `_std` return scalars. States are in the data's own
    coordinates, and sampling starts at `t_end`. See [`gddim_eqx.AbstractProcess`][] for an
    example."""

    @property
    def basis(self) -> AbstractBasis:
        return IdentityBasis()

    @property
    def data_scale(self) -> float:
        return 1.0

    @property
    def t_max(self) -> float:
        return self.t_end
