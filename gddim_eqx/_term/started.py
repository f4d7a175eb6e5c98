from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from .._custom_types import Args, PredictionName, RealScalarLike, State
from .._process import as_time
from .model import AbstractWrapper
from .probability_flow import ProbabilityFlow


class StartedModel(AbstractWrapper):
    """A model of the data that is known in closed form at high noise levels, where another
    model need not be evaluated. From [`gddim_eqx.GaussianStart`][]."""

    evaluated: ProbabilityFlow
    closed_form: ProbabilityFlow
    t: Array
    """The model is evaluated up to this time; at later times, it is the closed form."""
    slope: Array

    @property
    def inner(self) -> Callable:
        return self.evaluated.model

    @property
    def predicts(self) -> PredictionName:
        return "data"

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        def of(flow):
            process = flow.process
            initial = flow.denoised(t, process.from_data(u), args)
            data = jtu.tree_map(lambda x: x / process.data_scale, initial)
            return process.to_data(data)

        return lax.cond(
            self.is_closed_form(as_time(t)),
            lambda: of(self.closed_form),
            lambda: of(self.evaluated),
        )

    def is_closed_form(self, t: Array | np.ndarray) -> Bool[Array, "..."]:
        return jnp.asarray(t) > self.t.astype(t.dtype)

    def starts(self, t: Array, earliest: Array) -> Bool[Array, ""]:
        """Whether the model is evaluated at a time, and was not at the earliest of those
        before."""
        return ~self.is_closed_form(t) & self.is_closed_form(earliest)


def started_flow(
    flow: ProbabilityFlow, data: Any, t: Array, slope: Array
) -> ProbabilityFlow:
    """A flow whose model is that of normal data, or of a mixture, at times after `t`."""
    process = flow.process
    closed_form = ProbabilityFlow(process, data.model(process, "data"))
    model = StartedModel(flow, closed_form, t, slope)
    return ProbabilityFlow(process, model, raises=flow.raises)


def evaluated_model(flow: ProbabilityFlow) -> Any:
    """The model of a flow that is evaluated, without a closed form before it."""
    model = flow.model
    return model.evaluated.model if isinstance(model, StartedModel) else model
