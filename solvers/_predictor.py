import abc

import equinox as eqx
from jaxtyping import Array, Bool, Inexact

from gddim_eqx._exponential import lagrange


class AbstractPredictor(eqx.Module):
    """By which polynomial stored evaluations are extrapolated."""

    num_nodes: eqx.AbstractVar[int]
    """How many evaluations are combined, the newest included."""

    @abc.abstractmethod
    def __call__(
        self, nodes: Inexact[Array, " nodes"], valid: Bool[Array, " nodes"]
    ) -> Inexact[Array, "nodes nodes"]:
        """By node, the coefficients of the polynomial that multiplies its value, lowest
        power first."""


class AdamsBashforth(AbstractPredictor):
    """The polynomial through the newest evaluations."""

    num_nodes: int = eqx.field(static=True)

    def __call__(self, nodes, valid):
        return lagrange(nodes, valid)
