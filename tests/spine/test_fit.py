"""Training as a whole: data, checkpoints, what is written, and being stopped."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import gddim_eqx as gd
from gddim_eqx.training import (
    Augmentation,
    Batches,
    Checkpoints,
    DenoisingLoss,
    fit,
    JSONLines,
    Trainer,
)

from ..helpers import if_interrupted


pytestmark = pytest.mark.float32

_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
_points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)


# Batches


def test_every_sample_comes_once_in_each_epoch():
    batches = Batches(np.arange(10), 4, seed=3)
    order = np.concatenate([batches.indices(n) for n in range(5)])
    for epoch in (order[:10], order[10:]):
        assert sorted(epoch) == list(range(10))
    assert (order[:10] != order[10:]).any()
    # A function of seed and number, whatever was asked for before.
    np.testing.assert_array_equal(Batches(np.arange(10), 4, seed=3).indices(4), order[16:])
    assert (Batches(np.arange(10), 4, seed=4).indices(0) != order[:4]).any()


def test_a_batch_may_be_larger_than_the_data():
    indices = Batches(np.arange(3), 8).indices(1)
    assert indices.shape == (8,) and set(indices) == {0, 1, 2}


def test_batches_ahead_are_those_asked_for():
    batches = Batches(_points, 6)
    stream = batches.iterate_from(3)
    for n in range(3, 9):
        np.testing.assert_array_equal(next(stream), batches[n])
    stream.close()


class _Reads:
    """Samples that are read one by one."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read.append(index)
        return self.data[index]


def test_data_are_told_apart_by_their_fingerprint(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    labels = np.arange(40) % 3
    grey = np.repeat(images[..., :1], 3, -1)
    one, relabelled = images.copy(), labels.copy()
    one[17, 2, 3, 1] ^= 1
    relabelled[17] = 0
    of = lambda data: Batches(data, 4).fingerprint()
    known = of((images, labels))
    assert known["shapes"] == [[40, 4, 4, 3], [40]] and known["dtypes"][0] == "uint8"
    others = [images, (one, labels), (images, relabelled), (grey, labels)]
    others += [(images[::-1], labels), (images[:-1], labels[:-1])]
    others += [(images.astype(np.uint16), labels), (images[..., :1], labels)]
    others += [(images.reshape(40, 2, 8, 3), labels)]
    found = [known, *map(of, others)]
    assert len({json.dumps(x) for x in found}) == len(found)
    # The same, wherever they are, however they are batched.
    np.save(tmp_path / "x.npy", images)
    memory_map = np.load(tmp_path / "x.npy", mmap_mode="r")
    for same in (memory_map, jnp.asarray(images), np.asfortranarray(images)):
        assert Batches((same, labels), 8, seed=1).fingerprint() == known
    assert json.loads(json.dumps(known)) == known


def test_the_fingerprint_of_large_data_reads_little(tmp_path):
    number = 70_000
    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, "w+", np.uint8, (number, 32, 32, 1))
    before = Batches(large, 4).fingerprint()
    for index in (0, number - 1):
        large[index, 0, 0] ^= 1
        after = Batches(large, 4).fingerprint()
        assert after["shapes"] == before["shapes"] and after != before
        before = after
    source = _Reads(np.zeros((1000, 3)))
    Batches(source, 4).fingerprint()
    assert len(source.read) == 64 and {0, 999} <= set(source.read)
    pairs = _Reads([(np.zeros(3), 1.0)] * 5)
    assert Batches(pairs, 4).fingerprint()["shapes"] == [[5, 3], [5]]


@_eight
def test_batches_are_divided_over_devices():
    placement = gd.Placement()
    batches = Batches(_points, 16, placement=placement)
    assert batches[2].sharding == placement.batch
    np.testing.assert_array_equal(batches[2], Batches(_points, 16)[2])


