from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Inexact, Int


class AbstractCorrector(eqx.Module):
    """The polynomial that corrects the end of a step once the model has been evaluated
    there."""

    num_older: eqx.AbstractVar[int]
    """How many past evaluations are combined with the one at the end of the step; 0 for no
    correction."""
    reevaluates: eqx.AbstractClassVar[bool]
    """Whether the model is evaluated at the end of every step; otherwise the evaluation
    that begins the next step is used, and the last step is not corrected."""
    closest: eqx.AbstractClassVar[float]
    """Which past nodes are not used: those that a newer node follows within this fraction
    of the current step and of the step that ended at the past node. The model was evaluated
    there before the state was corrected."""

    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], rank: Int[Array, " nodes"]
    ) -> Inexact[Array, "nodes nodes"]:
        """As `AbstractPredictor.__call__`, for the polynomials over the corrected step, of
        which node 0 is the end."""
        return polynomials


class NoCorrector(AbstractCorrector):
    """No correction: the predicted state is kept.

    **Arguments:** None
    """

    num_older: int = eqx.field(static=True, default=0, init=False)
    reevaluates: ClassVar[bool] = False
    closest: ClassVar[float] = 0.0


class FreeCorrector(AbstractCorrector):
    """Corrects the end of a step with the evaluation that begins the next step, as UniC
    does. It costs no NFE, but the last step is not corrected.

    The evaluations are at uncorrected states. Their differences over a short distance say
    more about the corrections than about the derivative, so that close nodes are dropped.

    **Arguments:**

    - `num_older`: how many past evaluations are combined with the new one.
    """

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = False
    closest: ClassVar[float] = 0.4


class Reevaluate(AbstractCorrector):
    """Corrects each step with an extra evaluation of the model at its end: PEC in the
    paper. The next step evaluates the model again, at the corrected state.

    **Arguments:**

    - `num_older`: how many past evaluations are combined with the new one.
    """

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = True
    closest: ClassVar[float] = 0.0
