"""The example of training, as a user runs it: also killed, stopped, and in parts."""

import dataclasses
import importlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import gddim_eqx as gd
from examples import data as data_sets

from ..helpers import if_interrupted


# It sets its own precision, so these need not run in both.
pytestmark = pytest.mark.x64

_script = pathlib.Path(__file__).parents[2] / "examples" / "train.py"
_environment = os.environ | {"JAX_ENABLE_X64": "0", "PYTHONWARNINGS": "default"}


def _start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, _script, *map(str, arguments)],
        env=_environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(*arguments, code=0, **environment):
    process = _start(*arguments, **environment)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out
    return out


def _arrays(output):
    with np.load(output / "model.npz") as file:
        return {name: file[name] for name in file.files}


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def _measured(output, name):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


# Few steps of a small network, with all that is written.
_few = ("toy", "--batch-size", 64, "--save-every", 5, "--log-every", 5)


def test_help_says_what_to_give():
    out = _run("--help")
    assert "toy" in out and "cifar10-cld" in out and "Table 4" in out
    out = _run("digits", "--help")
    for option in ("--steps", "--data.directory", "--optimiser.learning-rate", "--output"):
        assert option in out


def test_a_run_writes_what_it_says_and_goes_on(tmp_path):
    output = tmp_path / "run"
    out = _run(*_few, "--steps", 10, "--samples-every", 10, "--output", output)
    assert f"The model: {output / 'model.npz'}" in out
    assert "`--steps` 10 should be more than `--optimiser.warmup` 500" in out
    assert (output / "samples" / "0000010.png").stat().st_size > 1000
    flow = gd.checkpoints.load(output / "model.npz")
    assert isinstance(flow, gd.ProbabilityFlow) and flow.process == gd.CLD((2,))
    # How often it logs and saves may change.
    out = _run(*_few, "--steps", 15, "--save-every", 100, "--keep", 1, "--output", output)
    assert "Resuming from step 10" in out
    assert _measured(output, "step") == [5, 10, 15]
    out = _run(*_few, "--steps", 20, "--seed", 1, "--output", output, code=1)
    assert "another config" in out and "seed: 0 there, 1 here" in out


def test_labels_reach_the_model(tmp_path):
    options = ("--data.labels", "--steps", 3, "--optimiser.warmup", 1, "--batch-size", 8)
    options = (*options, "--samples-every", 3, "--output", tmp_path)
    _run("digits", *options, "--label-dropout", 0.2)
    assert (tmp_path / "samples" / "0000003.png").stat().st_size > 1000
    model = gd.checkpoints.load(tmp_path / "model.npz").model
    assert model.network.num_classes == model.no_condition == 10
    # Another dropout is another run.
    out = _run("digits", *options, code=1)
    assert "label_dropout: 0.2 there, 0.1 here" in out


# What is given, and what is said.
_refused = [
    (("cifar10-cld",), "cifar10 is read from files: give `--data.directory`"),
    (("cifar10-cld", "--data.directory", "/nowhere"), "/nowhere is not complete"),
    (("celeba-cld", "--data.directory", "/nowhere"), "/nowhere is not a directory"),
    (("toy", "--data.no-verify"), "rings is not verified: leave out"),
    (("toy", "--network.bfloat16"), "points does not have all .*argument 'dtype'"),
    (
        ("digits", "--predicts", "noise"),
        "`--network.precondition` is for `--predicts data`",
    ),
    (("digits", "--predicts", "v", "--weighting", "data"), "`--weighting data` is for"),
    (("digits", "--network.name", "celeba_cld"), r"of shape \(64, 64, 6\), but digits"),
    (
        ("digits", "--steps", 100),
        "`--steps` 100 should be more than `--optimiser.warmup` 100: .*cosine",
    ),
    (("toy", "--steps", 0), "`--steps` must be positive; got 0"),
    (("toy", "--batch-size", 0), "`batch_size` must be a positive integer; got 0"),
    (("toy", "--optimiser.ema-decay", 1), r"`ema_decay` must be in \[0, 1\); got 1"),
    (("toy", "--optimiser.learning-rate", "nan"), "`--optimiser.learning-rate` must"),
    (
        ("toy", "--optimiser.accumulate", 3),
        "1024 cannot be .* `--optimiser.accumulate`",
    ),
    (("toy", "--processes.number", 2), "need `--processes.coordinator`"),
    (("toy", "--seed", -1), "`seed` must be a non-negative integer; got -1"),
    (("toy", "--data.labels"), "The data 'rings' have no labels"),
    (("toy", "--label-dropout", 1), r"`--label-dropout` must be in \[0, 1\); got 1"),
    (("cifar10-cld", "--data.labels"), "cifar10 is read from files"),
    (("toy", "--data.size", 8), "`--data.size`, .* are for a folder, not for rings"),
    (("mnist",), "mnist(.|\n)*fashion-mnist"),
    (("toy", "--optimizer.learning-rate", 1), "--optimizer.learning-rate"),
]

