import abc

from jaxtyping import Array

from .._linear import IdentityBasis
from .base import AbstractProcess


class AbstractDiagonalProcess(AbstractProcess):
    r"""A process of one component, so that every matrix is one number per coordinate. Its
    two square roots of the covariance coincide.

    Subclasses provide the attributes of [`gddim_eqx.AbstractProcess`][] except
    `num_components`, and the methods below. Each returns an array in the dtype of its
    arguments: a scalar shared by all coordinates, or one number per coordinate in the basis
    of states, with as many axes as the data and a shape that broadcasts to `shape`.

    - `_drift(t)`: $f_t$, in $\mathrm{d}u = f_t\,u\,\mathrm{d}t +
        g_t\,\mathrm{d}w$.
    - `_diffusion(t)`: $g_t$.
    - `_transition(t, s)`: $\exp \int_s^t f$, the ratio of the means at `t` and `s`.
    - `_std(t)`: the standard deviation of $u_t$ given data; its square has the derivative
        $2 f_t \sigma_t^2 + g_t^2$.
    - `_prior_factor()`: the standard deviation of the prior.
    """

    @abc.abstractmethod
    def _std(self, t: Array) -> Array:
        """The standard deviation given data."""

    num_components = 1

    def _covariance(self, t):
        return self._std(t) ** 2

    def _factor(self, t):
        return self._std(t)

    def _cholesky(self, t):
        return self._std(t)


class AbstractScalarProcess(AbstractDiagonalProcess):
    """A diagonal process that acts on all coordinates of the data alike: `_drift`,
    `_diffusion`, `_transition` and `_std` return scalars. States are in the data's own
    coordinates, and sampling starts at `t_end`. See [`gddim_eqx.AbstractProcess`][] for an
    example."""

    basis = IdentityBasis()
    data_scale = 1.0

    @property
    def t_max(self) -> float:
        return self.t_end
