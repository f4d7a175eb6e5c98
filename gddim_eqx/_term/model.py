import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._custom_types import Args, PredictionName, RealScalarLike, State
from .._process import AbstractProcess


class AbstractModel(eqx.Module):
    """A model that says what it is. All members but `__call__` have defaults, which say
    nothing; any other callable is a model that says nothing.

    !!! example

        A model that turns the noise prediction of another into a data prediction. Its
        `predicts` need not be repeated to [`gddim_eqx.ProbabilityFlow`][]:

        ```python
        import gddim_eqx as gd


        class Denoiser(gd.AbstractModel):
            flow: gd.ProbabilityFlow

            @property
            def predicts(self):
                return "data"

            def __call__(self, t, u, args):
                process = self.flow.process
                return process.decode(self.flow.denoised(t, process.from_data(u), args))


        process = gd.VP((2,))
        noise = gd.ProbabilityFlow(process, lambda t, u, args: 0.9 * u)
        flow = gd.ProbabilityFlow(process, Denoiser(noise))
        assert flow.predicts == "data"
        ```
    """

    @property
    def predicts(self) -> PredictionName | None:
        """What the model predicts, if that is part of it; `None` if it is what the model
        was trained for."""
        return None

    @property
    def no_condition(self) -> Any:
        """The `args` of one sample that stand for no condition; `None` if nothing does."""
        return None

    def normal_data(self, process: AbstractProcess) -> Any:
        """What the model knows of its data: [`gddim_eqx.NormalData`][], or `None`."""
        return None

    def check_args(self, args: Args) -> None:
        """Check the `args` of a call, outside of `jax.jit`.

        **Raises:** `ValueError` for what the model does not take.
        """

    @abc.abstractmethod
    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        """As the `model` of [`gddim_eqx.ProbabilityFlow`][]."""


class AbstractWrapper(AbstractModel):
    """A model that says what another does."""

    @property
    @abc.abstractmethod
    def inner(self) -> Callable:
        """The other model."""

    @property
    def predicts(self) -> PredictionName | None:
        return as_model(self.inner).predicts

    @property
    def no_condition(self) -> Any:
        return as_model(self.inner).no_condition

    def normal_data(self, process: AbstractProcess) -> Any:
        return as_model(self.inner).normal_data(process)

    def check_args(self, args: Args) -> None:
        as_model(self.inner).check_args(args)


class _Function(AbstractModel):
    function: Callable

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        return self.function(t, u, args)


def as_model(model: Callable) -> AbstractModel:
    """A model that says what it is; nothing, if it is any other callable."""
    # In training with dropout, the model has its key.
    inner = model.func if isinstance(model, ft.partial) else model
    return inner if isinstance(inner, AbstractModel) else _Function(model)
