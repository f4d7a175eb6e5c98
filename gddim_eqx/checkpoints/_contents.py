import collections
import dataclasses
import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np


def contents(tree: Any, constant: type) -> Iterator[tuple[str, Any, str]]:
    """What a pytree holds and, as far as Python can tell, what its functions and objects
    hold: arrays, constants, functions and other objects.

    The global variables of functions are searched, except in installed packages. Global
    arrays that methods of classes use are taken for constants, and left out.

    **Arguments:**

    - `tree`: a pytree.
    - `constant`: objects of this class have no parameters: their arrays are constants.

    **Returns:** triples of a path, as by `jax.tree_util.keystr` with captured variables in
    angle brackets, a value, and where it is: `"leaf"` in the pytree; `"fixed"` in a static
    field, or captured by a function; `"constant"` for an array that is so in a process;
    `"within"` other objects.
    """
    # By identity, and kept alive so that identities stay unique.
    seen: dict[int, Any] = {}

    def is_new(x: Any) -> bool:
        new = id(x) not in seen
        seen[id(x)] = x
        return new

    def search(
        path: str, value: Any, place: str, inside: str | None
    ) -> Iterator[tuple[str, Any, str]]:
        inside = "constant" if isinstance(value, constant) else inside
        if is_constant(value):
            yield path, value, place
        elif is_weights(value):
            if inside == "constant" and place == "fixed":
                yield path, value, "constant"
            elif not (inside and isinstance(value, np.ndarray) or inside == "constant"):
                yield path, value, place
        elif place == "leaf" or is_new(value):
            yield path, value, place
            for name, part, its in _parts(value):
                its = place if its == "leaf" else its
                yield from search(path + name, part, its, inside)
            cls = type(value)
            for name, part in _in_methods(cls) if is_new(cls) else ():
                yield from search(path + name, part, "within", "method")

    return search("", tree, "leaf", None)


def is_array(x: Any) -> bool:
    """Whether this is an array that JAX knows, or the shape of one."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_weights(x: Any) -> bool:
    """Whether this is an array of any library."""
    names = "shape", "dtype", "__array__"
    foreign = all(hasattr(type(x), name) for name in names) and jtu.all_leaves([x])
    return is_array(x) or (foreign and not isinstance(x, np.generic))


def is_constant(x: Any) -> bool:
    """Whether this is `None`, a string or a number that is no array."""
    return x is None or isinstance(x, bool | int | float | complex | str | np.generic)


def _parts(x: Any) -> Iterator[tuple[str, Any, str]]:
    if isinstance(x, dict):
        yield from ((f"[{key!r}]", part, "leaf") for key, part in x.items())
        return
    if isinstance(x, type | types.ModuleType):
        return
    if jtu.all_leaves([x]):
        yield from _captured(x)
        return
    leaves, treedef = jtu.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    yield from ((jtu.keystr(path), part, "leaf") for path, part in leaves)
    if isinstance(x, eqx.Module):
        names = [f.name for f in dataclasses.fields(x) if f.metadata.get("static", False)]
        present = [name for name in names if hasattr(x, name)]
        yield from ((f".{name}", getattr(x, name), "fixed") for name in present)
    elif not isinstance(x, list | tuple):
        yield "<static>", (treedef.node_data() or (None, None))[1], "fixed"


def _captured(x: Any) -> Iterator[tuple[str, Any, str]]:
    """What functions and objects hold that are no pytrees."""
    attributes = getattr(x, "__dict__", {})
    if isinstance(x, types.FunctionType):
        yield from ((f"<{name}>", part, "fixed") for name, part in _variables(x))
    elif isinstance(x, functools.partial):
        yield "", x.func, "fixed"
        parts = [*enumerate(x.args), *x.keywords.items()]
        yield from ((f"<{name}>", part, "fixed") for name, part in parts)
    elif isinstance(x, _method_types):
        yield "<self>", x.__self__, "within"
        yield "", getattr(x, "__func__", None), "fixed"
    elif "__wrapped__" in attributes:
        yield "", attributes["__wrapped__"], "fixed"
    elif isinstance(x, set | frozenset | collections.deque):
        yield from ((f"[{i}]", part, "within") for i, part in enumerate(x))
    elif _package(type(x).__module__) not in _without_parameters:
        slots = [name for c in type(x).__mro__ for name in getattr(c, "__slots__", ())]
        found = attributes | {name: getattr(x, name, None) for name in slots}
        yield from ((f".{name}", part, "within") for name, part in found.items())


_method_types = types.MethodType, types.BuiltinMethodType, types.MethodWrapperType


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of a function that are not its own, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # Not assigned yet.
            continue
    yield from ((f"default {i}", x) for i, x in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    if not _is_installed(function.__globals__):
        yield from _globals(function.__code__, function.__globals__)


def _globals(code: types.CodeType, variables: dict) -> Iterator[tuple[str, Any]]:
    reads = (x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL")
    for name in set(reads) & variables.keys():
        value = variables[name]
        if isinstance(value, types.ModuleType) and not _is_installed(vars(value)):
            used = vars(value).keys() & code.co_names
            yield from ((f"{name}.{x}", vars(value)[x]) for x in sorted(used))
        else:
            yield name, value
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _globals(inner, variables)


def _in_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The variables of the methods of a class that are not their own, but for arrays."""
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and _is_installed(vars(module)):
            continue
        for name, method in vars(base).items():
            for wrapper in ("fget", "__func__", "__wrapped__"):
                method = getattr(method, wrapper, method)
            if isinstance(method, types.FunctionType):
                found = ((x, y) for x, y in _variables(method) if not is_weights(y))
                yield from ((f".{name}<{x}>", part) for x, part in found)


# Whose objects hold no parameters, but possibly many others, as loggers do.
_without_parameters = {"jax", "jaxlib", "numpy", *sys.stdlib_module_names} - {"types"}


def _package(module: str) -> str:
    return module.split(".")[0]


def _is_installed(module: dict[str, Any]) -> bool:
    """Whether a module, given by its variables, is of Python or an installed package."""
    if _package(str(module.get("__name__"))) in ("builtins", _package(__name__)):
        return True
    file = str(module.get("__file__"))
    return "-packages" in file or file.startswith(sysconfig.get_path("stdlib"))
