"""What the README says, runs."""

import inspect
import json
import operator
import pathlib
import re
import subprocess
import sys
import textwrap

import gddim_eqx as gd


_readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


# The shape of `x` in each.
_examples = ((64, 2), (64, 2), (10, 28, 28, 1))


def test_the_usage_examples_run_as_written(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", _readme, re.DOTALL)
    # Each has its own names, but all are in one process, as it takes seconds to start.
    program = "import json, sys\nfor text in json.load(sys.stdin):\n    exec(text, {})"
    texts = []
    for text, shape in zip(examples, _examples, strict=True):
        assert len(text.strip().splitlines()) <= 21
        check = f"\nassert x.shape == {shape} and bool((abs(x) < 10).all())\n"
        texts.append(text + check)
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, input=json.dumps(texts), text=True, check=True, cwd=tmp_path)


def test_everything_that_is_named_exists():
    names = re.findall(r"`gd\.([A-Za-z0-9_.]+)", _readme)
    assert {"GDDIM", "to_uint8", "checkpoints.save"} < set(names)
    for name in names:
        assert operator.attrgetter(name)(gd), name


def test_files_that_are_linked_exist():
    root = pathlib.Path(__file__).parents[2]
    for link in re.findall(r"\]\(([^)]+)\)", _readme):
        assert link.startswith("https://") or (root / link).exists(), link


def test_examples_in_docstrings_are_python():
    found = 0
    for owner in (gd, gd.nn, gd.training, gd.metrics, gd.checkpoints):
        for value in vars(owner).values():
            text = inspect.getdoc(value) or ""
            for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                compile(textwrap.dedent(code), "docstring", "exec")
                found += 1
    assert found > 5
