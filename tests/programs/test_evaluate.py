"""The example that measures models, as a user runs it."""

import importlib
import json
import pathlib
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import PIL.Image
import pytest

import gddim_eqx as gd
from examples import data as data_sets


# Networks that were hardly trained draw wild samples.
pytestmark = [
    pytest.mark.float32,
    pytest.mark.filterwarnings("ignore:The samples have a root"),
]

_examples = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def evaluate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_examples)
        module = importlib.import_module("evaluate")
        patch.setattr(module, "_per_part", 8)
        yield module
        for name in ("evaluate", "data", "common"):
            patch.delitem(sys.modules, name)


def _save(path, process, change=lambda x: x):
    height, width, channels = process.shape
    shape = (height, width, process.num_components * channels)
    key = jax.random.key(0)
    network = gd.nn.TimeMLP(shape, process.shape, key=key, width=16, depth=1)
    model = gd.nn.NetworkModel(process, network, data_std=0.7)
    model = jtu.tree_map(lambda x: change(x) if isinstance(x, jax.Array) else x, model)
    gd.checkpoints.save(path, model)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("model") / "model.npz", gd.CLD((8, 8, 1)))


@pytest.fixture
def run(evaluate, model, tmp_path):
    def run(*arguments, path=model):
        arguments = dict(
            zip(arguments[::2], arguments[1::2], strict=True)
        )  # The last one wins.
        arguments = {
            "--data.name": "digits",
            "--features": "pixels",
            "--number": 20,
            "--batch-size": 8,
            "--samplers": ["euler"],
            "--evaluations": [3],
            "--output": tmp_path / "output",
            "--cache": tmp_path / "cache",
        } | arguments
        arguments = {k: v for k, v in arguments.items() if v is not None}
        command = [str(path)]
        for name, value in arguments.items():
            values = value if isinstance(value, list) else [value]
            command += [name, *map(str, values)]
        evaluate.main(command)
        return json.loads((tmp_path / "output" / "results.json").read_text())

    return run


def test_writes_what_it_says(run, tmp_path, capsys):
    found = run("--samplers", ["euler", "tsit5", "sscs"], "--evaluations", [3, 7])
    protocol = found["protocol"]
    assert protocol["frechet_distance"] == "Frechet distance of pixels"
    assert protocol["number_of_samples"] == 20
    assert protocol["against"] == "train, 1797 images"
    assert protocol["pixels"] == "rounded to uint8, not resized"
    outcomes = {(r["sampler"], r["budget"]): r for r in found["results"]}
    assert outcomes["tsit5", 3]["outcome"] == "impossible"
    for cell in (("euler", 3), ("euler", 7), ("tsit5", 7), ("sscs", 3)):
        assert outcomes[cell]["outcome"] == "finite"
        assert outcomes[cell]["evaluations"] == cell[1]
        for name in ("frechet_distance", "sliced_wasserstein"):
            assert outcomes[cell][name] > 0
        assert 0 <= outcomes[cell]["precision"] <= 1
    out = capsys.readouterr().out
    assert "| evaluations | 3 | 7 |" in out and "| Euler | " in out and "SSCS" in out
    assert "Not possible: tsit5 with 3.\n" in out
    assert (tmp_path / "output" / "grid.png").stat().st_size > 1000
    assert not (tmp_path / "output" / "parts").exists()


