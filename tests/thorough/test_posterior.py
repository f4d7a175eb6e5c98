"""Samples given a measurement, against posteriors in closed form."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import max_difference, prior_state, slow


_rng = np.random.default_rng(0)
_shape = (4, 4, 1)
_processes = {
    "vp": gd.VP(_shape),
    "cld": gd.CLD(_shape),
    "bdm": gd.BDM(_shape),
    "psld": gd.PSLD(_shape, 0.5),
    "blurring_cld": gd.BlurringCLD(_shape),
}
_matrix = jnp.asarray(_rng.normal(size=(3, 16)))


def _measure(x):
    return x.reshape(*x.shape[:-3], 16) @ _matrix.T


def _posterior(y, mean, std, noise):
    """Of normal data."""
    A = np.asarray(_matrix)
    gain = std**2 * A.T @ np.linalg.inv(std**2 * A @ A.T + noise**2 * np.eye(3))
    covariance = std**2 * (np.eye(16) - gain @ A)
    return mean + gain @ (y - A @ mean), covariance


@pytest.mark.x64
@pytest.mark.parametrize("name", _processes)
def test_normal_data_have_their_posterior(name):
    process, std, noise = _processes[name], 0.7, 0.3
    mean = _rng.normal(size=16)
    data = gd.GaussianMixture(mean.reshape(1, *_shape), std)
    flow = gd.ProbabilityFlow(process, data.model(process))
    y = np.array([1.0, -2.0, 0.5])
    expected, covariance = _posterior(y, mean, std, noise)
    guided = gd.posterior_guidance(flow, y, _measure, noise, num_iterations=3)
    # Exact for a single state, at any time: the mean of the data given it and `y`.
    t = 0.4 * process.t_max
    u = prior_state(process, (2,))
    with_std = gd.posterior_guidance(
        flow, y, _measure, noise, "pigdm", num_iterations=3, data_std=std
    )
    both = eqx.filter_jit(lambda models, u: [model(t, u, None) for model in models])
    one, other = both((guided.model, with_std.model), u)
    assert max_difference(one, other) < 1e-8
    if name not in ("vp", "cld", "bdm"):
        return
    x = gd.sample(guided, jax.random.key(0), 4000, 30).x.reshape(4000, 16)
    error = np.sqrt(np.diag(covariance) / 4000)
    assert (np.abs(x.mean(0) - expected) < 5 * error).all()
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.06)


@pytest.mark.x64
@pytest.mark.parametrize("predicts", ["v", *slow("data", "score")])
def test_every_prediction_is_guided_alike(predicts):
    process = _processes["vp"]
    data = gd.GaussianMixture(_rng.normal(size=(3, *_shape)), 0.3)
    u, y = prior_state(process, (2,)), jnp.asarray(_rng.normal(size=(2, 3)))
    found = []
    for kind in ("noise", predicts):
        flow = gd.ProbabilityFlow(process, data.model(process, kind))
        guided = gd.posterior_guidance(flow, y, _measure, 0.1)
        found.append(eqx.filter_jit(guided.denoised)(jnp.asarray(0.4), u, None))
    assert max_difference(*found) < 1e-9
    # A measurement for each sample: that of the other does not matter.
    alone = gd.posterior_guidance(flow, y[0], _measure, 0.1)
    alone = eqx.filter_jit(alone.denoised)(jnp.asarray(0.4), u[0], None)
    assert max_difference(alone, found[1][0]) < 1e-9


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, method",
    [
        *(("cld", "moments"), ("bdm", "moments"), ("vp", "pigdm"), ("cld", "dps")),
        *slow(("vp", "moments"), ("cld", "pigdm"), ("bdm", "pigdm")),
        *slow(("vp", "dps"), ("bdm", "dps")),
    ],
)
def test_samples_agree_with_the_measurement(name, method):
    process = _processes[name]
    data = gd.GaussianMixture(_rng.normal(size=(4, *_shape)), 0.2)
    truth = data.means[1].reshape(_shape)
    noise = 1.0 if method == "dps" else 0.05
    flow = gd.ProbabilityFlow(process, data.model(process))
    guided = gd.posterior_guidance(flow, _measure(truth), _measure, noise, method)
    x = gd.sample(guided, jax.random.key(0), 64, 40).x
    residual = jnp.abs(_measure(x) - _measure(truth)[None]).mean()
    free = gd.sample(flow, jax.random.key(0), 64, 40).x
    before = jnp.abs(_measure(free) - _measure(truth)[None]).mean()
    assert residual < 0.5 * before
    if method == "moments":
        # The mode that was measured is found.
        distance = jnp.linalg.norm((x - truth[None]).reshape(64, -1), axis=-1)
        assert jnp.median(distance) < 1.5 * 0.2 * 4


@pytest.mark.x64
def test_a_nonlinear_measurement():
    process = gd.VP((2,))
    data = gd.GaussianMixture(np.zeros((1, 2)), 1.0)
    radius = lambda x: jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    flow = gd.ProbabilityFlow(process, data.model(process))
    guided = gd.posterior_guidance(flow, jnp.array([1.5]), radius, 0.05)
    x = gd.sample(guided, jax.random.key(0), 200, 40).x
    assert jnp.median(jnp.abs(radius(x) - 1.5)) < 0.1
    assert (jnp.abs(x.mean(0)) < 0.4).all()


@pytest.mark.precision
def test_from_zero_signal_and_in_single_precision():
    process = gd.RectifiedFlow(_shape)
    data = gd.GaussianMixture(_rng.normal(size=(3, *_shape)), 0.3)
    flow = gd.ProbabilityFlow(process, data.model(process, "flow"), "flow")
    guided = gd.posterior_guidance(flow, np.ones(3), _measure_like, 0.1)
    x = gd.sample(guided, jax.random.key(0), 8, 20).x
    assert jnp.isfinite(x).all()


@pytest.mark.float32
@pytest.mark.parametrize("name", ["vp", *slow("cld", "bdm")])
def test_a_network_whose_covariance_is_not_symmetric(name):
    flow = gd.checkpoints.pretrained(f"fashion-mnist-{name}")
    lower = lambda x: x[..., 14:, :, :]
    y = lower(gd.sample(flow, jax.random.key(5), 1, 20).x[0])
    guided = gd.posterior_guidance(flow, y, lower, 0.05)
    x = gd.sample(guided, jax.random.key(1), 2, 20).x
    assert jnp.abs(x).max() < 1.5
    assert jnp.sqrt(((lower(x) - y[None]) ** 2).mean()) < 0.06


@pytest.mark.x64
def test_derivatives_are_finite_after_convergence():
    process = gd.VP((2,))
    data = gd.GaussianMixture(np.zeros((1, 2)), 1.0)
    flow = gd.ProbabilityFlow(process, data.model(process))
    u = jnp.ones((4, 2))

    @jax.jit
    def total(y):
        guided = gd.posterior_guidance(flow, y, lambda x: x, 0.1, num_iterations=9)
        return guided.model(0.5, u, None).sum()

    y = jnp.array([1.0, -0.5])
    found = jax.grad(total)(y)
    step = 1e-5 * jnp.eye(2)
    expected = [(total(y + s) - total(y - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.x64
def test_guidance_begins_where_there_is_no_signal():
    process = gd.RectifiedFlow((1,))
    data = gd.GaussianMixture([[1.0]], 0.7)
    flow = gd.ProbabilityFlow(process, data.model(process, "flow"), "flow")
    guided = gd.posterior_guidance(flow, np.array([3.0]), lambda x: x, 0.3)
    mean = 1 + 2 * 0.49 / (0.49 + 0.09)
    got = guided.denoised(1.0, jnp.zeros((1, 1)), None)
    np.testing.assert_allclose(got, mean, rtol=1e-3)


def _measure_like(x):
    return x.reshape(*x.shape[:-3], 16) @ _matrix.T.astype(x.dtype)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(measurement=3), "`measurement` must be callable"),
        (dict(method="best"), "`method` must be 'moments'"),
        (dict(noise=0.0), "`noise` must be positive"),
        (dict(num_iterations=0), "`num_iterations` must be a positive integer"),
        (dict(y=np.ones(3) * 1j), "`y` must be real"),
        (
            dict(y=np.ones(4)),
            r"`y` has shape \(4,\);.* must be \(3,\) for all.* or \(2, 3\)",
        ),
        (dict(y=np.ones((4, 3))), r"`y` has shape \(4, 3\); for a batch of shape \(2,\)"),
        (dict(measurement=lambda x: x.sum()), r"returned an array of shape \(\)"),
    ],
)
def test_bad_arguments(arguments, message, without_type_checks):
    process = _processes["vp"]
    data = gd.GaussianMixture(np.zeros((1, *_shape)))
    flow = gd.ProbabilityFlow(process, data.model(process))
    options = dict(y=np.ones(3), measurement=_measure, noise=0.1) | arguments
    with pytest.raises(ValueError, match=message):
        guided = gd.posterior_guidance(flow, **options)
        guided.model(0.5, prior_state(process, (2,)), None)


# One measurement, or scale, per sample

_plane = gd.VP((2,))
_exact = gd.GaussianMixture(np.array([[0.0, 1.0], [2.0, 3.0]]), 0.3).model(_plane)
_flow = gd.ProbabilityFlow(_plane, _exact)


def _first(x):
    return x[..., :1]


def _guided(y):
    return gd.posterior_guidance(_flow, y, _first, 0.2)


def _scaled(scale):
    less = gd.ProbabilityFlow(_plane, lambda t, u, args: 0.9 * _exact(t, u, args))
    return gd.classifier_free_guidance(_flow, less, scale)


def _by_likelihood(scale):
    likelihood = lambda t, u, args: -(u**2).sum(-1)
    return gd.classifier_guidance(_flow, likelihood, 0.1 * scale)


_six = np.linspace(0.0, 2.0, 6)
_per_sample = {
    "y": lambda rows: _guided(rows[:, None]),
    "scale": _scaled,
    "gradient": _by_likelihood,
    "nested": lambda rows: gd.data_guidance(_guided(rows[:, None]), gd.Clip(-9, 9)),
    "two": lambda rows: gd.classifier_free_guidance(
        gd.ProbabilityFlow(
            _plane, gd.WithTime(_plane, _guided(rows[:, None]).model, lambda t: t)
        ),
        _flow,
        rows,
    ),
}


def _draw(flow, number, **options):
    return gd.sample(flow, jax.random.key(0), number, 2, **options).x


@pytest.mark.parametrize("make", _per_sample.values(), ids=_per_sample)
def test_rows_in_a_model_go_with_their_samples(make):
    whole = _draw(make(_six), 6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    same(_draw(make(_six), 6, batch_size=4), whole)
    same(_draw(make(_six[2:]), 4, first=2), whole[2:])
    if make is _per_sample["y"]:
        same(_draw(make(_six), 6, batch_size=8, placement=gd.Placement()), whole)
        same(_draw(make(_six[:1]), 1, batch_size=1), whole[:1])


@pytest.mark.parametrize("make", _per_sample.values(), ids=_per_sample)
def test_another_number_of_rows_is_refused(make):
    for options in (dict(), dict(batch_size=3), dict(batch_size=6)):
        with pytest.raises(ValueError, match="has 3 rows, one per sample, but 6 samples"):
            _draw(make(_six[:3]), 6, **options)
    with pytest.raises(ValueError, match="6 rows.* 4 samples are drawn, from 2 to 5"):
        _draw(make(_six), 4, first=2)


_out_of_reach = {
    "function": lambda flow: gd.ProbabilityFlow(
        _plane, lambda t, u, args: flow.model(t, u, args)
    ),
    "function of time": lambda flow: _scaled(lambda t: jnp.ones(3)),
    "own": lambda flow: gd.ProbabilityFlow(
        _plane, lambda t, u, args: _exact(t, u, args) + np.ones((3, 1))
    ),
    "data": lambda flow: gd.data_guidance(
        _flow, lambda t, x, args: jnp.where(x > 9, x, jnp.ones((3, 2)))
    ),
    "measurement": lambda flow: gd.posterior_guidance(
        _flow, np.ones(1), lambda x: np.ones((3, 1)) * x[..., :1], 0.1
    ),
}


@pytest.mark.x64
@pytest.mark.parametrize("wrap", _out_of_reach.values(), ids=_out_of_reach)
def test_rows_out_of_reach_are_not_reused_for_every_batch(wrap):
    flow = wrap(_guided(_six[:3, None]))
    with pytest.raises(
        ValueError, match="for batches of 3 samples only.*pass them as `arg"
    ):
        _draw(flow, 6, batch_size=3)


@pytest.mark.x64
def test_scales_are_per_sample_not_per_draw_or_coordinate():
    process, t, u = _plane, jnp.array(0.5), jnp.ones((3, 2))
    data = gd.GaussianMixture(np.array([[0.0, 1.0]]), 0.3)
    flow = gd.ProbabilityFlow(process, lambda t, u, args: u)
    normal = gd.ProbabilityFlow(process, data.model(process))
    guided = gd.classifier_free_guidance(flow, normal, np.ones(2)).model
    with pytest.raises(ValueError, match=r"batch axes, \(\); got shape \(2,\)"):
        guided(t, u[0], None)
    with pytest.raises(ValueError, match=r"batch axes, \(2, 3\); got shape \(2,\)"):
        guided(t, jnp.ones((2, 3, 2)), None)
    with pytest.raises(ValueError, match="`y` of `PosteriorGuidance` has one row per samp"):
        gd.fit_solver(_guided(np.ones((9, 1))), jnp.ones((9, 2)), 2, progress=False)


@pytest.mark.x64
def test_a_bound_repeats_rows_for_every_draw():
    process = gd.CLD((2,), gamma=0.1)
    data = gd.GaussianMixture(np.array([[0.0, 1.0]]), 0.3)
    flow = gd.ProbabilityFlow(process, data.model(process))
    grad = lambda t, u, args: -(u.x**2).sum(-1)
    options = dict(key=jax.random.key(0), num_draws=3, dt0=0.5)
    options |= dict(solver=dfx.Euler(), stepsize_controller=dfx.ConstantStepSize())

    def bound(scale, x):
        guided = gd.classifier_guidance(flow, grad, scale)
        return gd.log_likelihood_bound(guided, x, **options)

    x = jnp.asarray([[0.0, 1.0], [0.3, 0.8], [0.1, 1.2]])
    both = bound(np.array([0.0, 0.2, 0.4]), x).value
    for i, scale in enumerate((0.0, 0.2, 0.4)):
        np.testing.assert_allclose(both[i], bound(scale, x).value[i], rtol=1e-9)
