import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from gddim_eqx._exponential import lagrange


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
        self, nodes: Inexact[Array, " nodes"], valid: Bool[Array, " nodes"]
    ) -> Inexact[Array, "nodes+1 nodes+1"]:
        """Lagrange polynomials through the end of the step, at 1, and older nodes."""
        ends = jnp.concatenate([jnp.ones(1, nodes.dtype), nodes])
        return lagrange(ends, jnp.concatenate([jnp.ones(1, bool), valid]))
