"""Distances between sets of vectors, against closed forms and slow definitions."""

import functools
import operator
import pickle
import tracemalloc
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given, settings, strategies as st

import gddim_eqx as gd
from examples import data
from gddim_eqx.metrics import (
    frechet_distance,
    kernel_distance,
    Moments,
    precision_recall,
    reference,
    sliced_wasserstein,
)


# NumPy, in its own precision.
pytestmark = pytest.mark.x64


def _random(seed=0):
    return np.random.default_rng(seed)


def _given(mean, covariance, count=1000):
    return Moments(count, np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


#
# Frechet
#


def test_frechet_of_means_is_exact():
    size = 256
    one = _given(np.zeros(size), np.eye(size))
    other = _given(np.ones(size), np.eye(size))
    assert frechet_distance(one, other) == size
    one = _given(np.zeros(64), np.eye(64))
    assert frechet_distance(one, one) == 0


def test_frechet_of_variances():
    size = 64
    one = _given(np.zeros(size), np.eye(size))
    other = _given(np.zeros(size), 4 * np.eye(size))
    # (2 - 1)^2 in each direction.
    assert frechet_distance(one, other) == pytest.approx(size, rel=1e-14)


def _covariance(random, size, rank=None):
    root = random.normal(size=(size, size if rank is None else rank))
    return root @ root.T


def test_frechet_against_the_root_of_a_matrix():
    random = _random()
    for size in (1, 2, 7, 40):
        a, b = (_given(random.normal(size=size), _covariance(random, size)) for _ in "ab")
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.trace(a.covariance + b.covariance - 2 * root)
        expected += ((a.mean - b.mean) ** 2).sum()
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_without_full_rank():
    # In directions that do not meet, nothing overlaps; in the same ones, the rank is as if
    # it were full.
    random = _random(1)
    basis = np.linalg.qr(random.normal(size=(300, 300)))[0]
    first, second = basis[:, :5], basis[:, 5:12]
    a, b = (_given(np.zeros(300), x @ x.T) for x in (first, second))
    assert frechet_distance(a, b) == pytest.approx(12, abs=1e-10)
    wide = _given(np.zeros(300), 9 * first @ first.T)
    assert frechet_distance(a, wide) == pytest.approx(5 * 2**2, abs=1e-10)
    nothing = _given(np.zeros(300), np.zeros((300, 300)))
    assert frechet_distance(a, nothing) == pytest.approx(5, abs=1e-10)
    assert frechet_distance(nothing, nothing) == 0


def test_frechet_of_fewer_vectors_than_features():
    vectors = _random(2).normal(size=(20, 500)).astype(np.float32)
    moved = vectors + np.float32(0.5)
    assert frechet_distance(vectors, vectors) < 1e-9
    assert frechet_distance(vectors, moved) == pytest.approx(125, abs=1e-4)


@pytest.mark.parametrize("change", (0, 1e-15, 1e-10, 1e-5))
def test_frechet_of_nearly_equal_covariances(change):
    random = _random(3)
    values = 10.0 ** -np.arange(40)  # From 1 to far below rounding.
    basis = np.linalg.qr(random.normal(size=(40, 40)))[0]
    covariance = basis * values @ basis.T
    a, b = (_given(np.zeros(40), c * covariance) for c in (1, (1 + change) ** 2))
    found = frechet_distance(a, b)
    assert found == pytest.approx(change**2 * values.sum(), abs=1e-12)
    assert found >= 0


#
# Moments
#


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 100),
)
def test_moments_of_parts_are_those_of_the_whole(parts, offset, seed):
    vectors = _random(seed).normal(size=(sum(parts), 6)) + offset
    split = np.split(vectors, np.cumsum(parts)[:-1])
    total = functools.reduce(operator.add, map(Moments.of, split))
    whole = Moments.of(vectors)
    assert total.count == whole.count == len(vectors)
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(total.covariance, whole.covariance, rtol=0, atol=1e-10)
    if len(vectors) > 1:
        np.testing.assert_allclose(whole.covariance, np.cov(vectors.T), atol=1e-10)
        one = _given(np.zeros(6), np.eye(6))
        difference = frechet_distance(total, one) - frechet_distance(whole, one)
        assert abs(difference) < 1e-10 * max(1, offset**2)


