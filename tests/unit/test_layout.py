"""The installed package is the whole of the source tree."""

import ast
import importlib
import itertools
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

import gddim_eqx as gd

from ..conftest import are_known


_root = pathlib.Path(__file__).parents[2]

# What each room may import, beside files that lie in none. Rooms never import each other
# in a circle, as each stands after those that it imports.
_rooms = {
    "_misc": set(),
    "_linear": {"_misc"},
    "_process": {"_misc", "_linear"},
    "_term": {"_misc", "_linear", "_process"},
    "_exponential": {"_misc", "_linear", "_process", "_term"},
    "_model": {"_misc", "_linear", "_process", "_term"},
    "solvers": {"_misc", "_linear", "_process", "_term", "_exponential"},
    "_sampling": {
        *("_misc", "_linear", "_process", "_term", "_exponential", "_model", "solvers")
    },
    "nn": {"_misc", "_linear", "_process", "_term", "_model"},
    "training": {"_misc", "_linear", "_process", "_term", "_model"},
    "checkpoints": {
        *("_misc", "_linear", "_process", "_term", "_model", "solvers", "_sampling"),
        "nn",
    },
    "metrics": {"_misc", "nn", "checkpoints"},
}


def _imported(text, room):
    """The modules in rooms that the text of a file in a room imports, split into parts."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["gddim_eqx", room][: 3 - node.level] if node.level else []
            module = [*package, *filter(None, (node.module or "").split("."))]
            names = [module]
            if module == ["gddim_eqx"]:
                names = [[*module, alias.name] for alias in node.names]
        for parts in names:
            if parts[0] == "gddim_eqx" and len(parts) > 1 and parts[1] in _rooms:
                yield parts[1:]


@pytest.mark.parametrize("room", _rooms)
def test_rooms_import_only_those_below(room):
    allowed = _rooms[room]
    assert allowed <= set(itertools.takewhile(lambda x: x != room, _rooms))
    for path in (_root / "gddim_eqx" / room).glob("*.py"):
        others = [x for x in _imported(path.read_text(), room) if x[0] != room]
        assert {x[0] for x in others} <= allowed, path
        # Only what is exported.
        assert all(len(x) == 1 for x in others), (path, others)


@pytest.mark.parametrize(
    "text",
    [
        "from .. import solvers",
        "from ..solvers import GDDIM",
        "from gddim_eqx import solvers",
        "import gddim_eqx.solvers",
        "from gddim_eqx.solvers import GDDIM",
    ],
)
def test_every_kind_of_import_is_seen(text):
    assert list(_imported(text, "_term")) == [["solvers"]]


def test_every_folder_is_a_room():
    folders = {path.parent for path in (_root / "gddim_eqx").glob("*/__init__.py")}
    assert {folder.name for folder in folders} == set(_rooms)


def test_every_package_is_listed_for_installation():
    settings = tomllib.loads((_root / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {"gddim_eqx.solvers"} | {
        ".".join(path.parent.relative_to(_root).parts)
        for path in (_root / "gddim_eqx").rglob("__init__.py")
    }
    assert listed == found


def test_the_link_to_the_solvers_is_in_place():
    link = _root / "gddim_eqx" / "solvers"
    assert link.resolve() == (_root / "solvers").resolve()


def test_solvers_are_importable_in_one_way_only():
    assert importlib.import_module("gddim_eqx.solvers").GDDIM is gd.GDDIM
    command = [sys.executable, "-c", "import solvers"]
    result = subprocess.run(command, cwd=_root, capture_output=True, text=True)
    assert "Import this package as `gddim_eqx.solvers`" in result.stderr


def test_the_private_name_of_diffrax_is_still_there():
    from diffrax._term import WrapTerm

    from gddim_eqx._term import unwrap

    term = gd.ProbabilityFlow(gd.VP((2,)), lambda t, u, args: u)
    assert unwrap(term) == (term, 1)
    inner, direction = unwrap(WrapTerm(WrapTerm(term, -1), -1))
    assert inner is term and direction == 1


def test_flags_that_xla_lacks_are_left_out():
    # It would end the process, and all workers with it.
    assert not are_known("--xla_no_such_flag=1")
    assert are_known(*os.environ["XLA_FLAGS"].split())


def test_nothing_but_the_declared_dependencies_is_imported():
    forbidden = {"matplotlib", "scipy.integrate", "sklearn", "tqdm", "flax", "torch"}
    program = f"import sys, gddim_eqx\nprint(sorted(set(sys.modules) & {forbidden!r}))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
