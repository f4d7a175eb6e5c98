import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from gddim_eqx._exponential import lagrange, scaled, StepCoefficients

from ._history import Nodes


class AbstractCorrector(eqx.Module):
    """Corrects the end of a step once the model has been evaluated there."""

    num_older: eqx.AbstractVar[int]
    """How many past evaluations the corrector's polynomial interpolates, besides the new
    one."""


class NoCorrector(AbstractCorrector):
    """No correction: the predicted state is kept."""

    num_older: int = eqx.field(static=True, default=0, init=False)


class FreeCorrector(AbstractCorrector):
    """Corrects the end of a step with the evaluation that begins the next step, as UniC
    does. It costs no NFE, but the last step is not corrected."""

    num_older: int = eqx.field(static=True)


class Reevaluate(AbstractCorrector):
    """Corrects each step with an extra evaluation of the model at its end: PEC."""

    num_older: int = eqx.field(static=True)

    def __call__(self, nodes: Nodes, c: StepCoefficients) -> Inexact[Array, "more more"]:
        """Lagrange polynomials on the end of the step, at 1, and past nodes."""
        x = jnp.append(1, scaled(nodes.coordinate, c.start, c.end))
        return lagrange(x, jnp.append(True, nodes.valid(self.num_older)))