def test_moments_of_single_precision_are_in_double():
    # In single precision the covariance would have an error of 1e-1.
    vectors = (_random().normal(size=(10_000, 3)) + 1e3).astype(np.float32)
    exact = np.cov(vectors.astype(np.float64).T)
    np.testing.assert_allclose(Moments.of(vectors).covariance, exact, rtol=1e-10)


#
# Kernel distance
#


def test_kernel_distance_of_whole_sets_is_its_definition():
    random = _random(4)
    a, b = random.normal(size=(12, 5)), 0.5 + random.normal(size=(12, 5))
    kernel = lambda x, y: (x @ y / 5 + 1) ** 3
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in pairs if i != j) / (12 * 11)
    across = sum(kernel(a[i], b[j]) for i, j in pairs) / 12**2
    found = kernel_distance(a, b, num_subsets=2, subset_size=12)
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_without_bias():
    # Vectors of one distribution: 0 on average, for small subsets too.
    random = _random(5)
    a, b = random.normal(size=(2, 4000, 4))
    small = kernel_distance(a, b, num_subsets=4000, subset_size=5)
    assert abs(small.mean) < 4 * small.std / 4000**0.5
    moved = kernel_distance(a, b + 0.3, num_subsets=100, subset_size=500)
    assert moved.mean > 10 * moved.std / 100**0.5 > 0
    assert kernel_distance(a, b, 3, 50, seed=1) == kernel_distance(a, b, 3, 50, seed=1)


#
# Sliced Wasserstein
#


def test_sliced_wasserstein_of_a_shift_and_a_scale():
    vectors = _random(6).normal(size=(500, 3))
    shift = np.array([1.0, -2.0, 2.0])
    # A direction sees a third of the square on average.
    found = sliced_wasserstein(vectors, vectors + shift, num_directions=20_000)
    assert found == pytest.approx(3**0.5, rel=2e-2)
    assert sliced_wasserstein(vectors, vectors) == 0


@pytest.mark.parametrize("numbers", [(4, 4), (4, 6), (1, 5), (7, 3)])
def test_sliced_wasserstein_is_optimal_transport_on_the_line(numbers):
    random = _random(7)
    a, b = (random.normal(size=(number, 1)) for number in numbers)
    # The transport as a linear program.
    cost = (a - b.T) ** 2
    rows = np.kron(np.eye(len(a)), np.ones(len(b)))
    columns = np.kron(np.ones(len(a)), np.eye(len(b)))
    plan = scipy.optimize.linprog(
        cost.ravel(),
        A_eq=np.concatenate([rows, columns]),
        b_eq=np.concatenate([np.full(len(x), 1 / len(x)) for x in (a, b)]),
    )
    found = sliced_wasserstein(a, b, num_directions=70)
    assert found == pytest.approx(plan.fun**0.5, rel=1e-9)


#
# Precision and recall
#


def test_precision_and_recall_of_parts():
    random = _random(8)
    left, right = random.normal(size=(2, 200, 2)) + np.array([[[-50.0, 0]], [[50, 0]]])
    both = np.concatenate([left, right])
    assert precision_recall(left, both) == (1, 0.5)
    assert precision_recall(both, left) == (0.5, 1)
    assert precision_recall(left, right) == (0, 0)
    assert precision_recall(both, both) == (1, 1)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_precision_and_recall_are_their_definition(dtype):
    random = _random(9)
    # Far from 0, where squares lose digits, and in more than one part.
    samples, data = (
        (random.normal(size=(number, 2)) * scale + 1e3).astype(dtype)
        for number, scale in ((1100, 1.5), (1020, 1.0))
    )

    def share(vectors, others):
        vectors, others = (x.astype(np.float64) for x in (vectors, others))
        between = np.linalg.norm(others[:, None] - others, axis=2)
        radii = np.sort(between, axis=1)[:, 3]
        return (np.linalg.norm(vectors[:, None] - others, axis=2) <= radii).any(1).mean()

    found = precision_recall(samples, data)
    assert found.precision == pytest.approx(share(samples, data), abs=2e-3)
    assert found.recall == pytest.approx(share(data, samples), abs=2e-3)
    assert 0.5 < found.precision < found.recall < 1