# All in one process, as it takes seconds to start.
_program = """
import contextlib, io, json, sys
import train

for arguments in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            train.main(arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            out.write("" if isinstance(stop.code, int) else stop.code)
    print(json.dumps([code, out.getvalue()]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """For each case: the directory for output, the exit status, and what was printed."""
    outputs = [tmp_path_factory.mktemp("refused") / "run" for _ in _refused]
    given = [
        [*map(str, arguments), "--output", str(output)]
        for (arguments, _), output in zip(_refused, outputs)
    ]
    run = subprocess.run(
        [sys.executable, "-c", _program],
        input=json.dumps(given),
        env=_environment | {"PYTHONPATH": str(_script.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    answers = map(json.loads, run.stdout.splitlines())
    return [(output, *answer) for output, answer in zip(outputs, answers, strict=True)]


@pytest.mark.parametrize(
    "case", range(len(_refused)), ids=lambda i: " ".join(map(str, _refused[i][0]))
)
def test_what_cannot_be_trained_is_said(refusals, case):
    output, code, out = refusals[case]
    assert code in (1, 2)
    assert re.search(_refused[case][1], out) and "Traceback" not in out
    assert not output.exists()


def _lines(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_signals_save_and_the_run_comes_to_the_same(tmp_path):
    output, whole, step = tmp_path / "run", tmp_path / "whole", 0
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    for number in (signal.SIGTERM, *([] if ignored else [signal.SIGINT])):
        before = _lines(output)
        process = _start(*_few, "--steps", 100_000, "--output", output)
        while _lines(output) < before + 3:
            assert process.poll() is None and time.sleep(0.1) is None
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in out, out
        assert "Stopped at step" in out and "Run the same command again to resume." in out
        step, last = int(out.split("Stopped at step ")[1].split(".")[0]), step
        assert step > last and (output / "checkpoints" / str(step)).is_dir()
        assert gd.checkpoints.metadata(output / "model.npz")["step"] == step
        assert isinstance(gd.checkpoints.load(output / "model.npz"), gd.ProbabilityFlow)
    for directory in (output, whole):
        _run(*_few, "--steps", step + 10, "--output", directory)
    _assert_equal(_arrays(output), _arrays(whole))


def test_a_run_that_is_killed_leaves_its_model(tmp_path):
    process = _start(*_few, "--steps", 100_000, "--output", tmp_path)
    while _lines(tmp_path) < 3:
        assert process.poll() is None and time.sleep(0.1) is None
    process.kill()
    process.communicate()
    path = tmp_path / "model.npz"
    about = gd.checkpoints.metadata(path)
    assert about["step"] >= 10 and about["step"] % 5 == 0 and about["steps"] == 100_000
    assert isinstance(gd.checkpoints.load(path), gd.ProbabilityFlow)


@if_interrupted
def test_an_interrupt_before_training_is_no_traceback(tmp_path):
    process = _start("toy", "--output", tmp_path / "run")
    while not (tmp_path / "run").exists():
        assert process.poll() is None and time.sleep(0.01) is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    # Where training has begun, it saves.
    assert process.returncode in (0, 130) and "Traceback" not in out, out
    assert "Interrupted. " in out or "Stopped at step" in out


@pytest.mark.slow
def test_killed_ten_times_it_comes_to_the_same(tmp_path):
    options = ("digits", "--steps", 2000, "--save-every", 10, "--samples-every", 1000)
    _run(*options, "--output", tmp_path / "whole")
    draw, output, since = random.Random(0), tmp_path / "killed", []
    for _ in range(10):
        process = _start(*options, "--output", output)
        # From the beginning of Python on.
        time.sleep(draw.uniform(1, 15))
        assert process.poll() is None, "The run ended before it was killed often enough."
        process.kill()
        out, _ = process.communicate()
        since += re.findall("Resuming from step ([0-9]+)", out)
    print("Went on from", since)
    assert len(set(since)) >= 4
    _run(*options, "--output", output)
    _assert_equal(_arrays(tmp_path / "whole"), _arrays(output))
    assert _measured(output, "step") == _measured(tmp_path / "whole", "step")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_two(*options, timeout=10):
    port = _free_port()
    several = ("--processes.coordinator", f"127.0.0.1:{port}", "--processes.number", 2)
    several = (*several, "--processes.timeout", timeout)
    return [
        _start(*options, *several, "--processes.index", index, XLA_FLAGS="")
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_processes_train_and_go_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = (*_few, "--samples-every", 10)
    _run(*options, "--steps", 20, "--output", one)
    for steps in (10, 20):
        processes = _start_two(*options, "--steps", steps, "--output", two)
        outs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outs
    assert "Resuming from step 10" in outs[0] and outs[1].count("The model") == 0
    # Sums over the batch are in another order.
    first, second = _arrays(one), _arrays(two)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(_measured(one, "loss"), _measured(two, "loss"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", (signal.SIGTERM, pytest.param(signal.SIGINT, marks=if_interrupted))
)
def test_a_signal_to_one_of_two_processes_saves(tmp_path, number):
    output = tmp_path / "run"
    options = (*_few, "--shard-parameters", "--output", output)
    processes = _start_two(*options, "--steps", 1_000_000)
    path = output / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < 3:
        assert processes[0].poll() is None and time.sleep(0.1) is None
    processes[1].send_signal(number)
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    (step,) = re.findall("Stopped at step ([0-9]+)", outs[0])
    # One process reads what two have saved in parts.
    out = _run(*options, "--steps", int(step) + 5)
    assert f"Resuming from step {step}" in out and "The model" in out


@pytest.mark.slow
def test_one_process_that_dies_ends_the_other(tmp_path):
    options = (*_few, "--output", tmp_path / "run")
    for victim in (0, 1):
        processes = _start_two(*options, "--steps", 1_000_000)
        path = tmp_path / "run" / "checkpoints"
        known = {p.name for p in path.glob("[0-9]*")}
        while {p.name for p in path.glob("[0-9]*")} <= known:
            assert processes[0].poll() is None and time.sleep(0.2) is None
        processes[victim].kill()
        begin = time.monotonic()
        out, _ = processes[1 - victim].communicate(timeout=120)
        print(f"The other ended after {time.monotonic() - begin:.1f} s.")
        assert time.monotonic() - begin < 60
        assert processes[1 - victim].returncode != 0
        assert "another task died" in out or "another process died" in out
        processes[victim].communicate()
    done = max(int(p.name) for p in path.glob("[0-9]*") if p.name.isdigit())
    processes = _start_two(*options, "--steps", done + 10)
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert f"Resuming from step {done}" in outs[0]


@pytest.fixture
def train(monkeypatch):
    """The example, in this process."""
    monkeypatch.syspath_prepend(str(_script.parent))
    yield importlib.import_module("train")
    monkeypatch.delitem(sys.modules, "train")


def _folders(directory, change=lambda image: image, classes=("cat", "dog"), size=8):
    random = np.random.default_rng(0)
    for name in classes:
        (directory / name).mkdir(parents=True)
        for n in range(10):
            image = random.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(change(image)).save(directory / name / f"{n}.png")
    return directory


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """A run of three steps on two classes in colour, by a cosine schedule."""
    directory = tmp_path_factory.mktemp("classes")
    _folders(directory / "colours")
    given = ("--data.name", "folder", "--network.name", "mlp", "--data.labels")
    given = ("digits", *given, "--batch-size", 8, "--optimiser.warmup", 1)
    given = (*given, "--samples-every", 3)
    data = ("--data.directory", directory / "colours")
    out = _run(*given, *data, "--steps", 3, "--output", directory / "run")
    assert "Training on 18 images; the others are held out" in out
    return given, directory


def _refused_by(train, *arguments):
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, arguments)])
    return str(stop.value.code)


def test_a_run_goes_on_with_what_may_change_only(class_run, train, tmp_path):
    given, directory = class_run
    shutil.copytree(directory / "run", tmp_path / "run")
    grey = _folders(tmp_path / "grey", lambda x: np.repeat(x[..., :1], 3, -1))
    one = _folders(tmp_path / "one", lambda x: x[..., :1].squeeze())
    three = _folders(tmp_path / "three", classes=("cat", "dog", "eel"))
    named = _folders(tmp_path / "named", classes=("cat", "emu"))
    shutil.copytree(directory / "colours", tmp_path / "moved")
    shutil.copytree(directory / "colours", tmp_path / "fewer")
    (tmp_path / "fewer" / "dog" / "9.png").unlink()
    for data, *options, message in (
        (grey, "data.content: "),
        (one, "data.content: "),
        (one, "--data.channels", 1, r"data.shapes: \[\[18, 8, 8, 3\].* \[\[18, 8, 8, 1\]"),
        (three, r"classes: \['cat', 'dog'\] there, \['cat', 'dog', 'eel'\] here"),
        (named, r"classes: \['cat', 'dog'\] there, \['cat', 'emu'\] here\)"),
        (tmp_path / "fewer", r"data.shapes: \[\[18, 8, 8, 3\], \[18\]\] there, \[\[17"),
        (tmp_path / "moved", "--data.held-out", 0.2, r"data.shapes: .* there, \[\[16"),
        (
            tmp_path / "moved",
            "--data.flip",
            r"config \(data.flip: False there, True here\)",
        ),
        (tmp_path / "moved", "--batch-size", 16, "batch_size: 8 there, 16 here"),
        (
            *(tmp_path / "moved", "--optimiser.learning-rate", 1e-3),
            r"config \(optimiser.learning_rate: 0.002 there, 0.001 here\)",
        ),
        (tmp_path / "moved", "--label-dropout", 0.2, "label_dropout: 0.1 there, 0.2 here"),
        (
            *(tmp_path / "moved", "--init", tmp_path / "run" / "model.npz"),
            r"config \(init: None there, '[0-9a-f]{64}' here\)",
        ),
    ):
        options = (*options, "--output", tmp_path / "run", "--steps", 5)
        options = ("--data.directory", data, *options)
        assert re.search(message, _refused_by(train, *given, *options))
    # More steps of a cosine schedule, elsewhere, logged more often.
    options = ("--data.directory", tmp_path / "moved", "--output", tmp_path / "run")
    options = (*given, *options, "--log-every", 1)
    assert "cosine schedule is now of 5 steps, not 3" in _run(*options, "--steps", 5)
    assert _measured(tmp_path / "run", "step")[-2:] == [4, 5]
    assert gd.checkpoints.metadata(tmp_path / "run" / "model.npz")["step"] == 5
    out = _run(*options, "--steps", 4)
    assert "has 5 steps already, more than `--steps` 4" in out and "The model" in out


def test_classes_are_kept_with_the_model_and_shown(class_run, train, monkeypatch):
    from matplotlib.figure import Figure

    _, directory = class_run
    path = directory / "run" / "model.npz"
    assert gd.checkpoints.metadata(path)["classes"] == ["cat", "dog"]
    assert train.is_finished(directory / "run") and not train.is_finished(directory)
    flow, drawn = gd.checkpoints.load(path), []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    asked = []
    sample = lambda *_, args, **__: (
        asked.append(args) or gd.results.Samples(np.zeros((48, 8, 8, 3)), 20)
    )
    monkeypatch.setattr(gd, "sample", sample)
    train.draw(directory / "x" / "x.png", flow, ("cat", "a $b", "dog"))
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["cat", "a $b", "dog"]
    np.testing.assert_array_equal(asked[0], np.repeat([0, 1, 2], 8))


def test_training_starts_from_a_model_of_the_same_network(class_run, train, tmp_path):
    given, directory = class_run
    path = directory / "run" / "model.npz"
    data = ("--data.directory", _folders(tmp_path / "other", lambda x: x // 2))
    options = (*data, "--init", path, "--output", tmp_path / "run", "--steps", 2)
    for change, message in (
        (
            ("--data.no-labels",),
            r"\(network: .*LabelEmbedding\(.* there, .*condition=None.* here\)",
        ),
        (("--process", "vp"), r"\(process: CLD\(.* there, VP\(.* here\)"),
        (("--network.no-precondition",), r"\(predicts: 'data' there, 'noise' here\)"),
        (
            ("--network.no-precondition", "--predicts", "data"),
            r"\(data_std: 0.5[0-9]* there, None here\)",
        ),
    ):
        out = _refused_by(train, *given, *options, *change)
        assert re.search(f"{path} is another model {message}", out)
        assert not (tmp_path / "run").exists()
    other = tmp_path / "other.npz"
    flow = gd.checkpoints.load(path)
    flow = gd.ProbabilityFlow(flow.process, flow.model, "data", "cholesky")
    gd.checkpoints.save(other, flow)
    out = _refused_by(train, *given, *options, "--init", other)
    assert "other.npz is another model (frame: 'cholesky' there, 'R' here)" in out
    gd.checkpoints.save(other, flow.model.network)
    out = _refused_by(train, *given, *options, "--init", other)
    assert "other.npz holds a TimeMLP, not a model" in out
    # A rate of almost zero leaves the parameters where they were.
    rate = ("--optimiser.learning-rate", 1e-30, "--network.name", "mlp")
    _run(*given, *options, *rate)
    new, old = (gd.checkpoints.load(x) for x in (tmp_path / "run" / "model.npz", path))
    assert new.model.data_std == old.model.data_std
    for a, b in zip(*map(jax.tree.leaves, (new, old)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_images_are_held_out_of_every_class(train, tmp_path):
    directory = _folders(tmp_path / "images", size=4)
    source = train.Source("folder", directory)
    images = data_sets.folder(directory)
    for share, number in ((None, 2), (0.25, 5), (0.5, 10)):
        source = dataclasses.replace(source, held_out=share)
        parts = [train.load(source, train=x) for x in (True, False)]
        assert len(parts[1]) == number
        both = np.concatenate(parts)
        assert sorted(map(bytes, both)) == sorted(map(bytes, images))
        labels, classes = train.load_labels(source)
        held_out, _ = train.load_labels(source, train=False)
        assert classes == ("cat", "dog") and len(labels) == 20 - number
        assert np.abs(np.bincount(held_out) - number / 2).max() <= 0.5
    # None, or a second folder.
    whole = dataclasses.replace(source, held_out=0)
    np.testing.assert_array_equal(train.load(whole), images)
    with pytest.raises(ValueError, match="folder has no test set"):
        train.load(whole, train=False)
    second = _folders(tmp_path / "second", classes=("dog",), size=4)
    source = train.Source("folder", directory, test=second)
    np.testing.assert_array_equal(train.load(source), images)
    assert train.load(source, train=False).shape == (10, 4, 4, 3)
    assert train.load_labels(source, train=False)[0].tolist() == [1] * 10
    few = _folders(tmp_path / "few", classes=("cat", "dog"), size=4)
    for path in (few / "dog").iterdir():
        if path.name != "0.png":
            path.unlink()
    source = train.Source("folder", few, held_out=0.95)
    with pytest.raises(ValueError, match="All images of the class .* are held out"):
        train.load_labels(source)
    grey = train.load(train.Source("folder", directory, channels=1, held_out=0))
    assert grey.shape == (20, 4, 4, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="folder"), "folder is read from files"),
        (dict(name="folder", held_out=1.0), r"`--data.held-out` must be in \[0, 1\)"),
        (dict(name="packed", held_out=0.1), "pack a second folder: `--data.test`"),
        (dict(name="digits", channels=1), "are for a folder, not for digits"),
        (
            dict(
                name="folder",
                directory=pathlib.Path("x/train"),
                test=pathlib.Path("x/../x/train/test"),
            ),
            "must not be in `--data.directory` x/train: it would be trained on",
        ),
        (dict(name="rings", test="second"), "are for a folder, not for rings"),
    ],
)
def test_sources_that_do_not_exist_are_refused(train, options, message):
    if options["name"] == "packed" or "held_out" in options:
        options = options | {"directory": "images"}
    with pytest.raises(ValueError, match=message):
        train.load(train.Source(**options))


def test_the_size_of_packed_images_is_checked(train, tmp_path):
    load, Source = train.load, train.Source
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((4, 8, 8, 3), np.uint8))
    # As by the preset for CELEBA, which has both.
    assert load(Source("packed", path, size=8, crop=140)).shape == (4, 8, 8, 3)
    with pytest.raises(ValueError, match="images of 8 x 8, and `--data.size` is 64"):
        load(Source("packed", path, size=64))
    with pytest.raises(ValueError, match="of 3 channels, and `--data.channels` is 1"):
        load(Source("packed", path, channels=1))