def test_the_measures_are_those_of_the_samples(run, tmp_path, model):
    found = run("--keep-images", [], "--seeds", 3)["results"][0]
    with np.load(tmp_path / "output" / "images-euler-3-3.npz") as file:
        images = file["images"]
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8
    metrics, features = gd.metrics, gd.metrics.Pixels()
    reference = metrics.reference(data_sets.digits(), features)
    samples, data = features(images), reference.vectors[:20]
    precision, recall = metrics.precision_recall(samples, data)
    expected = {
        "frechet_distance": metrics.frechet_distance(samples, reference.moments),
        "kernel_distance": metrics.kernel_distance(samples, data, 20, 20).mean,
        "sliced_wasserstein": metrics.sliced_wasserstein(samples, data),
        "precision": precision,
        "recall": recall,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    # Drawn by hand.
    x, _ = _draw(gd.checkpoints.load(model), 3, jax.random.key(3), number=20)
    difference = gd.to_uint8(x).astype(int) - images
    assert np.abs(difference).max() <= 1


def _draw(model, steps, key, grid="clock", number=8, predicts="data", frame="R", **options):
    process = model.process
    return gd.sample(
        gd.ProbabilityFlow(process, model, predicts, frame),
        key,
        number,
        solver=importlib.import_module("evaluate").SAMPLERS["euler"].solver,
        ts=gd.time_grid(process, steps, grid),
        **options,
    )


def test_samples_are_of_the_whole_model_and_denoised(run, tmp_path):
    # What a file says of predictions and their frame is kept to.
    network = gd.nn.TimeMLP((8, 8, 2), width=16, depth=1, key=jax.random.key(0))
    network = gd.nn.NetworkModel(gd.CLD((8, 8, 1)), network)
    flow = gd.ProbabilityFlow(network.process, network, "noise", "cholesky")
    gd.checkpoints.save(tmp_path / "model.npz", flow)
    options = ("--keep-images", [], "--denoise", "exact", "--grid", "quadratic")
    found = run(*options, path=tmp_path / "model.npz")
    assert found["protocol"]["denoise"] == "exact"
    assert found["protocol"]["grid"] == "quadratic"
    assert found["results"][0]["evaluations"] == 3
    drawn = dict(predicts="noise", frame="cholesky", denoise="exact")
    x, _ = _draw(network, 2, jax.random.key(0), "quadratic", **drawn)
    with np.load(tmp_path / "output" / "images-euler-3-0.npz") as file:
        difference = gd.to_uint8(x).astype(int) - file["images"][:8]
    assert np.abs(difference).max() <= 1


def test_labels_of_the_data_and_guidance(run, evaluate, tmp_path):
    network = gd.nn.TimeMLP(
        (8, 8, 1), key=jax.random.key(0), width=16, depth=1, num_classes=10
    )
    larger = lambda n: n.condition.weight
    network = eqx.tree_at(larger, network, 100 * larger(network))
    model = gd.nn.NetworkModel(gd.VP((8, 8, 1)), network, data_std=0.7)
    gd.checkpoints.save(path := tmp_path / "model.npz", model)
    options = ("--keep-images", [], "--samplers", ["euler"])
    options = (*options, "--guidance", 2.0, "--evaluations", [30])
    found = run(*options, path=path)
    assert found["protocol"]["guidance"] == 2.0
    assert [r["outcome"] for r in found["results"]] == ["finite"]
    # Two of each class, and guided by hand.
    data = data_sets.digits_labels()
    config = evaluate.Config(path, evaluate.Source("digits"), number=20)
    labels = evaluate.labels_of(config, gd.ProbabilityFlow(model.process, model, "data"))
    assert np.abs(np.bincount(labels) - 20 * np.bincount(data) / len(data)).max() < 1
    flow = gd.ProbabilityFlow(model.process, model)
    guided = gd.classifier_free_guidance(flow, gd.with_args(flow, 10), 2.0).model
    x, _ = _draw(guided, 30, jax.random.key(0), args=labels[:8])
    with np.load(tmp_path / "output" / "images-euler-30-0.npz") as file:
        difference = gd.to_uint8(x).astype(int) - file["images"][:8]
    assert np.abs(difference).max() <= 1
    with pytest.raises(SystemExit, match="another guidance"):
        run(*options, "--guidance", 1.0, path=path)


def _interrupted(run, evaluate, monkeypatch, number, *options, **path):
    """Stop after drawing so many batches."""
    draw, drawn = evaluate.Bench.draw, []

    def interrupted(self, *arguments):
        if len(drawn) == number:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Bench, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*options, **path)


def test_goes_on_where_it_was_stopped(run, evaluate, monkeypatch, tmp_path):
    options = ("--evaluations", [3, 4], "--seeds", [0, 1])
    whole = run(*options)
    (tmp_path / "output").rename(tmp_path / "whole")
    _interrupted(run, evaluate, monkeypatch, 5, *options)
    draw, drawn = evaluate.Bench.draw, []
    with monkeypatch.context() as patch:
        count = lambda self, *arguments: drawn.append(0) or draw(self, *arguments)
        patch.setattr(evaluate.Bench, "draw", count)
        assert run(*options) == whole
        assert len(drawn) == 4 * 3 - 5
        # More of it draws no more than that.
        more = run("--evaluations", [3, 4, 5], "--seeds", [0, 1])
        assert more["results"][:4] == whole["results"]
        assert len(drawn) == 6 * 3 - 5