def test_precision_and_recall_never_hold_all_distances():
    vectors = _random(9).normal(size=(6000, 2)).astype(np.float32)
    tracemalloc.start()
    precision_recall(vectors, vectors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.7 * 4 * 6000**2


#
# Bad input
#

_vectors = _random(10).normal(size=(5, 3))
_broken = np.where(np.arange(5)[:, None] == 2, np.nan, _vectors)
_all = [
    frechet_distance,
    functools.partial(kernel_distance, subset_size=3),
    sliced_wasserstein,
    functools.partial(precision_recall, neighbours=2),
]


@pytest.mark.parametrize("measure", _all)
def test_what_cannot_be_compared_is_refused(measure, without_type_checks):
    with pytest.raises(ValueError, match="of size 3 cannot be compared with ones of 2"):
        measure(_vectors, _vectors[:, :2])
    with pytest.raises(ValueError, match="1 of 5 .* are not finite"):
        measure(_vectors, _broken)
    with pytest.raises(ValueError):
        measure(_vectors, _vectors[:0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Moments.of(np.zeros((2, 3, 3))), r"\(number, size\); got \(2, 3, 3\)"),
        (lambda: Moments.of(_vectors) + Moments.of(_vectors[:, :1]), "of size 3"),
        (lambda: frechet_distance(_vectors, _vectors[:1]), "two vectors; got 1"),
        (lambda: kernel_distance(_vectors, _vectors), "from 2 to .* 5; got 1000"),
        (lambda: kernel_distance(_vectors, _vectors, 0, 3), "`num_subsets`.*got 0"),
        (lambda: kernel_distance(_vectors, _vectors, 9, 2.5), "`subset_size`.*got 2.5"),
        (lambda: frechet_distance(_given([np.nan], [[1.0]]), _given([0], [[1]])), "finite"),
        (lambda: sliced_wasserstein(_vectors, _vectors, 0), "`num_directions`.*got 0"),
        (lambda: precision_recall(_vectors, _vectors[:3]), "more vectors than.*3 data"),
        (lambda: precision_recall(_vectors, _vectors, 0), "`neighbours`.*got 0"),
    ],
)
def test_bad_input_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()


#
# Features of images
#


def test_images_are_rounded_and_clipped():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(gd.to_uint8(levels / 127.5 - 1), levels)
    x = jnp.asarray([-1.2, -1 + 0.6 / 127.5, 0.999, 7.0])
    np.testing.assert_array_equal(gd.to_uint8(x), [0, 1, 255, 255])
    # As all values are of this precision, each has one nearest level.
    half = jnp.linspace(-1, 1, 1001).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        gd.to_uint8(half), gd.to_uint8(np.asarray(half, np.float64))
    )
    with pytest.raises(ValueError, match="not finite"):
        gd.to_uint8(jnp.array([0.0, jnp.nan]))


def test_images_that_are_integers_are_not_rounded(without_type_checks):
    with pytest.raises(ValueError, match="floating-point numbers; got uint8"):
        gd.to_uint8(np.zeros(3, np.uint8))


def _images(number, seed=0, shape=(28, 28, 1)):
    return _random(seed).integers(0, 256, (number, *shape), np.uint8)


def test_pixels():
    images = _images(3, shape=(2, 2, 3))
    features = gd.metrics.Pixels()(images)
    assert features.shape == (3, 12) and features.dtype == np.float32
    np.testing.assert_array_equal(gd.to_uint8(features).reshape(images.shape), images)


@pytest.fixture(scope="module")
def classifier():
    return gd.metrics.Classifier()


@pytest.mark.parametrize("number", (0, 1, 3, 501))
def test_features_do_not_depend_on_the_number_of_images(classifier, number):
    images = _images(number)
    features = classifier(images)
    assert features.shape == (number, 64) and np.isfinite(features).all()
    single = [classifier(image[None])[0] for image in images[-2:]]
    np.testing.assert_allclose(features[-2:], single or features, atol=1e-5)


