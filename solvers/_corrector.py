from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Inexact

from ._history import Nodes


class AbstractCorrector(eqx.Module):
    """The polynomial that corrects the end of a step once the model has been evaluated
    there."""

    num_older: eqx.AbstractVar[int]
    """How many past evaluations are combined with the one at the end of the step; 0 for no
    correction."""
    reevaluates: eqx.AbstractClassVar[bool]
    """Whether the model is evaluated at the end of every step; otherwise the evaluation
    that begins the next step is used, and the last step is not corrected."""

    def __call__(
        self, polynomials: Inexact[Array, "nodes nodes"], nodes: Nodes
    ) -> Inexact[Array, "nodes nodes"]:
        """As `AbstractPredictor.__call__`."""
        return polynomials


class NoCorrector(AbstractCorrector):
    """No correction: the predicted state is kept."""

    num_older: int = eqx.field(static=True, default=0, init=False)
    reevaluates: ClassVar[bool] = False


class FreeCorrector(AbstractCorrector):
    """Corrects the end of a step with the evaluation that begins the next step, as UniC
    does. It costs no NFE, but the last step is not corrected."""

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = False


class Reevaluate(AbstractCorrector):
    """Corrects each step with an extra evaluation of the model at its end: PEC."""

    num_older: int = eqx.field(static=True)
    reevaluates: ClassVar[bool] = True