def test_nothing_is_mixed_in_from_an_interrupted_run(run, evaluate, monkeypatch, tmp_path):
    other = _save(tmp_path / "other.npz", gd.CLD((8, 8, 1)), jnp.negative)
    expected = run(path=other)
    (tmp_path / "output").rename(tmp_path / "other")
    _interrupted(run, evaluate, monkeypatch, 2)
    with pytest.raises(SystemExit, match="measured with another model"):
        run(path=other)
    # Also not when the advice is followed.
    (tmp_path / "output" / "results.json").unlink()
    assert run(path=other) == expected


def test_results_of_something_else_are_not_mixed_in(run, evaluate, monkeypatch, tmp_path):
    before = run()
    for options, what in [
        (("--number", 30), "number_of_samples: 20 instead of 30"),
        (("--batch-size", 16), "batch_size: 8 instead of 16"),
        (("--denoise", "exact"), "denoise: None instead of 'exact'"),
        (("--grid", "quadratic"), "grid: 'that of each sampler' instead of 'quadratic'"),
    ]:
        with pytest.raises(SystemExit, match=f"measured with .*{what}.*`--output`"):
            run(*options)
    euler = evaluate.SAMPLERS["euler"]
    changed = evaluate.Sampler("Euler", euler.solver, grid="quadratic")
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.SAMPLERS, "euler", changed)
        with pytest.raises(SystemExit, match="another euler: .*grid clock.* instead of"):
            run()
    results = tmp_path / "output" / "results.json"
    assert json.loads(results.read_text()) == before


def test_samples_that_diverge_are_said_to(run, tmp_path, capsys):
    path = _save(tmp_path / "model.npz", gd.VP((8, 8, 1)), lambda x: x + jnp.nan)
    found = run("--samplers", ["heun", "euler", "sscs"], path=path)["results"]
    for result in found[:2]:
        assert result["outcome"] == "diverged" and "not finite" in result["message"]
        assert "frechet_distance" not in result
    assert found[2]["outcome"] == "impossible"
    out = capsys.readouterr().out
    assert "| Euler | diverged |" in out and "SSCS" not in out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--samplers", ["dpm"]), "No sampler 'dpm'. Choose from gddim, gddim-paper"),
        (("--number", 3), "`number` must be at least 4; got 3"),
        (("--seeds", [0, 0]), r"`seeds` must not .* duplicates; got \(0, 0\)"),
        (("--samplers", ["dopri5"]), "No sampler 'dopri5'"),
        (("--weights", "/nowhere"), "`weights` are for `--features inception`"),
        (("--process", "bdm"), "`process` is for `--authors`"),
        (("--data.size", 3), "`--data.size`, .* are for a folder, not for digits"),
        (("--data.directory", "/nowhere"), "digits is not read from files"),
        (("--evaluations", [0]), "`evaluations` and `batch_size` must be positive"),
        (("--features", "inception"), "is for images in colour, .* give `--weights`"),
        (
            ("--features", "classifier"),
            r"of shape \(28, 28, 1\); got \(8, 8, 1\). Use `--features pixels`",
        ),
        (
            ("--features", "inception", "--weights", "/nowhere"),
            "is for images in colour, .*Or use `--features pixels`",
        ),
        (("--like", "nowhere:f"), "module:name of a function; got 'nowhere:f'"),
        (("--like", "json:other"), "module:name of a function.*'other'"),
        (("--like", "json:__name__"), "must name a function; json:__name__ is 'json'"),
        (("--like", "json:dumps", "--authors", "x"), "`like` is not for `--authors`"),
        (("--against", "test"), "digits has no test set"),
        (("--guidance", 2), "`--guidance` needs a class-conditional model: .*model.npz"),
        (("--data.name", "rings"), "rings has no images"),
        (("--data.name", "cifar10"), "give `--data.directory`"),
        (("--data.name", "cifar10", "--data.directory", "/nowhere"), "Fetch cifar-10"),
        (("--authors", "mine"), "must be one of cifar10_cld.* or a file; got 'mine'"),
    ],
)
def test_bad_input_is_refused(run, options, message):
    with pytest.raises(SystemExit, match=message):
        run(*options)


