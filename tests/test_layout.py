"""The installed package is the whole of the source tree."""

import importlib
import os
import pathlib
import subprocess
import sys
import tomllib

import gddim_eqx as gd

from .conftest import is_known


_root = pathlib.Path(__file__).parent.parent


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

    from gddim_eqx._diffrax_compat import unwrap

    term = gd.ProbabilityFlow(gd.VP((2,)), lambda t, u, args: u)
    assert unwrap(term) == (term, 1)
    inner, direction = unwrap(WrapTerm(WrapTerm(term, -1), -1))
    assert inner is term and direction == 1


def test_flags_that_xla_lacks_are_left_out():
    # It would end the process, and all workers with it.
    assert not is_known("--xla_no_such_flag=1")
    assert all(map(is_known, os.environ["XLA_FLAGS"].split()))


def test_nothing_but_the_declared_dependencies_is_imported():
    forbidden = {"matplotlib", "scipy.integrate", "sklearn", "tqdm", "flax", "torch"}
    program = f"import sys, gddim_eqx\nprint(sorted(set(sys.modules) & {forbidden!r}))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