def test_the_classifier_sees_images_as_it_was_trained(classifier):
    images = _images(3)
    embed = jax.vmap(classifier.classifier.embed)
    expected = embed(jnp.asarray(images / 127.5 - 1, jnp.float32))
    np.testing.assert_allclose(classifier(images), expected, atol=1e-5)


def test_keys_tell_classifiers_apart(classifier):
    assert gd.metrics.Classifier().key == classifier.key
    make = functools.partial(gd.nn.ImageClassifier, (28, 28, 1), 10)
    others = [make(key=jax.random.key(n)) for n in (0, 1)]
    keys = {gd.metrics.Classifier(other).key for other in others}
    assert len(keys | {classifier.key}) == 3


def test_the_classifier_sees_noise_and_missing_classes(classifier):
    # Two halves of clothes are as near as they can be; anything else is farther.
    directory = "/usr/share/datasets/fashion-mnist"
    try:
        images = data.fashion_mnist(directory, train=False)[:4000]
        labels = data.fashion_mnist_labels(directory, train=False)[:4000]
    except ValueError:
        pytest.skip("The Debian package dataset-fashion-mnist is not installed.")
    real, others = classifier(images[:2000]), classifier(images[2000:])
    noise = np.clip(images[:2000] + _random().normal(0, 40, (2000, 28, 28, 1)), 0, 255)
    some = images[:2000][labels[:2000] < 5]
    measures = [
        lambda x: frechet_distance(x, others),
        lambda x: kernel_distance(x, others, 10, 500).mean,
        lambda x: sliced_wasserstein(x, others),
    ]
    for measure in measures:
        best = measure(real)
        assert measure(classifier(np.rint(noise).astype(np.uint8))) > 3 * abs(best)
        assert measure(classifier(some)) > 3 * abs(best)


def test_a_classifier_can_be_saved(tmp_path):
    network = gd.nn.ImageClassifier((8, 6, 3), 4, key=jax.random.key(0), features=(8, 16))
    gd.checkpoints.save(tmp_path / "classifier.npz", network)
    loaded = gd.checkpoints.load(tmp_path / "classifier.npz")
    x = jnp.ones((8, 6, 3))
    np.testing.assert_array_equal(network(x), loaded(x))
    assert network(x).shape == (4,) and network.embed(x).shape == (16,)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((8, 8), {}, r"`shape` must be \(height, width, channels\); got \(8, 8\)"),
        ((8, 8, 1), dict(features=(12,)), r"multiples of 8; got \(12,\)"),
        ((8, 8, 1), dict(features=()), r"multiples of 8; got \(\)"),
        ((8, 8, 1), dict(num_classes=0), "`num_classes` must be .*got 0"),
    ],
)
def test_classifiers_that_cannot_be_are_refused(shape, options, message):
    options = dict(num_classes=2, key=jax.random.key(0)) | options
    with pytest.raises(ValueError, match=message):
        gd.nn.ImageClassifier(shape, **options)


def test_a_classifier_of_other_images_says_so(classifier):
    with pytest.raises(ValueError, match=r"of shape \(28, 28, 1\); got \(32, 32, 3\)"):
        classifier(_images(2, shape=(32, 32, 3)))


#
# References
#


class _Counting(gd.metrics.AbstractFeatures):
    name: str = "distance"
    key: str = "one"
    calls: list = eqx.field(default_factory=list)

    def __call__(self, images):
        self.calls.append(len(images))
        return images.reshape(len(images), -1).astype(np.float64)


