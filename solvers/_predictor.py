import abc

import equinox as eqx
from jaxtyping import Array, Inexact, Int


class AbstractPredictor(eqx.Module):
    """The polynomial that extrapolates stored evaluations."""

    num_nodes: eqx.AbstractVar[int]
    """How many evaluations are combined, including the newest."""

    @abc.abstractmethod
    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], rank: Int[Array, " nodes"]
    ) -> Inexact[Array, "nodes nodes"]:
        """For each node, the coefficients of the polynomial that multiplies its value,
        lowest power first, given those of the Lagrange polynomials and its rank, the
        newest first."""


class AdamsBashforth(AbstractPredictor):
    """Interpolates the newest evaluations."""

    num_nodes: int = eqx.field(static=True)

    def __call__(self, polynomials, rank):
        return polynomials
