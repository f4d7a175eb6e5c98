import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from gddim_eqx._exponential import lagrange, scaled, StepCoefficients

from ._history import Nodes


class AbstractCorrector(eqx.Module):
    """How the end of a step is corrected once the model has been evaluated there."""

    num_older: eqx.AbstractVar[int]
    """How many older evaluations the corrector's polynomial passes through, beside the new
    one."""


class NoCorrector(AbstractCorrector):
    """The end of a step stays as it was predicted."""

    num_older: int = eqx.field(static=True, default=0, init=False)


class FreeCorrector(AbstractCorrector):
    """Corrects the end of a step by the evaluation that begins the next step, as UniC does:
    free of cost, but for the last step not at all."""

    num_older: int = eqx.field(static=True)


class Reevaluate(AbstractCorrector):
    """Evaluates the model once more, at the end of each step: PEC."""

    num_older: int = eqx.field(static=True)

    def __call__(
        self, nodes: Nodes, c: StepCoefficients
    ) -> Inexact[Array, "nodes+1 nodes+1"]:
        """Lagrange polynomials through the end of the step, at 1, and older nodes."""
        x = jnp.append(1, scaled(nodes.coordinate, c.start, c.end))
        return lagrange(x, jnp.append(True, nodes.valid(self.num_older)))