def _same(one, other):
    for x, y in zip(jtu.tree_leaves(one), jtu.tree_leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_reference_is_of_all_images_and_kept(tmp_path):
    images = _images(1500, shape=(2, 2, 1))
    features = _Counting()
    first = reference(images, features, tmp_path, number=100)
    whole = Moments.of(images.reshape(1500, -1))
    assert first.moments.count == 1500 and first.vectors.shape == (100, 4)
    np.testing.assert_allclose(first.moments.covariance, whole.covariance, rtol=1e-12)
    rows = {row.tobytes() for row in images.reshape(1500, -1).astype(np.float64)}
    assert all(row.tobytes() in rows for row in first.vectors)
    calls = len(features.calls)
    _same(first, reference(images, features, tmp_path, number=100))
    _same(first, reference(images, _Counting(), number=100))
    assert len(features.calls) == calls


def test_a_reference_is_computed_anew_for_whatever_it_depends_on(tmp_path):
    images, features = _images(10, shape=(2, 2, 1)), _Counting()
    reference(images, features, tmp_path)
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    others = [
        (changed, features, 10_000),
        (images[::-1], features, 10_000),
        (images.reshape(10, 4, 1, 1), features, 10_000),
        (images, _Counting(key="other", calls=features.calls), 10_000),
        (images, features, 5),
    ]
    for other in others:
        calls = len(features.calls)
        reference(*other[:2], tmp_path, number=other[2])
        assert len(features.calls) > calls
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_damaged_reference_is_computed_again(tmp_path):
    images = _images(10, shape=(2, 2, 1))
    first = reference(images, _Counting(), tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="There must be images"):
        reference(images[:0], _Counting(), tmp_path)
    whole = path.read_bytes()
    flipped = [bytearray(whole) for _ in range(2)]
    flipped[0][200] ^= 1
    flipped[1][whole.rindex(b"PK\x01\x02") + 8] ^= 1  # As if it were encrypted.
    for damaged in (whole[:100], b"", whole[:-40], *map(bytes, flipped)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged, and is computed again"):
            _same(first, reference(images, _Counting(), tmp_path))
        with warnings.catch_warnings():
            _same(first, reference(images, _Counting(), tmp_path))


#
# Inception, where its package is installed
#


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A network of torch-fidelity with random weights, and their file."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        cls = module.FeatureExtractorInceptionV3
        patch.setattr(cls, "load_state_dict", lambda self, state: None)
        network = cls("inception", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_torch_fidelity_s(random_weights):
    import torch

    network, path = random_weights
    features = gd.metrics.Inception(path)
    images = _images(52, shape=(32, 32, 3))
    found = features(images)
    pixels = torch.from_numpy(images[48:].transpose(0, 3, 1, 2).copy())
    (expected,) = network(pixels)
    # Only the published weights give what is called so.
    assert found.shape == (52, 2048) and features.name == "Frechet distance by Inception"
    np.testing.assert_allclose(found[48:], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert features(images[:0]).shape == (0, 2048)
    with pytest.raises(ValueError, match=r"three channels; got \(2, 28, 28, 1\)"):
        features(_images(2))


def test_pytorch_fid_has_files_of_the_same_arrays(random_weights, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    torchvision = pytest.importorskip("torchvision")
    cls = torchvision.models.Inception3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(cls, "load_state_dict", lambda self, state: None)
    theirs, ours = module.fid_inception_v3().state_dict(), random_weights[0].state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_other_files_are_not_inception(random_weights, tmp_path):
    whole = random_weights[1].read_bytes()
    path = tmp_path / "weights.pth"
    for content in (b"", b"text", whole[: len(whole) // 2], _runs_when_read()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold the weights of InceptionV3"):
            gd.metrics.Inception(path)


class _Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def _runs_when_read():
    return pickle.dumps(_Runs())


@pytest.mark.parametrize("size, number", [(64, 1000), (256, 300), (2048, 4000)])
def test_frechet_of_other_packages(size, number):
    torch = pytest.importorskip("torch")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    random = _random(11)
    mixing = random.normal(size=(size, size)) / size**0.5
    a, b = (
        (random.normal(size=(number, size)) @ mixing * scale + shift).astype(np.float32)
        for scale, shift in ((1.0, 0.0), (1.2, 0.1))
    )
    found = frechet_distance(a, b)
    a, b = (
        metric_fid.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64)))
        for x in (a, b)
    )
    theirs = metric_fid.fid_statistics_to_metric(a, b, verbose=False)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_inception_without_weights_says_where_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="no weights in .*github.com/mseitzer/pytorch-fid"):
        gd.metrics.Inception(tmp_path / "weights.pth")
