import functools as ft
from collections.abc import Callable
from typing import ParamSpec, TypeVar


P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that rejects arguments by their former names, `renamed(old="new")`.

    **Raises:** `ValueError` that says what to pass in place of such an argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @ft.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                raise ValueError(f"`{old}` was renamed: pass `{names[old]}`.")
            return function(*args, **kwargs)

        return wrapper

    return decorate