def test_what_is_no_model_is_refused(run, tmp_path):
    classifier = gd.nn.ImageClassifier((8, 8, 1), 10, key=jax.random.key(0), features=(8,))
    gd.checkpoints.save(tmp_path / "classifier.npz", classifier)
    with pytest.raises(SystemExit, match="holds a ImageClassifier, not a model"):
        run(path=tmp_path / "classifier.npz")
    other = _save(tmp_path / "other.npz", gd.CLD((8, 6, 1)))
    match = r"data of shape \(8, 6, 1\); those of digits have \(8, 8, 1\)"
    with pytest.raises(SystemExit, match=match):
        run(path=other)


def _folder_of_colours(directory, number):
    directory.mkdir()
    random = np.random.default_rng(number)
    for n in range(number):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(directory / f"{n:03d}.png")
    return ("--data.name", "folder", "--data.directory", directory)


def test_what_to_compare_by_is_chosen_by_the_data(run, evaluate, tmp_path, capsys):
    found = run("--features", None)
    assert found["protocol"]["frechet_distance"] == "Frechet distance of pixels"
    assert "Features: pixels." in capsys.readouterr().err
    fashion = evaluate.Config(tmp_path, evaluate.Source("fashion_mnist"))
    assert evaluate.features_of(fashion) == "classifier"
    colours = _save(tmp_path / "colours.npz", gd.VP((8, 8, 3)))
    options = _folder_of_colours(tmp_path / "images", 4)
    options = (*options, "--data.held-out", 0)
    (tmp_path / "output").rename(tmp_path / "digits")
    found = run("--features", None, *options, path=colours)
    assert found["protocol"]["frechet_distance"] == "Frechet distance of pixels"
    assert found["protocol"]["against"] == "train, 4 images"
    assert found["real_images"] is None
    assert "No real images are left to compare with" in capsys.readouterr().out
    inception = evaluate.Config(colours, evaluate.Source("folder"), weights=colours)
    assert evaluate.features_of(inception) == "inception"


