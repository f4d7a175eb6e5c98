import abc

import equinox as eqx
from jaxtyping import Array, Inexact, Int

from gddim_eqx._misc import is_integer, show


class AbstractPredictor(eqx.Module):
    """The polynomial that extrapolates stored evaluations."""

    num_nodes: eqx.AbstractVar[int]
    """How many evaluations are combined, including the newest."""

    @abc.abstractmethod
    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], rank: Int[Array, " nodes"]
    ) -> Inexact[Array, "nodes nodes"]:
        """For each node, the coefficients of the polynomial that multiplies its value,
        lowest power first.

        **Arguments:**

        - `polynomials`: those of the Lagrange polynomials through the `num_nodes` nodes
            that are nearest to the start of the step; zero for others.
        - `rank`: the position of each node by its distance from the start of the step, 0
            for the new evaluation; the number of nodes for those that are not usable.
        """


class AdamsBashforth(AbstractPredictor):
    """Interpolates the newest evaluations."""

    num_nodes: int = eqx.field(static=True)

    def __init__(self, num_nodes: int):
        """**Arguments:**

        - `num_nodes`: how many evaluations are combined, 1 to 4.

        **Raises:** `ValueError` for any other number.
        """
        if not is_integer(num_nodes, 1, 4):
            raise ValueError(
                f"`order` must be 1, 2, 3 or 4; got {show(num_nodes)}. It is the "
                "number of evaluations that a step combines. Where the gDDIM paper's "
                "tables and code count from 0, by the degree of the polynomial "
                "(`deis_order`), it is one more."
            )
        self.num_nodes = int(num_nodes)

    def __call__(self, polynomials, rank):
        return polynomials
