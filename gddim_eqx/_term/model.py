import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import Args, PredictionName, RealScalarLike, State
from .._process import AbstractProcess


class AbstractModel(eqx.Module):
    """A model that describes itself: what it predicts, its null condition, and what it
    knows of its data. All members except `__call__` are optional. Any other callable is a
    model without a description.

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
        """The null condition: the `args` of one unconditional sample; `None` if the model
        has none."""
        return None

    def normal_data(self, process: AbstractProcess) -> Any:
        """The mean and covariance of the data, if the model knows them, as
        [`gddim_eqx.NormalData`][]; else `None`."""
        return None

    def check_args(self, args: Args) -> None:
        """Check the `args` of a call, outside of `jax.jit`.

        **Raises:** `ValueError` for `args` that the model does not accept.
        """

    @property
    def rows(self) -> dict[str, Array]:
        """The fields that have one row per sample, by name."""
        return {}

    @abc.abstractmethod
    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        """As the `model` of [`gddim_eqx.ProbabilityFlow`][]."""


class AbstractWrapper(AbstractModel):
    """A model that inherits the description of the model it wraps."""

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
    """The description of a model: the model itself, or the defaults for other callables."""
    # In training with dropout, the model has its key.
    inner = model.func if isinstance(model, ft.partial) else model
    return inner if isinstance(inner, AbstractModel) else _Function(model)


def map_rows(function: Callable[[str, Array], Array], model: Any) -> Any:
    """Apply a function to the arrays of a model, and of models in it, that have one row per
    sample.

    **Arguments:**

    - `function`: called with a name and an array.
    - `model`: a model, or a flow.
    """
    if isinstance(model, AbstractModel):
        for name, x in model.rows.items():
            at = lambda model, name=name: getattr(model, name)
            where = f"`{name}` of `{type(model).__name__}`"
            model = eqx.tree_at(at, model, function(where, x))
    is_inner = lambda x: x is not model and isinstance(x, AbstractModel)
    inner = lambda x: map_rows(function, x) if is_inner(x) else x
    return jtu.tree_map(inner, model, is_leaf=is_inner)