def _held_out_by_hand(images):
    """One of every ten consecutive images, by NumPy's generator of seed 0."""
    edges = np.linspace(0, len(images), len(images) // 10 + 1).astype(int)
    chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return images[chosen], np.delete(images, chosen, axis=0)


def test_samples_and_real_images_are_compared_with_those_held_out(run, tmp_path, capsys):
    colours = _save(tmp_path / "colours.npz", gd.VP((8, 8, 3)))
    options = _folder_of_colours(tmp_path / "images", 60)
    test, train = _held_out_by_hand(data_sets.folder(tmp_path / "images"))
    found = run("--keep-images", [], *options, path=colours)
    printed = capsys.readouterr()
    assert found["protocol"]["against"] == "test, 6 images"
    assert "not recorded what the model was trained on" in printed.err
    pixels = gd.metrics.Pixels()
    with np.load(tmp_path / "output" / "images-euler-3-0.npz") as file:
        samples = file["images"]
    # Of 54 images, as many as there are samples.
    for images, result in ((samples, found["results"][0]), (train, found["real_images"])):
        vectors = gd.metrics.reference(images, pixels).vectors[:20]
        distance = gd.metrics.frechet_distance(vectors, pixels(test))
        assert result["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert f"20 real training images: {distance:.3g}\n" in printed.out
    # A second folder, and the other way round.
    _folder_of_colours(tmp_path / "more", 5)
    more = data_sets.folder(tmp_path / "more")
    for against, kind in (("test", "20 real training"), ("train", "5 real held-out")):
        (tmp_path / "output").rename(tmp_path / f"before-{against}")
        second = ("--data.test", tmp_path / "more", "--against", against)
        found = run(*options, *second, path=colours)
        number = 5 if against == "test" else 60
        assert found["protocol"]["against"] == f"{against}, {number} images"
        assert f"{kind} images: " in capsys.readouterr().out
    whole = data_sets.folder(tmp_path / "images")
    distance = gd.metrics.frechet_distance(pixels(more), pixels(whole))
    assert found["real_images"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    # As little as 3 images.
    (tmp_path / "output").rename(tmp_path / "before")
    with pytest.raises(SystemExit, match="There are 3 images .* larger `--data.held-out`"):
        run(*options, "--data.held-out", 0.05, path=colours)


def test_it_is_checked_that_images_were_held_out_and_classes_agree(
    run, evaluate, tmp_path, capsys
):
    _folder_of_colours(tmp_path / "images", 0)
    for name in ("cat", "dog"):
        _folder_of_colours(tmp_path / "images" / name, 30)
    _, train = _held_out_by_hand(data_sets.folder(tmp_path / "images"))
    shape = (8, 8, 3)
    key = jax.random.key(0)
    network = gd.nn.TimeMLP(shape, key=key, width=16, depth=1, num_classes=2)
    model = gd.nn.NetworkModel(gd.VP(shape), network, data_std=0.7)
    path, says = tmp_path / "model.npz", "not trained on the other images"
    config = evaluate.Config(path, evaluate.Source("folder", tmp_path / "images"))
    flow = gd.ProbabilityFlow(model.process, model, "data")
    for images, warns in ((train, False), (train[1:], True)):
        fingerprint = gd.training.Batches(images, 1).fingerprint()
        metadata = {"classes": ["cat", "dog"], "trained_on": fingerprint}
        gd.checkpoints.save(path, flow, metadata)
        evaluate.check_held_out(evaluate.dataclasses.replace(config, against="test"), train)
        assert (says in capsys.readouterr().err) == warns
    # Labels are those of training, also where a class has no images.
    _folder_of_colours(tmp_path / "second", 0)
    _folder_of_colours(tmp_path / "second" / "dog", 4)
    source = evaluate.Source("folder", tmp_path / "second", held_out=0)
    second = evaluate.Config(path, source, number=10)
    assert evaluate.labels_of(second, flow).tolist() == [1] * 10
    digits = evaluate.Config(path, evaluate.Source("digits"), number=10)
    with pytest.raises(ValueError, match="for 2 classes, cat, dog, but digits has 10: 0"):
        evaluate.labels_of(digits, flow)
    gd.checkpoints.save(path, flow, {"classes": ["cat", "eel"]})
    with pytest.raises(ValueError, match="images in dog, but the classes are cat, eel"):
        evaluate.labels_of(second, flow)


def test_a_run_that_failed_before_it_drew_is_no_obstacle(run, evaluate, monkeypatch):
    with monkeypatch.context() as patch:

        def fails(*_):
            raise ValueError("out of luck")

        patch.setattr(evaluate.Bench, "draw", fails)
        with pytest.raises(SystemExit, match="out of luck"):
            run()
        patch.setattr(gd.metrics, "reference", fails)
        with pytest.raises(SystemExit, match="out of luck"):
            run("--number", 30)
    assert run("--batch-size", 16)["protocol"]["batch_size"] == 16


def test_help_names_what_there_is_to_choose(evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*evaluate.SAMPLERS, "cifar10_cld", "cifar10_bdm", "celeba_cld"):
        assert f"`{name}`" in text
    assert "{None,pixels,classifier,inception}" in text
    # Every option says what it is.
    silent = r"--(\S+) (?:\S+|\[\w+ \[\w+ \.\.\.\]\]) \(default"
    assert re.findall(silent, text) == []


_mine = """
import equinox as eqx
import jax
import gddim_eqx as gd


class Mine(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, t, x):
        return self.layer(x.ravel()).reshape(x.shape)


def network(key=jax.random.key(0)):
    return Mine(eqx.nn.Linear(64, 64, key=key))
"""


def test_networks_of_ones_own(run, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_networks.py"
    path.write_text(_mine)
    network = evaluate.named("my_networks:network")(jax.random.key(1))
    process = gd.VP((8, 8, 1))
    model = gd.nn.NetworkModel(process, network)
    gd.checkpoints.save(tmp_path / "mine.npz", model)
    with pytest.raises(SystemExit, match="holds a Mine.*`--like module:function`"):
        run(path=tmp_path / "mine.npz")
    options = ("--keep-images", [], "--like", "my_networks:network")
    found = run(*options, path=tmp_path / "mine.npz")
    assert found["results"][0]["outcome"] == "finite"
    x, _ = _draw(model, 3, jax.random.key(0), predicts="noise")
    with np.load(tmp_path / "output" / "images-euler-3-0.npz") as file:
        difference = gd.to_uint8(x).astype(int) - file["images"][:8]
    assert np.abs(difference).max() <= 1
    # Results of other code are others.
    path.write_text(_mine.replace("self.layer(x", "-self.layer(x"))
    with pytest.raises(SystemExit, match="measured with another like"):
        run(*options, path=tmp_path / "mine.npz")
    # A network without its process.
    gd.checkpoints.save(tmp_path / "alone.npz", network)
    with pytest.raises(SystemExit, match="a Mine, not a model and its process. Save a"):
        run(*options, path=tmp_path / "alone.npz")
