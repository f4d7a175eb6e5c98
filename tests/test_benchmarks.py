"""Every benchmark runs, in little."""

import os
import pathlib
import subprocess
import sys

import pytest


pytestmark = pytest.mark.x64  # Once is enough.

_scripts = sorted((pathlib.Path(__file__).parents[1] / "benchmarks").glob("*.py"))
_with_output = {"fashion_mnist", "paper_tables", "work_precision"}


@pytest.mark.parametrize("script", _scripts, ids=lambda path: path.stem)
def test_runs_quickly(script, tmp_path):
    options = ["--quick"]
    if script.stem in _with_output:
        options += ["--output", tmp_path]
    # As a user has it: in single precision, but for those that ask for double.
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    command = [sys.executable, script, *options]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    out, error = run.stdout.decode(), run.stderr.decode()
    assert run.returncode == 0, error
    # There are numbers, of which none is lost.
    lines = [line for line in out.splitlines() if any(map(str.isdigit, line))]
    assert lines, out
    assert "nan" not in out.lower() and "failed" not in out, out