def test_images_become_numbers_from_minus_one_to_one():
    pixels = jnp.arange(256, dtype=jnp.uint8).reshape(2, 8, 16, 1)
    x = Augmentation()(jr.key(0), pixels)
    assert x.dtype == jnp.float32 and x.min() == -1 and x.max() == 1
    filled = Augmentation(dequantise=True)(jr.key(0), pixels)
    levels = jnp.floor((filled + 1) * 128)
    np.testing.assert_array_equal(levels, pixels.astype(jnp.float32))
    points = jnp.asarray(_points)
    np.testing.assert_array_equal(Augmentation()(jr.key(0), points), points)


@pytest.mark.parametrize("dtype", ("uint8", "uint16"))
def test_levels_become_numbers_whatever_their_range(dtype):
    highest = np.iinfo(dtype).max
    levels = np.array([0, 1, highest // 3, highest - 1, highest], dtype)
    exact = levels.astype(np.float64) / highest * 2 - 1
    x = Augmentation()(jr.key(0), jnp.asarray(levels)[:, None])
    np.testing.assert_allclose(x[:, 0], exact, atol=2e-7)
    assert x[0, 0] == -1 and x[-1, 0] == 1
    filled = Augmentation(dequantise=True)(jr.key(0), jnp.asarray(levels)[:, None])
    cells = (np.asarray(filled, np.float64)[:, 0] + 1) * (highest + 1) / 2
    assert (levels <= cells).all() and (cells <= levels + 1.0).all()


def test_binary_images_become_minus_one_and_one():
    x = jnp.asarray([[True, False]])
    np.testing.assert_array_equal(Augmentation()(jr.key(0), x), [[1, -1]])
    filled = Augmentation(dequantise=True)(jr.key(0), x)
    assert 0 <= filled[0, 0] <= 1 and -1 <= filled[0, 1] <= 0


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_numbers_stay_as_they_are(dtype):
    x = jnp.asarray([[0.3, -2.0]], dtype)
    y = Augmentation(dequantise=True)(jr.key(0), x)
    assert y.dtype == dtype and (x == y).all()


def test_images_need_no_preparation():
    images = np.random.default_rng(0).integers(0, 256, (40, 2), np.uint8)
    got, expected = (
        fit(*_trainer(), Batches(data, 8), 3, progress=False)
        for data in (images, images.astype(np.float32) / 127.5 - 1)
    )
    one, other = (
        jtu.tree_leaves(eqx.filter(s.model, eqx.is_array)) for s in (got, expected)
    )
    for a, b in zip(one, other):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_half_of_the_images_are_mirrored():
    images = jnp.asarray(
        np.random.default_rng(0).integers(0, 256, (400, 4, 6, 3), np.uint8)
    )
    flipped = Augmentation(flip=True)(jr.key(0), images)
    plain = Augmentation()(jr.key(0), images)
    axes = (1, 2, 3)
    as_they_were = (flipped == plain).all(axes)
    mirrored = (flipped == plain[:, :, ::-1]).all(axes)
    assert (as_they_were ^ mirrored).all() and 160 < int(mirrored.sum()) < 240


# Fitting


def _trainer(placement=None, **options):
    process = gd.VP((2,))
    model = gd.nn.NetworkModel(process, gd.nn.TimeMLP(2, width=16, key=jr.key(0)))
    trainer = Trainer(
        DenoisingLoss(process),
        optax.adam(1e-2),
        ema_decay=0.9,
        placement=placement,
        **options,
    )
    return trainer, trainer.init(model, jr.key(1))


def _fit(directory, steps, *, data=_points, config=None, placement=None, **options):
    trainer, state = _trainer(placement)
    batches = Batches(data, 8, placement=placement)
    config = {"seed": 0} if config is None else config
    with Checkpoints(directory, config, keep=2) as checkpoints:
        return fit(
            trainer,
            state,
            batches,
            steps,
            checkpoints=checkpoints,
            progress=False,
            **{"save_every": 4, **options},
        )


def _assert_equal(one, other):
    for a, b in zip(*(jtu.tree_leaves(eqx.filter(s, eqx.is_array)) for s in (one, other))):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jr.key_data(a), jr.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Ten steps that nothing interrupted, and their checkpoints."""
    directory = tmp_path_factory.mktemp("finished") / "checkpoints"
    return _fit(directory, 10), directory


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at, mapped", ((1, False), (4, False), (7, False), (7, True)))
def test_a_run_that_is_interrupted_comes_to_the_same(tmp_path, finished, at, mapped):
    def die(state):
        raise _Killed

    data = _points
    if mapped:
        np.save(tmp_path / "points.npy", _points)
        data = np.load(tmp_path / "points.npy", mmap_mode="r")
    with pytest.raises(_Killed):
        _fit(tmp_path / "run", 10, data=data, callbacks=[(at, die)])
    _assert_equal(_fit(tmp_path / "run", 10, data=data), finished[0])


def test_a_finished_run_is_not_trained_on(finished):
    state, directory = finished
    _assert_equal(_fit(directory, 10), state)
    assert int(state.step) == 10


def test_the_latest_checkpoints_are_kept(finished):
    with Checkpoints(finished[1], {"seed": 0}) as checkpoints:
        assert checkpoints.steps == [8, 10]


def test_some_checkpoints_are_kept_for_ever(tmp_path):
    trainer, state = _trainer()
    with Checkpoints(tmp_path, {}, keep=1, keep_every=4) as checkpoints:
        options = dict(checkpoints=checkpoints, save_every=2, progress=False)
        fit(trainer, state, Batches(_points, 8), 10, **options)
        assert checkpoints.steps == [4, 8, 10]


@pytest.mark.parametrize(
    "number", (signal.SIGTERM, pytest.param(signal.SIGINT, marks=if_interrupted))
)
def test_a_signal_to_end_saves(tmp_path, finished, number):
    before = signal.getsignal(number)
    ask = lambda state: os.kill(os.getpid(), number)
    state = _fit(tmp_path, 10, callbacks=[(5, ask)])
    # It is seen at the end of the next step.
    assert int(state.step) == 6
    assert signal.getsignal(number) == before
    _assert_equal(_fit(tmp_path, 10), finished[0])


@if_interrupted
def test_a_second_interrupt_ends_at_once(capfd):
    trainer, state = _trainer()
    interrupts = []

    def interrupt(state):
        for _ in range(2):
            interrupts.append(int(state.step))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    batches = Batches(_points, 8)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, state, batches, 10, callbacks=[(3, interrupt)])
    assert interrupts == [3, 3]
    assert "Interrupt again to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # What was given is still there.
    _assert_equal(fit(trainer, state, batches, 2, progress=False), _steps(2))


def _steps(number):
    trainer, state = _trainer()
    for n in range(number):
        state, _ = trainer.step(state, Batches(_points, 8)[n])
    return state


@if_interrupted
def test_an_interrupt_returns_the_newest_state():
    trainer, state = _trainer()
    interrupt = lambda _: os.kill(os.getpid(), signal.SIGINT)
    options = dict(callbacks=[(3, interrupt)], progress=False)
    got = fit(trainer, state, Batches(_points, 8), 10, **options)
    _assert_equal(got, _steps(4))
    _assert_equal(state, _trainer()[1])


def test_interrupts_that_are_ignored_stay_so():
    trainer, state = _trainer()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ask = lambda _: [os.kill(os.getpid(), number) for number in before]
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        options = dict(callbacks=[(3, ask)], progress=False)
        state = fit(trainer, state, Batches(_points, 8), 6, **options)
        assert int(state.step) == 6
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_threads_train_too():
    trainer, state = _trainer()
    with ThreadPoolExecutor(1) as pool:
        options = dict(progress=False)
        got = pool.submit(fit, trainer, state, Batches(_points, 8), 4, **options).result()
    _assert_equal(got, _steps(4))


def test_the_state_that_was_given_is_kept():
    trainer, state = _trainer()
    batches = Batches(_points, 8)

    def fail(*_):
        raise _Killed

    for options in (dict(callbacks=[(2, fail)]), dict(logs=[fail], log_every=2)):
        with pytest.raises(_Killed):
            fit(trainer, state, batches, 4, progress=False, **options)
    bad = Batches(np.full_like(_points, np.nan), 8)
    with pytest.raises(FloatingPointError):
        fit(trainer, state, bad, 4, progress=False)
    for _ in range(2):
        _assert_equal(fit(trainer, state, batches, 4, progress=False), _steps(4))
    _assert_equal(state, _trainer()[1])


def test_an_average_of_initial_parameters_is_warned_of():
    # With the bias correction they have no part in it.
    for decay, debias, warns in ((0.9, False, True), (0.5, False, False), (0.99, True, 0)):
        process = gd.VP((2,))
        model = gd.nn.NetworkModel(process, gd.nn.TimeMLP(2, width=16, key=jr.key(0)))
        options = dict(ema_decay=decay, debias=debias)
        trainer = Trainer(DenoisingLoss(process), optax.adam(1e-2), **options)
        expected = (
            pytest.warns(UserWarning, match="initial parameters are still 59%")
            if warns
            else contextlib.nullcontext()
        )
        with expected:
            state = trainer.init(model, jr.key(0))
            fit(trainer, state, Batches(_points, 8), 5, progress=False)


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path):
    data = _points.copy()
    data[Batches(data, 8).indices(4)[3]] = np.nan
    # The same sample is not in a batch before.
    assert not any(np.isnan(data[Batches(data, 8).indices(n)]).any() for n in range(4))
    with pytest.raises(FloatingPointError, match="In step 5 the loss is nan.*of step 4 in"):
        _fit(tmp_path, 10, data=data)
    with Checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        assert checkpoints.steps == [4]
    with pytest.raises(FloatingPointError, match="In step 5"):
        _fit(tmp_path, 10, data=data, save_every=5)
    trainer, state = _trainer()
    with pytest.raises(FloatingPointError, match="Nothing was saved"):
        fit(trainer, state, Batches(data, 8), 10, progress=False)


def test_what_is_measured_is_written_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JSONLines(path) as log:
        _fit(tmp_path / "c", 6, logs=[log], log_every=2)
    # A run that was killed after step 6, while it wrote.
    path.write_text(path.read_text() + '{"step": 8, "loss": 1.0}\n{"step": 1')
    with JSONLines(path, since=6) as log:
        _fit(tmp_path / "c", 10, logs=[log], log_every=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert all(line["images_per_second"] > 0 for line in lines)


def test_progress_is_shown(tmp_path, capsys):
    trainer, state = _trainer()
    fit(trainer, state, Batches(_points, 8), 3, log_every=1)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "images_per_second=" in shown


# Checkpoints


@_eight
@pytest.mark.parametrize("number, shard", [(1, False), (2, True), (8, False), (8, True)])
def test_a_checkpoint_is_read_on_another_number_of_devices(tmp_path, number, shard):
    saved = _fit(tmp_path, 4, placement=gd.Placement(jax.devices()[:4], True))
    placement = gd.Placement(jax.devices()[:number], shard)
    _, new = _trainer(placement)
    with Checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        restored = checkpoints.restore(new)
    _assert_equal(restored, saved)
    for old, leaf in zip(
        *(jtu.tree_leaves(eqx.filter(s, eqx.is_array)) for s in (new, restored))
    ):
        assert leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim)


def _files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _check_damaged(directory, copy):
    """What `test_a_damaged_checkpoint_is_never_read_as_another` runs."""
    _, new = _trainer()
    with Checkpoints(directory, {"seed": 0}) as checkpoints:
        state = checkpoints.restore(new, 10)
    damages = {
        "cut": lambda content: content[: len(content) // 2],
        "emptied": lambda content: b"",
        "lost": None,
    }
    for kind, damage in damages.items():
        refused = 0
        for name in [p.relative_to(directory) for p in _files(directory / "10")]:
            shutil.copytree(directory, copy)
            content = (copy / name).read_bytes()
            (copy / name).unlink()
            if damage is not None:
                (copy / name).write_bytes(damage(content))
            try:
                with Checkpoints(copy, {"seed": 0}) as checkpoints:
                    restored = checkpoints.restore(new, 10)
                _assert_equal(restored, state)
            except ValueError as error:
                refused += 1
                assert str(copy) in str(error)
            shutil.rmtree(copy)
        print(kind, refused)
        assert refused >= 3, kind


def _run_apart(script):
    """In a process of its own: for instance as Orbax leaves coroutines behind that reads
    began which failed."""
    result = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _check_damaged, _fit" + script],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_damaged_checkpoint_is_never_read_as_another(tmp_path, finished):
    out = _run_apart(f"""
import pathlib
directory, copy = pathlib.Path({str(finished[1])!r}), pathlib.Path({str(tmp_path / "c")!r})
_check_damaged(directory, copy)
""")
    assert len(out.splitlines()) == 3


def test_a_checkpoint_of_another_run_is_refused(finished):
    _, directory = finished
    with pytest.raises(ValueError, match="another config .seed: 0 there, 1 here"):
        _fit(directory, 12, config={"seed": 1})
    with pytest.raises(ValueError, match="rate: absent there, 0.1 here"):
        _fit(directory, 12, config={"seed": 0, "rate": 0.1})
    nested = {"seed": 0, "optimiser": {"rate": 0.1, "none": {}}}
    with pytest.raises(ValueError, match=r"\(optimiser.none: .*; optimiser.rate: abs.*1 h"):
        _fit(directory, 12, config=nested)
    process = gd.VP((2,))
    model = gd.nn.NetworkModel(process, gd.nn.TimeMLP(2, width=32, key=jr.key(0)))
    state = Trainer(DenoisingLoss(process), optax.adam(1e-2)).init(model, jr.key(0))
    with Checkpoints(directory, {"seed": 0}) as checkpoints:
        with pytest.raises(
            ValueError,
            match=r"first.weight: 'float32\[16, 2\]' there, 'float32\[32, 2\]' here.*; and",
        ):
            checkpoints.restore(state)
    model = gd.nn.NetworkModel(process, gd.nn.TimeMLP(2, width=16, key=jr.key(0)))
    other = Trainer(DenoisingLoss(process), optax.sgd(0.1)).init(model, jr.key(0))
    with Checkpoints(directory, {"seed": 0}) as checkpoints:
        with pytest.raises(
            ValueError,
            match=r"another network or optimiser \(optimiser.*mu.* there, absent",
        ):
            checkpoints.restore(other)
        with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has \[8, 10\]"):
            checkpoints.restore(other, 3)


def _state(dtype=jnp.float32, key=jr.key(1), optimiser=None, **options):
    process = gd.VP((2,))
    model = gd.nn.NetworkModel(process, gd.nn.TimeMLP(2, width=16, key=jr.key(0)))
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    trainer = Trainer(DenoisingLoss(process), optimiser or optax.adam(1e-2), **options)
    return trainer.init(jtu.tree_map(cast, model), key)


@pytest.mark.parametrize(
    "saved, wanted, message",
    [
        ({}, dict(dtype=jnp.bfloat16), r"model.*: 'float32\[.* there, 'bfloat16\[.* here"),
        (
            dict(dtype=jnp.bfloat16),
            {},
            r"ema.*: absent there|model.*: 'bfloat16\[.* there, 'float32\[.* here",
        ),
        (
            {},
            dict(optimiser=optax.adam(1e-2, mu_dtype=jnp.bfloat16)),
            r"optimiser.*mu.*: 'float32\[.* there, 'bfloat16\[.* here",
        ),
        (
            {},
            dict(key=jr.key(1, impl="rbg")),
            r"\(key: 'threefry2x32 key\[\]' there, 'rbg key\[\]' here\)",
        ),
        (
            dict(key=jr.key(1, impl="unsafe_rbg")),
            dict(key=jr.key(1, impl="rbg")),
            r"\(key: 'unsafe_rbg key\[\]' there, 'rbg key\[\]' here\)",
        ),
        ({}, dict(optimiser=optax.adagrad(1e-2)), r"optimiser\[0\].count: .* absent here"),
        ({}, dict(optimiser=optax.sgd(1e-2)), "optimiser.*: .* there, absent here"),
    ],
)
def test_a_checkpoint_in_another_precision_is_refused(tmp_path, saved, wanted, message):
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(_state(**saved))
        checkpoints.wait()
        # It is said before anything is read.
        shutil.rmtree(tmp_path / "0" / "state")
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.restore(_state(**wanted))
    assert "delete" not in str(error.value) and "damaged" not in str(error.value)


def test_a_checkpoint_of_double_precision_is_refused_in_single(tmp_path, finished):
    with jax.enable_x64(True), Checkpoints(finished[1], {"seed": 0}) as checkpoints:
        with pytest.raises(ValueError, match=r"'float32\[.* there, 'float64\[.* here"):
            checkpoints.restore(_state(jnp.float64), 10)


class _Parameters(eqx.Module):
    values: dict


def test_arrays_of_any_kind_and_name_are_saved(tmp_path):
    values = {
        "a.b": jnp.arange(3.0),
        "a": {"b": jnp.arange(4.0), "c/d": jnp.ones(2, bool)},
        "complex": jnp.array([1 + 2j, -1j]),
        "empty": jnp.zeros((0, 3)),
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "none": None,
    }
    trainer = Trainer(DenoisingLoss(gd.VP((2,))), optax.sgd(0.1))
    state = trainer.init(_Parameters(values), jr.key(0))
    with Checkpoints(tmp_path, {"nan": float("nan")}) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
    zeros = jtu.tree_map(jnp.zeros_like, values)
    with Checkpoints(tmp_path, {"nan": float("nan")}) as checkpoints:
        restored = checkpoints.restore(trainer.init(_Parameters(zeros), jr.key(0)))
    _assert_equal(restored, state)
    assert jtu.tree_structure(restored) == jtu.tree_structure(state)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path):
    # Files may not grow beyond 2 kB, as little as if there were no space.
    out = _run_apart(f"""
import pathlib, resource, signal
directory = pathlib.Path({str(tmp_path / "c")!r})
_fit(directory, 4)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
try:
    _fit(directory, 8)
except OSError as error:
    print(error)
""")
    assert f"Could not save to {tmp_path / 'c'}" in out and "Is the disk full?" in out
    assert "checkpoints of steps [4] are intact" in out
    with Checkpoints(tmp_path / "c", {"seed": 0}) as checkpoints:
        assert int(checkpoints.restore(_trainer()[1]).step) == 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Batches(_points[:0], 4), r"must hold samples: .*; got .*\(0, 2\)"),
        (
            lambda: Augmentation(flip=True)(jr.key(0), jnp.asarray(_points)),
            r"`flip` is for images.*got an array of shape \(40, 2\)",
        ),
        (
            lambda: Augmentation()(jr.key(0), jnp.ones((2, 2), jnp.int32)),
            "got int32, whose range is not known",
        ),
        (
            lambda: fit(*_trainer(), Batches(_points.astype(np.int32), 8), 1),
            "got int32, whose range is not known",
        ),
        (lambda: Batches(_points, 0), "`batch_size` must be a positive integer"),
        (lambda: Checkpoints("runs", {"data": object()}), "`config` must be serial"),
        (lambda: fit(*_trainer(), Batches(_points, 8), 1, log_every=0), "`log_every` must"),
    ],
)
def test_bad_input_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()


@_eight
def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="A batch of 12 cannot be divided over 8 devices"):
        Batches(_points, 12, placement=gd.Placement())


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    for module, call in (
        ("orbax.checkpoint", lambda: Checkpoints(tmp_path, {})),
        ("tqdm", lambda: fit(*_trainer(), Batches(_points, 8), 1)),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"gddim_eqx\[train\]"):
                call()
