from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array


def map_rows(function: Callable[[str, Array], Array], model: Any) -> Any:
    """Apply a function to the arrays of a model that have one row per sample. Models have
    them by name in a property `rows`, and may contain others.

    **Arguments:**

    - `function`: called with a name and an array.
    - `model`: a model.
    """
    if _has_rows(model):
        for name, x in model.rows.items():
            at = lambda model, name=name: getattr(model, name)
            where = f"`{name}` of `{type(model).__name__}`"
            model = eqx.tree_at(at, model, function(where, x))
    inner = lambda x: map_rows(function, x) if _has_rows(x) else x
    is_inner = lambda x: x is not model and _has_rows(x)
    return jtu.tree_map(inner, model, is_leaf=is_inner)


def _has_rows(x: Any) -> bool:
    return isinstance(x, eqx.Module) and hasattr(type(x), "rows")
