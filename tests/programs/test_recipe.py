"""The commands of docs/cifar10.md, as they stand there, with small files and networks."""

import json
import pathlib
import pickle
import re
import shlex
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import gddim_eqx as gd

from ..helpers import slow


# Networks are trained and sampled from as users do it.
# Two steps of training: wild samples, and an average of initial parameters.
pytestmark = [
    pytest.mark.float32,
    pytest.mark.filterwarnings("ignore:The samples have a root", "ignore:After . steps"),
]

_root = pathlib.Path(__file__).parents[2]
_authors = _root / "tests" / "fixtures" / "ncsnpp_fourier_fir"
_text = (_root / "docs" / "cifar10.md").read_text()
_commands = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", _text, re.DOTALL)
    for line in block.splitlines()
    if "examples/" in line
]

# Given last, these win. Everything else is as in the recipe.
_small = {
    "train.py": (
        *("--network.name", "mlp", "--steps", "2", "--batch-size", "8"),
        *("--samples-every", "0"),
    ),
    "evaluate.py": (
        *("--number", "6", "--batch-size", "8"),
        *("--features", "pixels", "--evaluations", "3", "--cache", "cache"),
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What the recipe says to fetch, but small."""
    directory = tmp_path_factory.mktemp("recipe")
    data, random = directory / "data", np.random.default_rng(0)
    data.mkdir()
    batches = directory / "cifar-10-batches-py"
    batches.mkdir()
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        batch = {b"data": random.integers(0, 256, (4, 3072), np.uint8), b"labels": [0] * 4}
        (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
    with tarfile.open(data / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches, batches.name)
    (data / "img_align_celeba").mkdir()
    for n in range(1, 9):
        pixels = random.integers(0, 256, (218, 178, 3), np.uint8)
        Image.fromarray(pixels).save(data / "img_align_celeba" / f"{n:06d}.jpg")
    for process in ("cld", "bdm"):
        (data / process).mkdir()
        shutil.copy(_authors / "checkpoint_7", data / process / "checkpoint_15")
    return directory


def _few_pixels(self, images):
    """One pixel in 64, as the distance of all of them takes a minute."""
    return images[:, ::8, ::8].reshape(len(images), -1) / np.float32(127.5) - 1


def _run(command, directory, monkeypatch):
    script = pathlib.Path(command[1])
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(_root / script.parent)
    module = __import__(script.stem)
    monkeypatch.setattr(gd.metrics.Pixels, "__call__", _few_pixels)
    if "--weights" in command:  # Which nobody has here.
        i = command.index("--weights")
        command = command[:i] + command[i + 2 :]
    # The files are not the published ones, and a folder has none.
    celeba = any("celeba" in x for x in command)
    own = ["--data.size", "16"] if celeba else ["--data.no-verify"]
    module.main([*command[2:], *_small[script.name], *own])
    monkeypatch.delitem(sys.modules, script.stem)


def test_the_recipe_has_the_paper_s_runs():
    assert [command[1:3] for command in _commands[:3]] == [
        ["examples/train.py", name] for name in ("cifar10-cld", "cifar10-bdm", "celeba-cld")
    ]
    assert len(_commands) == 8


# Which the other tests replace by a smaller size.
def test_images_are_measured_as_they_are_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(_root / "examples")
    _, config = __import__("train").PRESETS["celeba-cld"]
    monkeypatch.delitem(sys.modules, "train")
    (measure,) = (c for c in _commands[3:] if "celeba" in " ".join(c))
    given = dict(zip(measure, measure[1:]))
    assert (given["--data.size"], given["--data.crop"]) == ("64", "140")
    assert (config.data.size, config.data.crop) == (64, 140)


@pytest.mark.parametrize("name", ["cifar10-bdm", "celeba-cld", *slow("cifar10-cld")])
def test_training_and_measuring(name, directory, monkeypatch):
    train, measure = (
        next(command for command in commands if name in " ".join(command))
        for commands in (_commands[:3], _commands[3:])
    )
    _run(train, directory, monkeypatch)
    _run(measure, directory, monkeypatch)
    output = directory / "runs" / name / "evaluation"
    _check(output, measure)


# The small network in the authors' format is one for CLD.
def test_measuring_the_authors_checkpoint(directory, monkeypatch):
    (command,) = (c for c in _commands if "cifar10_cld" in c)
    settings = str(_authors / "config.json")
    replaced = [settings if x == "cifar10_cld" else x for x in command]
    _run(replaced, directory, monkeypatch)
    _check(directory / "runs" / "authors-cld", command)


def test_the_authors_checkpoint_of_another_process_is_refused(directory, monkeypatch):
    (command,) = (c for c in _commands if "cifar10_bdm" in c)
    settings = str(_authors / "config.json")
    replaced = [settings if x == "cifar10_bdm" else x for x in command]
    with pytest.raises(SystemExit, match=r"\(3, 3, 6, 8\).*bdm needs 3 input channels"):
        _run(replaced, directory, monkeypatch)


def _check(output, command):
    found = json.loads((output / "results.json").read_text())
    assert found["protocol"]["pixels"] == "rounded to uint8, not resized"
    if "--samplers" in command:
        names = command[command.index("--samplers") + 1 : command.index("--evaluations")]
        found_names = [r["sampler"] for r in found["results"]]
        assert found_names == names
    for result in found["results"]:
        if result["outcome"] == "finite":
            assert result["frechet_distance"] > 0 and result["evaluations"] <= 3
    assert any(r["outcome"] == "finite" for r in found["results"])
    assert (output / "grid.png").stat().st_size > 1000
