"""Every benchmark runs, in little."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest


_directory = pathlib.Path(__file__).parents[2] / "benchmarks"
_with_output = {
    "fashion_mnist",
    "fashion_mnist_classes",
    "learned_solvers",
    "paper_tables",
    "semilinear",
    "work_precision",
}

# All in one process, as it takes seconds to start. Output is captured by the descriptor, as
# some of them start processes of their own.
_program = """
import json, os, runpy, sys, traceback
import jax

for name, *sys.argv in json.load(sys.stdin):
    # As a user has it, but for those that ask for double precision.
    jax.config.update("jax_enable_x64", False)
    with open(name + ".out", "w") as out:
        os.dup2(out.fileno(), 1)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
"""


@pytest.mark.x64  # Once is enough.
def test_every_benchmark_runs_quickly(tmp_path):
    scripts = []
    for path in sorted(_directory.glob("*.py")):
        output = ["--output", str(tmp_path)] if path.stem in _with_output else []
        scripts.append([path.stem, str(path), "--quick", *output])
    run = subprocess.run(
        [sys.executable, "-c", _program],
        input=json.dumps(scripts),
        env=os.environ | {"PYTHONPATH": str(_directory)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(scripts) > 9
    for name, *_ in scripts:
        out = (tmp_path / f"{name}.out").read_text()
        assert "Traceback" not in out, (name, out)
        # There are numbers, of which none is lost.
        assert re.search("[0-9]", out), (name, out)
        assert "nan" not in out.lower() and "failed" not in out, (name, out)
