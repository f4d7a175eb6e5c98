"""What the README says, runs."""

import operator
import pathlib
import re
import subprocess
import sys

import gddim_eqx as gd


_readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_usage_example_runs_as_written():
    (example,) = re.findall(r"```python\n(.*?)```", _readme, re.DOTALL)
    assert len(example.strip().splitlines()) <= 16
    check = "\nassert x.shape == (64, 2) and jnp.isfinite(x).all()\n"
    subprocess.run([sys.executable, "-W", "error", "-c", example + check], check=True)


def test_everything_in_the_tables_exists():
    names = re.findall(r"^\| `([A-Za-z_.]+)", _readme, re.MULTILINE)
    assert {"VP", "LinearSDE", "GDDIM", "nn.NCSNpp"} < set(names)
    for name in names:
        if not name.startswith("dfx."):
            assert operator.attrgetter(name)(gd), name


def test_files_that_are_linked_exist():
    root = pathlib.Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)]+)\)", _readme):
        assert link.startswith("https://") or (root / link).exists(), link
