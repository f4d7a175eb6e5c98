"""Normal data and mixtures of them, against dense linear algebra in NumPy."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx._model.law import Channel

from ..helpers import every_process, max_difference, processes


X64 = jnp.result_type(float) == np.float64
cast = lambda x, dtype: jtu.tree_map(lambda y: y.astype(dtype), x)


@ft.cache
def normals_for(shape):
    """Of every kind, with their dense covariances."""
    random, size = np.random.default_rng(0), math.prod(shape)
    mean = random.normal(size=shape)
    vectors = np.linalg.qr(random.normal(size=(size, size)))[0]
    values = np.geomspace(1e-2, 1, size)
    matrix = (vectors * values) @ vectors.T
    variances = random.uniform(0.1, 2, shape)
    rank = size // 2 + 1
    some, rest = vectors[:, -rank:], 0.005
    low = (some * (values[-rank:] - rest)) @ some.T + rest * np.eye(size)
    kinds = {
        "number": (0.09, None, 0.09 * np.eye(size)),
        "variances": (variances, None, np.diag(variances.ravel())),
        "matrix": (matrix, None, matrix),
        "low rank": ((values[-rank:], some, rest), None, low),
    }
    if len(shape) == 3:
        kinds["cosine"] = variances, gd.CosineBasis(), None
    found = {}
    for name, (covariance, basis, dense) in kinds.items():
        if dense is None:
            turn = dense_of(gd.CosineBasis(), shape)
            dense = (turn.T * variances.ravel()) @ turn
        found[name] = gd.NormalData(mean, covariance, basis=basis), dense
    return found


def dense_of(basis, shape):
    size = math.prod(shape)
    return (
        np.asarray(basis.forward(jnp.eye(size).reshape(size, *shape))).reshape(size, -1).T
    )


def rows(state, number):
    parts = [np.asarray(x, float).reshape(number, -1) for x in jtu.tree_leaves(state)]
    return np.concatenate(parts, 1)


def dense_law(process, t, u, mean, covariance):
    """Posterior mean, score and log density, in the basis of states."""
    size = math.prod(process.shape)
    noise = np.asarray(process.covariance(t).as_matrix())
    signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
    turn = dense_of(process.basis, process.shape)
    signal = np.asarray(signal.as_matrix())[:, :size] @ turn
    total = signal @ covariance @ signal.T + noise
    residual = u - signal @ np.ravel(mean)
    pull = np.linalg.solve(total, residual.T).T
    data = np.ravel(mean) + pull @ signal @ covariance
    volume = np.linalg.slogdet(2 * np.pi * total)[1]
    return data @ turn.T, -pull, -0.5 * ((residual * pull).sum(1) + volume)


@ft.cache
def _laws(name):
    """All that is known of a state, for several data at once, in one program."""
    process = processes[name]()

    @jax.jit
    def laws(t, u, data):
        return {key: x.law(Channel.of(process, t), u) for key, x in data.items()}

    return laws


def states_of(process, t, mean, number=3):
    x = mean[None] + 0.7 * jr.normal(jr.key(0), (number, *mean.shape))
    return process.perturb(jr.key(1), x, t)[0]


# Two normals of equal form, which overlap.
def mixture_of(x, covariance):
    wider = gd.NormalData(x.mean + 0.3, 0.5 * covariance)
    normals = [gd.NormalData(x.mean, covariance), wider]
    return gd.GaussianMixture(normals, weights=[0.3, 0.7])


def dense_mixture(process, t, u, mixture, covariance):
    laws = [
        dense_law(process, t, u, mean, scale * covariance)
        for mean, scale in zip(mixture.means, (1, 0.5), strict=True)
    ]
    joint = np.log(mixture.weights)[:, None] + np.stack([x[2] for x in laws])
    density = np.logaddexp(*joint)
    shares = np.exp(joint - density)[:, :, None]
    return *[(shares * np.stack([x[i] for x in laws])).sum(0) for i in (0, 1)], density


@pytest.mark.x64
@every_process
def test_predictions_and_log_density(name):
    """To the accuracy of the dense solution, and in float32 to that of float32."""
    process = processes[name]()
    kinds = normals_for(process.shape)
    data: dict = {kind: x for kind, (x, _) in kinds.items()}
    normal, covariance = kinds["matrix"]
    data["mixture"] = mixture_of(normal, covariance)
    for t in (process.t_min, 0.3 * process.t_max, process.t_max):
        t = jnp.asarray(t)
        u = states_of(process, t, normal.mean)
        at = process, t, rows(u, 3)
        wanted = {kind: dense_law(*at, x.mean, c) for kind, (x, c) in kinds.items()}
        wanted["mixture"] = dense_mixture(*at, data["mixture"], covariance)
        for key, law in _laws(name)(t, u, data).items():
            found = rows(law.data, 3), -rows(law.pull, 3), np.asarray(law.log_density)
            for x, y in zip(found, wanted[key], strict=True):
                assert np.abs(x - y).max() <= 1e-10 * max(1, np.abs(y).max()), key

        single = cast((t, u, data), jnp.float32)
        exact = _laws(name)(*cast(single, jnp.float64))
        found = _laws(name)(*single)
        for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(exact), strict=True):
            assert x.dtype == jnp.float32
            error = max_difference(x.astype(float), y) / max(1, jnp.abs(y).max())
            assert error <= 1e-5


@pytest.mark.parametrize("name", ["vp", "cld", "bdm", "rectified"])
def test_models_predict_what_the_law_says(name):
    process = processes[name]()
    x = normals_for(process.shape)["low rank"][0]
    t = jnp.asarray(0.2)
    u = states_of(process, t, x.mean)
    law = x.law(Channel.of(process, t), u)
    flow = lambda kind: gd.ProbabilityFlow(process, x.model(process, kind), kind)
    kinds = ["data", "noise", "score"] + ["v", "flow"] * (process.num_components == 1)
    for kind in kinds:
        data = process.decode(flow(kind).denoised(t, u, None))
        tolerance = 1e-10 if X64 else 2e-4
        assert max_difference(process.basis.forward(data), law.data) <= tolerance
    score = x.model(process, "score")(t, process.to_data(u), None)
    density = lambda u: x.log_density(u, process, t).sum()
    gradient = process.to_data(jax.grad(density)(u))
    assert max_difference(gradient, score) <= (1e-10 if X64 else 1e-4)


@pytest.mark.parametrize("name", ["vp", "cld", "third_order", "bdm"])
def test_at_time_0(name):
    """Where there may be no noise."""
    process = processes[name]()
    t = jnp.asarray(0.0)
    for kind, (x, covariance) in normals_for(process.shape).items():
        u = states_of(process, t, x.mean)
        ask = lambda kind: x.model(process, kind)(t, process.to_data(u), None)
        mean, score, _ = dense_law(process, t, rows(u, 3), x.mean, covariance)
        found = rows(process.from_data(ask("score")), 3)
        size = np.abs(score).max()
        assert np.abs(found - score).max() <= (1e-9 if X64 else 1e-4) * size, kind
        data = process.basis.forward(jtu.tree_leaves(ask("data"))[0])
        np.testing.assert_allclose(rows(data, 3), mean, atol=1e-9 if X64 else 1e-5)


def test_at_time_0_without_variance():
    for process in (gd.VP((3,)), gd.CLD((3,))):
        x = gd.NormalData(jnp.zeros(3), (np.ones(1), np.eye(3)[:, :1], 0.0))
        u = process.encode(jnp.array([2.0, 0.0, 0.0]))
        data = jtu.tree_leaves(x.model(process, "data")(jnp.asarray(0.0), u, None))[0]
        np.testing.assert_allclose(data, [2, 0, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["number", "variances", "matrix", "low rank"])
def test_without_signal(kind):
    x = normals_for((3,))[kind][0]
    process, one = gd.RectifiedFlow((3,)), jnp.asarray(1.0)
    u = jr.normal(jr.key(0), (5, 3))
    for predicts, wanted in [
        ("data", jnp.broadcast_to(x.mean, u.shape)),
        ("noise", u),
        ("flow", u - x.mean[None]),
    ]:
        found = x.model(process, predicts)(one, u, None)
        assert max_difference(found, wanted) <= (1e-12 if X64 else 1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_data_of_one_dimension(shape):
    process, variance, t = gd.VP(shape), 0.3, jnp.asarray(0.4)
    u = jnp.linspace(-1, 1, 4).reshape(4, *shape)
    eigen = (np.array([variance]), np.ones((1, 1)), 0.1)
    forms = [variance, np.full(shape, variance), [[variance]], eigen]
    for covariance in forms[:2] if shape == (1, 1, 1) else forms:
        x = gd.NormalData(jnp.full(shape, 0.5), covariance)
        assert x.sample(jr.key(0), 2).shape == (2, *shape)
        data = x.model(process, "data")(t, u, None)
        signal, noise = (
            f(t).blocks[0, 0]
            for f in (lambda t: process.transition(t, 0 * t), process.covariance)
        )
        gain = variance * signal / (variance * signal**2 + noise)
        assert max_difference(data, 0.5 + gain * (u - signal * 0.5)) <= 1e-6
        normal = np.exp(x.log_density(u))
        wanted = np.exp(-((u - 0.5) ** 2) / 2 / variance) / (2 * np.pi * variance) ** 0.5
        np.testing.assert_allclose(normal, wanted.reshape(4), rtol=1e-5)


@pytest.mark.parametrize("kind", ["number", "variances", "matrix", "low rank", "cosine"])
def test_samples_have_the_moments(kind):
    x, covariance = normals_for((2, 3, 1))[kind]
    n = 20_000
    samples = np.asarray(x.sample(jr.key(0), n), float)
    assert samples.shape == (n, 2, 3, 1) and x.sample(jr.key(0), 0).shape == (0, 2, 3, 1)
    samples = samples.reshape(n, -1)
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((samples.mean(0) - np.ravel(x.mean)) / scale).max() <= 5 / n**0.5
    error = (np.cov(samples.T) - covariance) / np.outer(scale, scale)
    assert np.abs(error).max() <= 5 * (2 / n) ** 0.5


def test_samples_of_a_mixture_have_its_moments():
    x, covariance = normals_for((2, 3, 1))["matrix"]
    mixture, n = mixture_of(x, covariance), 20_000
    samples = np.asarray(mixture.sample(jr.key(0), n), float).reshape(n, -1)
    means, weights = np.asarray(mixture.means).reshape(2, -1), np.array([0.3, 0.7])
    around = means - weights @ means
    total = 0.65 * covariance + (weights[:, None] * around).T @ around
    scale = np.sqrt(np.diag(total))
    error = (np.cov(samples.T) - total) / np.outer(scale, scale)
    assert np.abs(error).max() <= 5 * (2 / n) ** 0.5
    density = mixture.log_density(jnp.asarray(samples[:5].reshape(5, 2, 3, 1)))
    assert density.shape == (5,)


def test_isotropic_mixtures_have_the_density_of_their_components():
    means = np.array([[-1.0, 0.0], [2.0, 0.5], [0.0, 0.0]])
    mixture = gd.GaussianMixture(means, 0.4, [0.5, 0.3, 0.2])
    alike = gd.GaussianMixture([gd.NormalData(m, 0.16) for m in means], weights=[5, 3, 2])
    process, t = gd.CLD((2,)), jnp.asarray(0.5)
    u = process.prior(jr.key(0), (7,))
    for kind in ("data", "noise", "score"):
        one, other = (x.model(process, kind)(t, u, None) for x in (mixture, alike))
        assert max_difference(one, other) <= (1e-11 if X64 else 1e-4)
    same = [x.log_density(u, process, t) for x in (mixture, alike)]
    assert max_difference(*same) <= (1e-11 if X64 else 1e-4)


def test_labels_choose_the_component():
    x, covariance = normals_for((3,))["matrix"]
    mixture = mixture_of(x, covariance)
    parts = [x, gd.NormalData(x.mean + 0.3, 0.5 * covariance)]
    labelled = gd.GaussianMixture(parts, weights=[0.3, 0.7], labelled=True)
    process, t = gd.VP((3,)), jnp.asarray(0.3)
    u = process.prior(jr.key(0), (4,))
    model = labelled.model(process, "data")
    both = [part.model(process, "data")(t, u, None) for part in (*parts, mixture)]
    found = eqx.filter_jit(model)(t, u, jnp.array([0, 1, 2, 5]))
    for i in range(3):
        assert max_difference(found[i], both[i][i]) <= 1e-6
    assert jnp.isnan(found[3]).all()
    flow = gd.ProbabilityFlow(process, model)
    guided = gd.classifier_free_guidance(flow, scale=1.0).model
    assert max_difference(guided(t, u, jnp.array([0, 1, 2, 0]))[:3], found[:3]) <= 1e-5
    assert gd.sample(flow, jr.key(0), 4, 3, args=jnp.arange(4) % 3).x.shape == (4, 3)
    with pytest.raises(ValueError, match="labels from 0 to 2.*got"):
        gd.sample(flow, jr.key(0), 4, 3, args=jnp.arange(4))
    with pytest.raises(ValueError, match="needs the label of each sample"):
        gd.sample(flow, jr.key(0), 4, 3)
    gradient = jax.grad(lambda u: model(t, u, jnp.array([0, 1, 2, 0])).sum())(u)
    assert jnp.isfinite(gradient).all()


# From samples


def samples_for(shape, n=400):
    x, _ = normals_for(shape)["matrix"]
    return np.asarray(x.sample(jr.key(3), n), np.float64)


def dense_covariance(x):
    """Of normal data, by products with the unit vectors."""
    size, c = math.prod(x.shape), x.covariance
    turn = dense_of(c.basis, x.shape)
    matrix = (turn.T * np.broadcast_to(c.variances, x.shape).ravel()) @ turn
    if c.vectors is not None:
        matrix = matrix + (np.asarray(c.vectors) * np.asarray(c.excess)) @ c.vectors.T
    return matrix.reshape(size, size)


tight = 1e-12 if X64 else 1e-5


def test_moments_are_those_of_the_samples():
    x = samples_for((4, 3, 1)) + 100
    flat = x.reshape(len(x), -1)
    found = gd.NormalData.from_samples(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=tight)
    exact = np.cov(flat.T)
    assert np.abs(dense_covariance(found) - exact).max() <= tight
    for basis in (gd.IdentityBasis(), gd.CosineBasis()):
        turn = dense_of(basis, (4, 3, 1))
        found = gd.NormalData.from_samples(x, basis=basis)
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=max(tight, 1e-11))
        variances = np.diag(turn @ exact @ turn.T).reshape(4, 3, 1)
        np.testing.assert_allclose(found.covariance.variances, variances, rtol=1e-5)


def test_data_in_any_form_give_the_same_moments():
    x = samples_for((4, 3, 1), 1300)
    labels = np.arange(len(x)) % 3
    batches = gd.training.Batches((x, labels), 64)
    forms = [
        jnp.asarray(x),
        (x, labels),
        batches,
        iter([x[:1], x[1:700], x[700:]]),
        (part for part in np.array_split(x, 9)),
    ]
    expected = dense_covariance(gd.NormalData.from_samples(x))
    for data in forms:
        found = dense_covariance(gd.NormalData.from_samples(data))
        assert np.abs(found - expected).max() <= tight


def test_images_are_scaled_as_in_training():
    levels = np.random.default_rng(0).integers(0, 256, (60, 2, 2, 1), np.uint8)
    scaled = gd.NormalData.from_samples(levels / 127.5 - 1)
    assert max_difference(gd.NormalData.from_samples(levels), scaled) <= 1e-6
    with pytest.raises(ValueError, match="int64, whose range is not known"):
        gd.NormalData.from_samples(levels.astype(np.int64))


def test_few_eigenvalues_without_the_matrix():
    """Far more batches than the sketch has rows, and those eigenvalues stand out."""
    random, size, rank = np.random.default_rng(0), 200, 5
    vectors = np.linalg.qr(random.normal(size=(size, size)))[0]
    std = np.concatenate([np.linspace(3, 2, rank), np.full(size - rank, 0.1)])
    x = random.normal(size=(3000, size)) * std @ vectors.T
    # The first come last.
    x = x[np.argsort(np.abs(x @ vectors[:, 0]))]
    found = gd.NormalData.from_samples(x, rank=rank).covariance
    values, exact = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(
        found.excess + found.variances, values[: -rank - 1 : -1], 1e-4
    )
    np.testing.assert_allclose(found.variances, values[:-rank].mean(), 1e-3)
    overlap = np.linalg.svd(found.vectors.T @ exact[:, -rank:])[1]
    assert overlap.min() >= 1 - 1e-6


def test_clusters_are_found():
    random = np.random.default_rng(0)
    centres = np.array([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]])
    which = random.choice(3, p=[0.5, 0.3, 0.2], size=2000)
    x = centres[which] + random.normal(size=(2000, 2)) * [0.3, 0.6]
    for data in (x, gd.training.Batches(x, 300)):
        found = gd.GaussianMixture.from_samples(data, 3, key=jr.key(0))
        order = np.argsort(-np.asarray(found.weights))
        for i, k in enumerate(order):
            own = x[which == i]
            np.testing.assert_allclose(found.weights[k], len(own) / len(x), rtol=1e-5)
            np.testing.assert_allclose(found.means[k], own.mean(0), atol=1e-5)
            part = jtu.tree_map(lambda y, k=k: y[k], found.covariances)
            part = eqx.tree_at(lambda z: z.covariance, normals_for((2,))["matrix"][0], part)
            np.testing.assert_allclose(dense_covariance(part), np.cov(own.T), atol=1e-5)


def test_classes_have_their_own_moments():
    x = samples_for((3,))
    labels = np.where(x[:, 0] > 0, 1, 0)
    found = gd.GaussianMixture.from_samples((x, labels), 2, labelled=True)
    assert found.model(gd.VP((3,))).no_condition == 2
    for i in range(2):
        own = gd.NormalData.from_samples(x[labels == i])
        np.testing.assert_allclose(found.means[i], own.mean, rtol=1e-6)
        np.testing.assert_allclose(found.weights[i], (labels == i).mean(), rtol=1e-6)


_eye, _zero = np.eye(3), np.zeros(3)
_normal = ft.partial(gd.NormalData, _zero)
_from = gd.NormalData.from_samples
_clusters = ft.partial(gd.GaussianMixture.from_samples, key=jr.key(0))
_random = np.random.default_rng(0).normal(size=(20, 3))
bad_arguments = {
    "mean is NaN": (lambda: gd.NormalData([math.nan], 1.0), "`mean` must be finite"),
    "mean is text": (lambda: gd.NormalData("x", 1.0), "`mean` must be real numbers"),
    "another shape": (lambda: _normal(np.ones(4)), r"of shape \(3,\).*got \(4,\)"),
    "of the matrix": (lambda: _normal(np.eye(4)), r"got \(4, 4\)"),
    "two parts": (lambda: _normal((np.ones(3), _eye)), r"got \(3,\) and \(3, 3\)"),
    "no part": (lambda: _normal(()), "got nothing"),
    "vectors": (lambda: _normal((np.ones(2), _eye, 0.1)), r"got \(2,\) and \(3, 3\)"),
    "no vectors": (lambda: _normal((np.ones(0), _eye[:, :0], 0.1)), r"got \(0,\)"),
    "not finite": (lambda: _normal(math.inf), "holds NaN or infinity"),
    "negative": (lambda: _normal([1.0, -2.0, 1.0]), "not be negative; got -2.0"),
    "not symmetric": (lambda: _normal(_eye + np.eye(3, k=1)), "must be symmetric"),
    "indefinite": (lambda: _normal(np.diag([1, 2, -0.5])), "semidefinite.*-0.5.*is 2"),
    "not largest": (lambda: _normal((np.ones(1), _eye[:, :1], 2.0)), "largest.*1.*2"),
    "negative rest": (lambda: _normal((np.ones(1), _eye[:, :1], -1.0)), "semidefinite"),
    "not orthonormal": (lambda: _normal((np.ones(1), 2 * _eye[:, :1], 0.1)), "orthonormal"),
    "basis": (lambda: _normal(1.0, basis="cosine"), "`basis` must be such as"),
    "basis of matrix": (
        lambda: _normal(_eye, basis=gd.FourierBasis()),
        "`basis` is for variances",
    ),
    "process": (lambda: _normal(1.0).model(gd.VP((2,))), r"\(3,\).*\(2,\)"),
    "covariance of another": (
        lambda: gd.NormalData(np.zeros(2), _normal(_eye).covariance),
        "not that of data of shape",
    ),
    "no process": (lambda: _normal(1.0).model("vp"), "`process` must be"),
    "prediction": (lambda: _normal(1.0).model(gd.CLD((3,)), "v"), "not defined for CLD"),
    "density": (lambda: _normal(1.0).log_density(jnp.ones((2, 4))), r"got \(2, 4\)"),
    "integers": (lambda: _normal(1.0).log_density(jnp.ones(3, int)), "floating-point"),
    "forms": (
        lambda: gd.GaussianMixture([_normal(1.0), _normal(_eye)]),
        "all of the same form",
    ),
    "scale too": (lambda: gd.GaussianMixture([_normal(1.0)], 0.3), "no `scale`"),
    "too few": (lambda: _from(_random[:3]), r"at least 4 samples.*got 3.*`rank=`"),
    "too few for rank": (lambda: _from(_random[:2], rank=2), "at least 3 samples.*got 2"),
    "too few for basis": (
        lambda: _from(_random[:1], basis=gd.IdentityBasis()),
        "at least 2 samples.*got 1",
    ),
    "rank": (lambda: _from(_random, rank=3), "`rank` must be less than 3"),
    "rank of zero": (lambda: _from(_random, rank=0), "`rank` must be a positive"),
    "basis and rank": (
        lambda: _from(_random, rank=1, basis=gd.IdentityBasis()),
        "not both",
    ),
    "constant": (lambda: _from(np.full((9, 3), 0.1)), "All samples are equal"),
    "no samples": (lambda: _from(iter([])), "must hold samples; got none"),
    "no rows": (lambda: _from(np.ones((0, 3))), "must hold samples; got none"),
    "a list": (lambda: _from([_random]), "must be an array, a pair of arrays"),
    "NaN": (
        lambda: _from(iter([_random, np.full((2, 3), np.nan)])),
        "must be finite, but 2 of 2",
    ),
    "shapes differ": (lambda: _from(iter([_random, _random[:, :2]])), r"\(20, 2\) after"),
    "complex": (lambda: _from(_random + 1j), "must be real"),
    "a sample": (lambda: _from(np.float64(1.0)), r"shape \(\)"),
    "few clusters": (lambda: _clusters(np.ones((9, 3)), 2), "fewer than 2 different"),
    "iterator": (lambda: _clusters(iter([_random]), 2), "read twice"),
    "few in one": (
        lambda: _clusters(np.concatenate([_random, _random[:2] + 99]), 2),
        "in component",
    ),
    "no labels": (lambda: _clusters(_random, 2, labelled=True), "must be pairs"),
    "labels": (
        lambda: _clusters((_random, np.arange(20) % 3), 2, labelled=True),
        "from 0 to 1",
    ),
    "number of labels": (
        lambda: _clusters((_random, np.arange(3)), 2, labelled=True),
        "one label per sample",
    ),
    "no key": (lambda: gd.GaussianMixture.from_samples(_random, 2), "`key` must be"),
}


@pytest.mark.parametrize("case", bad_arguments)
def test_bad_arguments_raise_and_are_named(case, without_type_checks):
    build, message = bad_arguments[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_construction_can_be_traced_and_differentiated():
    process, t = gd.VP((3,)), jnp.asarray(0.3)
    u, mean = process.prior(jr.key(0), (2,)), jnp.array([0.1, 0.2, 0.3])
    _, covariance = normals_for((3,))["matrix"]
    covariance = jnp.asarray(covariance)

    def density(mean, covariance):
        return gd.NormalData(mean, covariance).log_density(u, process, t).sum()

    gradient = jax.jit(jax.grad(density, (0, 1)))(mean, covariance)
    for direction in np.eye(3):
        h = 1e-4 if X64 else 1e-2
        ends = [density(mean + s * h * jnp.asarray(direction), covariance) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(
            gradient[0] @ direction, slope, atol=1e-5 if X64 else 0.1
        )
    assert jnp.isfinite(gradient[1]).all()
    models = jax.vmap(lambda m: gd.NormalData(m, 0.2).model(process, "data"))
    each = models(jnp.stack([mean, mean + 1]))
    found = jax.vmap(lambda model: model(t, u, None))(each)
    alone = gd.NormalData(mean + 1, 0.2).model(process, "data")(t, u, None)
    assert max_difference(found[1], alone) <= 1e-6


def test_batches_may_be_empty_and_states_half_precision():
    process = gd.CLD((3,))
    for x, _ in normals_for((3,)).values():
        single = process.prior(jr.key(0), (2,), jnp.float32)
        assert x.log_density(single, process, 0.4).dtype == jnp.float32
        model = x.model(process, "data")
        for batch in [(), (0,), (2, 0)]:
            u = process.prior(jr.key(0), batch)
            assert model(jnp.asarray(0.4), u, None).x.shape == (*batch, 3)
            assert x.log_density(u, process, 0.4).shape == batch
        half = process.prior(jr.key(0), (2,), jnp.bfloat16)
        assert model(jnp.asarray(0.4), half, None).x.dtype == jnp.bfloat16


def test_saving_and_loading(tmp_path):
    x, covariance = normals_for((2, 3, 1))["matrix"]
    kinds = {kind: x for kind, (x, _) in normals_for((2, 3, 1)).items()}
    network = gd.nn.presets.mlp((8, 8, 1), width=4, key=jr.key(0))
    scales = np.linspace(1, 2, 64).reshape(8, 8, 1)
    data = gd.NormalData(np.zeros((8, 8, 1)), scales, basis=gd.CosineBasis())
    kinds["model"] = gd.nn.NetworkModel(gd.VP((8, 8, 1)), network, data=data)
    for kind, x in kinds.items():
        gd.checkpoints.save(tmp_path / kind, x)
        assert eqx.tree_equal(gd.checkpoints.load(tmp_path / kind), x)
    mixture = mixture_of(kinds["matrix"], covariance)
    gd.checkpoints.save(tmp_path / "mixture", mixture)
    blank = jtu.tree_map(jnp.zeros_like, mixture)
    assert eqx.tree_equal(gd.checkpoints.load(tmp_path / "mixture", like=blank), mixture)
