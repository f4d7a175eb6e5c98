import reprlib
from typing import Any


_repr = reprlib.Repr()
_repr.maxother = _repr.maxstring = 160


def show(x: Any) -> str:
    """A short `repr` on one line, for error messages: models and arrays are long."""
    return " ".join(_repr.repr(x).split())
