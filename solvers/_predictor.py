import abc

import equinox as eqx
from jaxtyping import Array, Inexact

from ._history import Nodes


class AbstractPredictor(eqx.Module):
    """By which polynomial stored evaluations are extrapolated."""

    num_nodes: eqx.AbstractVar[int]
    """How many evaluations are combined, the newest included."""

    @abc.abstractmethod
    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], nodes: Nodes
    ) -> Inexact[Array, "nodes nodes"]:
        """By node, the coefficients of the polynomial that multiplies its value, lowest
        power first, given those of the Lagrange polynomials."""


class AdamsBashforth(AbstractPredictor):
    """The polynomial through the newest evaluations."""

    num_nodes: int = eqx.field(static=True)

    def __call__(self, polynomials, nodes):
        return polynomials
