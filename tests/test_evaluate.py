"""The example that measures models, as a user runs it."""

import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd


pytestmark = pytest.mark.float32

_examples = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def evaluate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_examples)
        yield importlib.import_module("evaluate")
        for name in ("evaluate", "train"):
            patch.delitem(sys.modules, name)


def _save(path, process, change=lambda x: x):
    height, width, _ = process.shape
    shape = (height, width, process.num_components)
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
    assert (tmp_path / "output" / "grid.png").stat().st_size > 1000
    assert not any((tmp_path / "output" / "parts").iterdir())


def test_the_distance_is_that_of_the_samples(run, tmp_path, model):
    found = run("--keep-images", [], "--seeds", 3)["results"][0]
    with np.load(tmp_path / "output" / "images-euler-3-3.npz") as file:
        images = file["images"]
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8
    features = gd.metrics.Pixels()
    data = features(gd.datasets.digits())
    expected = gd.metrics.frechet_distance(features(images), data)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    # The first batch, drawn by hand.
    network = gd.checkpoints.load(model)
    process = network.process
    x, _ = gd.sample(
        process,
        network,
        jax.random.fold_in(jax.random.key(3), 0),
        8,
        solver=importlib.import_module("evaluate").SAMPLERS["euler"].solver,
        ts=gd.time_grid(process, 3, "quadratic"),
    )
    difference = gd.metrics.to_uint8(x).astype(int) - images[:8]
    assert np.abs(difference).max() <= 1


def test_goes_on_where_it_was_stopped(run, evaluate, monkeypatch, tmp_path):
    options = ("--evaluations", [3, 4], "--seeds", [0, 1])
    whole = run(*options, "--output", tmp_path / "output")
    (tmp_path / "output").rename(tmp_path / "whole")
    draw, drawn = evaluate.Bench.draw, []

    def interrupted(self, *arguments):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Bench, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*options)
    left = []
    with monkeypatch.context() as patch:
        count = lambda self, *arguments: left.append(0) or draw(self, *arguments)
        patch.setattr(evaluate.Bench, "draw", count)
        found = run(*options)
        assert len(drawn) + len(left) == 4 * 3
        # More of it draws no more than that.
        more = run("--evaluations", [3, 4, 5], "--seeds", [0, 1])
        assert len(drawn) + len(left) == 6 * 3
    without_times = lambda found: [
        {k: v for k, v in r.items() if k != "seconds"} for r in found["results"]
    ]
    assert without_times(found) == without_times(whole)
    assert without_times(more)[:4] == without_times(whole)


def test_results_of_something_else_are_not_mixed_in(run, tmp_path):
    before = run()
    for options, what in [
        (("--number", 30), "number_of_samples: 20 instead of 30"),
        (("--batch-size", 16), "batch_size: 8 instead of 16"),
        (("--path", None), "another model"),
    ]:
        path = {}
        if options[0] == "--path":
            options = ()
            path = {"path": _save(tmp_path / "other.npz", gd.CLD((8, 8, 1)), jnp.negative)}
        with pytest.raises(SystemExit, match=f"measured with .*{what}.*`--output`"):
            run(*options, **path)
    results = tmp_path / "output" / "results.json"
    assert json.loads(results.read_text()) == before
    results.write_text(results.read_text()[:100])
    with pytest.raises(SystemExit, match="is damaged .*Delete it to begin anew"):
        run()


def test_samples_that_diverge_are_said_to(run, tmp_path, capsys):
    path = _save(tmp_path / "model.npz", gd.VP((8, 8, 1)), lambda x: x + jnp.nan)
    found = run("--samplers", ["euler", "sscs"], path=path)["results"]
    assert found[0]["outcome"] == "diverged" and "not finite" in found[0]["message"]
    assert "frechet_distance" not in found[0]
    assert found[1]["outcome"] == "impossible"
    out = capsys.readouterr().out
    assert "| Euler | diverged |" in out and "SSCS" not in out


def test_adaptive_steps_stay_within_the_budget(run):
    found = run("--samplers", ["dopri5"], "--evaluations", [60, 120])["results"]
    for result in found:
        assert result["outcome"] == "finite"
        assert 0.3 * result["budget"] < result["evaluations"] <= 1.2 * result["budget"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--samplers", ["dpm"]), "no sampler 'dpm', but gddim, gddim-paper"),
        (("--number", 0), "`number` must be positive; got 0"),
        (("--evaluations", [0]), r"`evaluations` must be positive; got \(0,\)"),
        (("--features", "inception"), "give `--weights`"),
        (("--features", "classifier"), r"of shape \(28, 28, 1\); got \(8, 8, 1\)"),
        (("--against", "test"), "digits has no part for tests"),
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
