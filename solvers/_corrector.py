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
    """How close a newer node may be to one where the state is corrected after the
    evaluation; see `Nodes.rank`."""

    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], rank: Int[Array, " nodes"]
    ) -> Inexact[Array, "nodes nodes"]:
        """As `AbstractPredictor.__call__`."""
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
    more about the corrections than about the derivative.

    **Arguments:**

    - `num_older`: how many past evaluations are combined with the new one.
    """

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = False
    closest: ClassVar[float] = 0.4


class Reevaluate(AbstractCorrector):
    """Corrects each step with an extra evaluation of the model at its end: PEC.

    **Arguments:**

    - `num_older`: how many past evaluations are combined with the new one.
    """

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = True
    closest: ClassVar[float] = 0.0
