import functools as ft
from collections.abc import Callable
from typing import (
    Any,
    Concatenate,
    overload,
    ParamSpec,
    Protocol,
    runtime_checkable,
    TypeVar,
)

from .._process import AbstractProcess
from .probability_flow import ProbabilityFlow


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


@runtime_checkable
class _TakesFlow(Protocol[P, R]):
    @overload
    def __call__(
        self, flow: ProbabilityFlow, /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    @overload
    def __call__(
        self,
        process: AbstractProcess,
        model: Callable,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...


def takes_flow(
    function: Callable[Concatenate[AbstractProcess, Callable, P], R],
) -> _TakesFlow[P, R]:
    """Allow a [`gddim_eqx.ProbabilityFlow`][] in place of a process, a model, `predicts`
    and `factor`."""

    @ft.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        args, kwargs = unpack_flow(args, kwargs)
        return function(*args, **kwargs)

    return wrapper  # pyright: ignore[reportReturnType]


def init_takes_flow(init: Callable[..., None]) -> Callable[..., None]:
    """As `takes_flow`, for a constructor."""

    @ft.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = unpack_flow(args, kwargs)
        init(self, *args, **kwargs)

    return wrapper


def unpack_flow(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with a flow, if any, replaced by its parts.

    **Raises:** `ValueError` for parts that are also given separately.
    """
    if "flow" in kwargs:
        args = (kwargs["flow"], *args)
        kwargs = {name: value for name, value in kwargs.items() if name != "flow"}
    if not args or not isinstance(args[0], ProbabilityFlow):
        return args, kwargs
    flow, *rest = args
    for name in ("process", "model", "predicts", "factor"):
        if name in kwargs:
            raise ValueError(
                f"`{name}` is a part of the flow that was passed; leave it out."
            )
    parts = dict(predicts=flow.predicts, factor=flow.factor)
    return (flow.process, flow.model, *rest), kwargs | parts
