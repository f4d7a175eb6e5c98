"""Models that wrap models: guidance, and changes of the predicted data."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import max_difference, mixture_for, prior_state, processes, solve


_kinds = [
    ("vp", "v"),
    ("ve", "data"),
    ("cld", "noise"),
    ("cld", "data"),
    ("cld", "score"),
    ("bdm", "v"),
]


def _predicting(process, predicts, frame="R"):
    """The flow of a model of that kind, and of one that predicts noise."""
    noise = gd.ProbabilityFlow(process, mixture_for(process, scale=0.4).model(process))
    kind = gd.ProbabilityFlow(process, lambda t, u, args: u, predicts, frame)

    def model(t, u, args):
        u = process.from_data(u)
        return kind.prediction(t, u, noise.noise(t, u, args))

    return gd.ProbabilityFlow(process, model, predicts, frame), noise


@pytest.mark.parametrize("name, predicts", _kinds)
def test_predictions_are_the_inverse_of_noise(name, predicts):
    process = processes[name]()
    t, u = jnp.asarray(0.4 * process.t_max), prior_state(process, (2,))
    for frame in ("R", "cholesky"):
        flow, noise = _predicting(process, predicts, frame)
        tolerance = 1e-9 if jax.config.jax_enable_x64 else 2e-3
        expected = noise.noise(t, u, None)
        assert max_difference(flow.noise(t, u, None), expected) < tolerance


def test_classifier_free_guidance_is_linear_in_the_scale():
    process = gd.CLD((3,))
    flows = [
        gd.ProbabilityFlow(process, mixture_for(process, seed=k).model(process))
        for k in (0, 1)
    ]
    t, u = jnp.asarray(0.5), prior_state(process, (2,))
    a, b = (flow.model(t, u, None) for flow in flows)
    for scale in (0.0, 1.0, 2.5, lambda t: 5 * t):
        got = gd.classifier_free_guidance(*flows, scale).model(t, u, None)
        number = 2.5 if callable(scale) else scale
        expected = jtu.tree_map(lambda x, y, w=number: w * x + (1 - w) * y, a, b)
        assert max_difference(got, expected) < 1e-4


@pytest.mark.parametrize("name, predicts", _kinds)
def test_classifier_guidance_adds_a_gradient_to_the_score(name, predicts):
    process = processes[name]()
    flow, noise = _predicting(process, predicts)
    t, u = jnp.asarray(0.3 * process.t_max), prior_state(process, (2,))
    weights = jax.random.normal(jax.random.key(3), process.shape)

    def log_likelihood(t, u, args):
        x = jtu.tree_leaves(u)[-1]
        axes = tuple(range(-len(process.shape), 0))
        return -0.5 * (args[None] * x**2).sum(axes)

    guided = gd.classifier_guidance(flow, log_likelihood, 1.5)
    score = guided.score(t, u, weights)
    *rest, last = jtu.tree_leaves(process.to_data(u))
    gradient = [*map(jnp.zeros_like, rest), -1.5 * weights[None] * last]
    gradient = jtu.tree_unflatten(jtu.tree_structure(u), gradient)
    expected = jtu.tree_map(
        lambda a, b: a + b, noise.score(t, u, None), process.from_data(gradient)
    )
    size = max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(expected))
    tolerance = (1e-9 if jax.config.jax_enable_x64 else 3e-3) * size
    assert max_difference(score, expected) < tolerance


@pytest.mark.x64
def test_guidance_by_a_likelihood_samples_the_posterior():
    # Normal data and a linear measurement with noise: at every time the likelihood of the
    # noised state is known.
    process, noise = gd.VP((1,)), 0.3
    mixture = gd.GaussianMixture([[0.5]], 0.7)
    flow = gd.ProbabilityFlow(process, mixture.model(process))

    def log_likelihood(t, u, args):
        mean, std = (
            process.transition(t, jnp.zeros_like(t)).blocks[0, 0],
            process.factor(t).blocks[0, 0],
        )
        total = mean**2 * 0.49 + std**2
        x = flow.denoised(t, u, None)
        variance = 0.49 * std**2 / total + noise**2
        return -0.5 * (x[..., 0] - args) ** 2 / variance

    guided = gd.classifier_guidance(flow, log_likelihood)
    u, ts = process.prior(jax.random.key(0), (4000,)), gd.time_grid(process, 40)
    x = solve(guided, gd.GDDIM(), ts, u, args=jnp.asarray(-0.4))
    variance = 1 / (1 / 0.49 + 1 / noise**2)
    mean = variance * (0.5 / 0.49 - 0.4 / noise**2)
    assert abs(float(x.mean()) - mean) < 4 * np.sqrt(variance / 4000)
    np.testing.assert_allclose(x.std(), np.sqrt(variance), rtol=0.05)


def test_a_guided_model_predicts_what_the_model_does():
    process = gd.VP((3,))
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process, "v"))
    guided = gd.data_guidance(flow, gd.Clip())
    assert flow.predicts == guided.predicts == "v"
    with pytest.raises(ValueError, match="This DataGuidance predicts 'v'; got predicts='d"):
        gd.ProbabilityFlow(process, guided.model, "data")
    gd.ProbabilityFlow(process, guided.model, "v")


def test_data_are_changed_from_zero_signal():
    process = gd.RectifiedFlow((3,))
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process, "flow"))
    clipped = gd.data_guidance(flow, gd.Clip(-0.1, 0.1))
    x = gd.sample(clipped, jax.random.key(0), 4, 5).x
    assert (jnp.abs(x) < 0.1 + 1e-2).all()


@pytest.mark.parametrize("name, predicts", _kinds)
def test_predicted_data_are_changed(name, predicts):
    process = processes[name]()
    flow, noise = _predicting(process, predicts)
    t, u = jnp.asarray(0.3 * process.t_max), prior_state(process, (2,))
    before = noise.denoised(t, u, None)
    guided = gd.data_guidance(flow, lambda t, x, args: 0.5 * x + 1)
    after = guided.denoised(t, u, None)
    tolerance = 1e-8 if jax.config.jax_enable_x64 else 5e-3
    expected = 0.5 * process.decode(before) + 1
    np.testing.assert_allclose(process.decode(after), expected, atol=tolerance)
    for a, b in zip(jtu.tree_leaves(before)[1:], jtu.tree_leaves(after)[1:]):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.x64
@pytest.mark.parametrize("name", ("vp", "cld", "bdm"))
def test_known_data_are_reached(name):
    process = processes[name]()
    mask = np.zeros(process.shape, bool)
    mask[..., 0] = True
    known = jnp.full(process.shape, 0.25)
    function = lambda t, x, args: jnp.where(mask, args, x)
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    ts, u = gd.time_grid(process, 10), prior_state(process, (3,))
    y = solve(gd.data_guidance(flow, function), gd.GDDIM(), ts, u, args=known)
    x = process.decode(y)
    left = float(process.covariance(process.t_min).as_matrix()[0, 0]) ** 0.5
    np.testing.assert_allclose(x[..., mask], 0.25, atol=5 * left + 1e-3)
    assert float(jnp.median(jnp.abs(x[..., ~mask] - 0.25))) > 0.1


def test_clipping():
    x = jnp.array([-3.0, -0.5, 2.0])
    np.testing.assert_allclose(gd.Clip()(0.5, x, None), [-1, -0.5, 1])
    np.testing.assert_allclose(gd.Clip(0.0, 4.0)(0.5, x, None), [0, 0, 2])


def test_dynamic_thresholds_are_those_of_each_sample():
    threshold = gd.DynamicThreshold((2, 2), 0.75)
    x = jnp.array([[[0.1, -0.2], [0.3, 0.4]], [[1.0, -2.0], [3.0, 4.0]]])
    got = threshold(0.5, x, None)
    # Within the bound nothing changes.
    np.testing.assert_array_equal(got[0], x[0])
    limit = np.quantile(np.abs(np.asarray(x[1])), 0.75)
    np.testing.assert_allclose(got[1], np.clip(x[1], -limit, limit) / limit, rtol=1e-6)
    assert threshold(0.5, x[1], None).shape == (2, 2)


@pytest.mark.x64
def test_wrappers_nest_and_are_differentiated():
    process = gd.VP((2,))
    exact = mixture_for(process).model(process)
    flow = gd.classifier_free_guidance(
        gd.ProbabilityFlow(process, exact),
        gd.ProbabilityFlow(process, lambda t, u, args: 0.9 * exact(t, u, args)),
    )
    flow = gd.data_guidance(flow, gd.Clip())
    flow = gd.classifier_guidance(flow, lambda t, u, args: -(u**2).sum(-1), 0.1)
    ts, u = gd.time_grid(process, 4), prior_state(process, (3,))
    backward = dfx.RecursiveCheckpointAdjoint()
    loss = lambda u: (solve(flow, gd.GDDIM(), ts, u, adjoint=backward) ** 2).sum()
    assert jnp.isfinite(jax.grad(loss)(u)).all()


_process = gd.VP((2,))
_flow = gd.ProbabilityFlow(_process, mixture_for(_process).model(_process))
_u = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gd.classifier_free_guidance(_flow, 3), "`unconditional` must be a `Prob"),
        (lambda: gd.classifier_guidance(_flow, 3), "`log_likelihood` must be c"),
        (lambda: gd.data_guidance(_flow, None), "`function` must be callable"),
        (
            lambda: gd.classifier_guidance(_flow, lambda t, u, a: u.sum()).noise(
                0.5, _u, None
            ),
            r"one number per sample, of shape \(3,\); it returned \(\)",
        ),
        (
            lambda: gd.data_guidance(_flow, lambda t, x, a: x[0]).noise(0.5, _u, None),
            r"must return data of shape \(3, 2\); it returned \(2,\)",
        ),
        (lambda: gd.Clip(1.0, 1.0), "Need `low` < `high`; got 1.0 and 1.0"),
        (lambda: gd.DynamicThreshold((2,), 1.5), "Need 0 < `quantile` <= 1"),
    ],
)
def test_bad_input_is_refused(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        call()
