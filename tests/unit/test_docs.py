"""What the documentation says, runs, and all that is public is in it."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import gddim_eqx as gd


_root = pathlib.Path(__file__).parents[2]
_sources = sorted((_root / "docs").rglob("*.md"))
_api = [path for path in _sources if path.parent.name == "api"]
_pages = [path for path in _sources if path not in _api]
_others = [_root / name for name in ("README.md", "CONTRIBUTING.md")]
_fence = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def _blocks(path: pathlib.Path, language: str) -> list[str]:
    return [code for name, code in _fence.findall(path.read_text()) if name == language]


def _name(path: pathlib.Path) -> str:
    return path.relative_to(_root).as_posix()


@pytest.mark.float32
@pytest.mark.parametrize(
    "path", [path for path in _pages if _blocks(path, "python")], ids=_name
)
def test_code_on_pages_runs(path, tmp_path, monkeypatch, as_users_have_it):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if any("from flax" in code for code in _blocks(path, "python")):
        pytest.importorskip("flax")
    names = {"__name__": "page"}
    for n, code in enumerate(_blocks(path, "python"), start=1):
        exec(compile(code, f"{_name(path)}, block {n}", "exec"), names)


def test_all_code_is_of_a_kind_that_is_tested():
    """Python runs, above and in `test_readme.py`; commands are checked below."""
    found = {}
    for path in (*_pages, *_others):
        for language, _ in _fence.findall(path.read_text()):
            found[language] = found.get(language, 0) + 1
    assert set(found) == {"python", "bash", "text", "bibtex"}, found
    assert found["python"] > 60


def _options(script: str) -> str:
    """The help of a script, and of each of its presets."""
    command = [sys.executable, str(_root / script)]
    text = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    if script == "examples/train.py":
        other = [*command, "digits", "--help"]
        text += subprocess.run(other, capture_output=True, text=True).stdout
    return text


def test_commands_exist():
    makefile = (_root / "Makefile").read_text()
    extras = tomllib.loads((_root / "pyproject.toml").read_text())["project"]
    options: dict[str, str] = {}
    for path in (*_pages, *_others):
        lines = "\n".join(_blocks(path, "bash")).replace("\\\n", " ").splitlines()
        for line in lines:
            words = line.split("#")[0].split()
            if not words:
                continue
            where = f"{_name(path)}: {line}"
            if words[0] == "make":
                for target in words[1:]:
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), where
            elif "pip" in words:
                for extra in re.findall(r"\[([a-z,]+)\]", line):
                    known = {*extras["optional-dependencies"], "cuda13"}
                    assert set(extra.split(",")) <= known, where
            elif any(word.endswith(".py") for word in words):
                script = next(word for word in words if word.endswith(".py"))
                assert (_root / script).exists(), where
                if script not in options:
                    options[script] = _options(script)
                for option in re.findall(r"--[a-z][a-z.-]*", line):
                    assert option in options[script], where
            else:
                assert words[0] in ("cd", "git", "pre-commit", "export"), where


_modules = (
    *(gd, gd.nn, gd.nn.presets, gd.training, gd.metrics, gd.checkpoints),
    *(gd.results, gd.solvers),
)


def _public():
    for module in _modules:
        for name, value in vars(module).items():
            inside = getattr(value, "__module__", "").startswith("gddim_eqx")
            if not name.startswith("_") and inside and not inspect.ismodule(value):
                if module is gd.nn.presets:
                    own = value.__module__ == module.__name__
                else:
                    own = module is gd or getattr(gd, name, None) is not value
                if own:
                    yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(
    "module", (gd, gd.nn, gd.training, gd.metrics, gd.checkpoints, gd.solvers)
)
def test_nothing_but_the_library_s_own_is_public(module):
    of = lambda x: x.__name__ if inspect.ismodule(x) else x.__module__
    found = {of(x) for name, x in vars(module).items() if not name.startswith("_")}
    # jaxtyping is there because this suite checks types.
    assert {name.split(".")[0] for name in found} <= {gd.__name__, "jaxtyping"}


_results = (
    *("Moments", "NoisedBatch", "StepInfo", "TrainState", "FittedSolver", "Inversion"),
    *("Likelihood", "ModelConventions", "Samples", "Problem", "StepCoefficients"),
)


def test_all_public_names_are_documented():
    documented = re.findall(
        r"^::: (\S+)", "\n".join(path.read_text() for path in _api), re.MULTILINE
    )
    names = dict(_public())
    assert len(names) > 100
    assert set(documented) == set(names)
    assert len(documented) == len(set(documented))
    for name, value in names.items():
        assert (inspect.getdoc(value) or "").strip(), name
        # Shapes, ranges and errors are said argument by argument.
        if inspect.isfunction(value) and inspect.signature(value).parameters:
            assert "**Arguments:**" in value.__doc__ or "rguments as" in value.__doc__, name
        if inspect.isclass(value) and not inspect.isabstract(value):
            arguments = inspect.signature(value.__init__).parameters.keys() - {"self"}
            # Results describe their fields instead.
            if arguments - {"args", "kwargs"} and value.__name__ not in _results:
                docs = f"{value.__doc__}{value.__init__.__doc__}"
                assert "**Arguments:**" in docs, name


def _messages():
    """All strings of the library, with `...` for what is filled in."""
    paths = [*_root.glob("gddim_eqx/**/*.py"), *_root.glob("solvers/*.py")]
    paths += [_root / "examples" / name for name in ("common.py", "data.py", "train.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                yield "".join(x if isinstance(x, str) else "..." for x in parts)


def test_error_messages_are_quoted_literally():
    text = "\n".join(_messages())
    rows = re.findall(
        r"^\| (`+) ?(.+?) ?\1 (.*?)\|",
        (_root / "docs" / "reference" / "errors.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 30
    for _, message, remark in rows:
        if "Diffrax" not in remark:
            for part in message.split("..."):
                # A message may begin with the name of what it is about.
                words = part.split()
                ends = (" ".join(words[n:]) for n in range(min(3, len(words)) + 1))
                assert any(
                    end in text for end in ends if len(end) > 5 or end == part.strip()
                ), message


def test_the_version_to_cite_is_this_one():
    text = (_root / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [gd.__version__]


def test_tutorials_are_in_the_format_of_the_site():
    scripts = [*(_root / "docs").glob("*/*.py")]
    assert len(scripts) > 4
    for path in scripts:
        text = path.read_text()
        assert text.startswith("# %% [markdown]\n# # "), path
        assert "```" not in text, "Code that would not run."
        compile(text, str(path), "exec")
