"""Log densities through the probability flow, against closed forms."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    CountedModel,
    every_process,
    mixture_for,
    prior_state,
    processes,
    slow,
)


_tight = dfx.PIDController(rtol=1e-10, atol=1e-10)
_log_density = eqx.filter_jit(gd.log_density)


class NormalScore(eqx.Module):
    """The score, and the log density, of normal data with a variance for each coordinate of
    the state, about a mean."""

    process: gd.AbstractProcess
    mean: jax.Array
    variances: jax.Array

    def moments(self, t):
        process, t = self.process, jnp.asarray(t)
        signal = process.transition(t, jnp.zeros_like(t)).blocks[0, 0]
        covariance = process.covariance(t).blocks[0, 0]
        return signal * self.mean, covariance + signal**2 * self.variances

    def __call__(self, t, u, args):
        mean, variance = self.moments(t)
        u = self.process.from_data(u)
        mean, variance = (jnp.broadcast_to(x, u.shape) for x in (mean, variance))
        return self.process.to_data((mean - u) / variance)

    def log_density(self, t, u):
        mean, variance = self.moments(t)
        mean, variance = (jnp.broadcast_to(x, u.shape) for x in (mean, variance))
        terms = (u - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)
        return -0.5 * terms.sum(tuple(range(-len(self.process.shape), 0)))


@pytest.mark.x64
@pytest.mark.parametrize("process", (gd.VP((2,)), gd.VE((2,)), gd.SubVP((2,))))
def test_a_normal_from_time_zero(process):
    # As under VE there is some noise at time 0 already, with so much less in the data.
    variance = 0.49 - process.covariance(0.0).blocks[0, 0]
    score = NormalScore(process, jnp.zeros(2), jnp.full(2, variance))
    flow = gd.ProbabilityFlow(process, score, "score")
    got = gd.log_likelihood(
        flow,
        jnp.array([[0.3, -0.7]]),
        t0=0.0,
        solver=dfx.Dopri8(),
        stepsize_controller=_tight,
        prior_log_density=lambda u: score.log_density(process.t_max, u),
    )
    np.testing.assert_allclose(got.value, [-1.7163639132], atol=1e-8)


@pytest.mark.x64
def test_the_joint_density_of_position_and_velocity():
    process = gd.CLD((1,), epsilon=1e-9)
    flow = gd.ProbabilityFlow(process, gd.GaussianMixture([[0.0]], 0.7).model(process))
    u = gd.Phase(jnp.array([0.3]), jnp.array([-0.05]))
    got = gd.log_density(flow, u, t0=0.0, solver=dfx.Dopri8(), stepsize_controller=_tight)
    assert got.value.shape == ()
    # The prior is within 3e-5 of where the flow ends.
    np.testing.assert_allclose(got.value, 0.6045462358, atol=1e-4)


@pytest.mark.x64
def test_normal_images_under_blurring():
    process = gd.BDM((4, 6, 2))
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=process.shape))
    variances = jnp.asarray(rng.uniform(0.1, 1, process.shape))
    score = NormalScore(process, mean, variances)
    flow = gd.ProbabilityFlow(process, score, "score")
    x = process.decode(mean[None] + jnp.asarray(rng.normal(size=(3, 4, 6, 2))))
    got = gd.log_likelihood(
        flow,
        x,
        solver=dfx.Dopri8(),
        stepsize_controller=_tight,
        prior_log_density=lambda u: score.log_density(process.t_max, u),
    )
    expected = score.log_density(process.t_min, process.encode(x))
    # Of data, which the process may scale, not of states.
    expected += math.prod(process.shape) * math.log(process.data_scale)
    np.testing.assert_allclose(got.value, expected, atol=1e-6)


@every_process
def test_the_prior_has_the_density_of_its_draws(name):
    process = processes[name]()
    u = process.prior(jax.random.key(0), (2, 500))
    values = process.prior_log_density(u)
    assert values.shape == (2, 500)
    size = process.num_components * math.prod(process.shape)
    factor = process.prior_factor().as_matrix()
    entropy = np.linalg.slogdet(factor)[1] + 0.5 * size * math.log(2 * math.pi * math.e)
    # The mean of a sum of squares of `size` normals, to four standard errors.
    assert abs(float(values.mean()) + entropy) < 4 * math.sqrt(0.5 * size / 1000)


@pytest.mark.x64
def test_a_mixture_in_one_dimension_integrates_to_one():
    process = gd.VP((1,))
    mixture = gd.GaussianMixture([[-1.0], [1.5]], 0.3, [0.4, 0.6])
    x = jnp.linspace(-3, 3.5, 400)[:, None]
    got = gd.log_likelihood(gd.ProbabilityFlow(process, mixture.model(process)), x)
    assert abs(float(np.trapezoid(np.exp(got.value), x[:, 0])) - 1) < 1e-4


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, divergence",
    [
        ("cld", "rademacher"),
        ("bdm", "rademacher"),
        ("bdm", "gaussian"),
        *slow(("vp", "rademacher"), ("vp", "gaussian"), ("cld", "gaussian")),
    ],
)
def test_probes_are_unbiased(name, divergence):
    process = processes[name]()
    flow = gd.ProbabilityFlow(process, mixture_for(process, scale=0.5).model(process))
    u = prior_state(process, (2,))
    solve = lambda key, number, how: (
        _log_density(flow, u, key, divergence=how, num_probes=number).value
    )
    exact = solve(None, 1, "exact")
    estimates = np.stack([solve(jax.random.key(k), 64, divergence) for k in range(12)])
    error = estimates.std(0, ddof=1) / np.sqrt(12)
    assert (np.abs(estimates.mean(0) - exact) < 4.5 * error + 1e-4).all()
    assert (error > 1e-6).all()


@pytest.mark.x64
@pytest.mark.parametrize(
    "process", (gd.RectifiedFlow((2,), shift=3.0), gd.TrigonometricFlow((2,)))
)
@pytest.mark.parametrize("predicts", ("flow", "data", "v"))
def test_from_a_start_without_signal(process, predicts):
    data = gd.GaussianMixture([[0.5, -0.3]], 0.7)
    flow = gd.ProbabilityFlow(process, data.model(process, predicts), predicts)
    t, x = process.t_min, jnp.array([[0.2, -1.0], [1.5, 0.3]])
    signal = process.transition(t, 0.0).blocks.squeeze()
    variance = process.covariance(t).blocks.squeeze() + 0.49 * signal**2
    distance = ((x - signal * data.means) ** 2).sum(-1) / variance
    exact = -0.5 * distance - jnp.log(2 * jnp.pi * variance)
    for key, how in ((None, "exact"), (jax.random.key(0), "rademacher")):
        got = gd.log_likelihood(flow, x, key, divergence=how)
        np.testing.assert_allclose(got.value, exact, atol=1e-3)


@pytest.mark.x64
def test_the_bound_is_below_the_density_by_the_divergence_of_velocities():
    process = gd.CLD((1,))
    # Normal data: position and velocity are normal at all times.
    flow = gd.ProbabilityFlow(process, gd.GaussianMixture([[0.0]], 0.7).model(process))
    x = jnp.array([[0.3], [-1.0]])
    got = gd.log_likelihood_bound(flow, x, jax.random.key(0), num_draws=100)
    covariance = np.asarray(process.covariance(process.t_min).blocks)
    signal = np.asarray(process.transition(process.t_min, 0.0).blocks)[:, 0]
    covariance = covariance + 0.49 * np.outer(signal, signal)
    marginal = -0.5 * (x[:, 0] ** 2 / covariance[0, 0])
    marginal -= 0.5 * np.log(2 * np.pi * covariance[0, 0])
    # What the model says of the velocity, and the distribution it is drawn from.
    mean = (covariance[0, 1] / covariance[0, 0] - signal[1]) * x[:, 0]
    variance = covariance[1, 1] - covariance[0, 1] ** 2 / covariance[0, 0]
    drawn = process.covariance(process.t_min).blocks[1, 1]
    gap = 0.5 * ((drawn + mean**2) / variance - 1 - np.log(drawn / variance))
    np.testing.assert_allclose(got.value, marginal - gap, atol=1e-3)
    assert (0 <= np.asarray(gap)).all() and (np.asarray(gap) < 1e-3).all()


def test_single_precision_and_jit():
    process = gd.CLD((3,))
    mixture = mixture_for(process, scale=0.5)
    flow = gd.ProbabilityFlow(process, mixture.model(process))
    u = jtu.tree_map(lambda x: x.astype(jnp.float32), prior_state(process, (4,)))
    got = _log_density(flow, u)
    assert got.value.dtype == jnp.float32 and got.value.shape == (4,)
    assert got.latent.x.shape == (4, 3)
    np.testing.assert_allclose(got.value, gd.log_density(flow, u).value, rtol=1e-4)
    if jax.config.jax_enable_x64:
        wide = jtu.tree_map(lambda x: x.astype(jnp.float64), u)
        np.testing.assert_allclose(got.value, _log_density(flow, wide).value, atol=1e-2)


def test_an_empty_batch_and_a_single_sample():
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    assert gd.log_likelihood(flow, jnp.zeros((0, 2))).value.shape == (0,)
    one = gd.log_likelihood(flow, jnp.array([0.3, 0.1])).value
    assert one.shape == () and jnp.isfinite(one)


@pytest.mark.x64
def test_gradients():
    process = gd.VP((2,))
    model = mixture_for(process, scale=0.6).model(process)
    flow = gd.ProbabilityFlow(process, lambda t, u, args: args * model(t, u, None))
    ts, x = gd.time_grid(process, 30, t0=process.t_min, t1=1.0), jnp.array([[0.3, -0.2]])

    @jax.jit
    def loss(scale):
        controller = dfx.StepTo(ts)
        return gd.log_likelihood(
            flow, x, args=scale, solver=dfx.Heun(), stepsize_controller=controller
        ).value.sum()

    one, h = jnp.ones(()), 1e-6
    difference = (loss(one + h) - loss(one - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(one), difference, rtol=1e-6)


@pytest.mark.x64
def test_the_model_is_evaluated_once_a_stage():
    process = gd.VP((3,))
    model = CountedModel(mixture_for(process).model(process))
    ts = gd.time_grid(process, 4, t0=process.t_min, t1=1.0)
    gd.log_likelihood(
        gd.ProbabilityFlow(process, model),
        jnp.zeros((2, 3)),
        solver=dfx.Euler(),
        stepsize_controller=dfx.StepTo(ts),
    )
    jax.effects_barrier()
    assert model.count == 4


def test_bits_per_dimension_of_pure_chance_are_those_of_the_levels():
    # The uniform density on [-1, 1].
    value = -12 * jnp.log(2.0) * jnp.ones(3)
    np.testing.assert_allclose(gd.bits_per_dimension(value, (2, 2, 3)), 8, rtol=1e-6)
    np.testing.assert_allclose(gd.bits_per_dimension(value, (12,), 32), 5, rtol=1e-6)


def test_dequantised_levels_fill_their_cells():
    levels = jnp.arange(256, dtype=jnp.uint8)[None].repeat(100, 0)
    x = gd.dequantise(jax.random.key(0), levels)
    assert x.dtype == jnp.result_type(float) and x.min() >= -1 and x.max() < 1
    np.testing.assert_array_equal(jnp.floor((x + 1) * 128), levels)
    spread = ((x + 1) * 128 - levels.astype(x.dtype)).std()
    assert abs(float(spread) - 1 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize("levels", ([0, 256], [-1, 3]))
def test_levels_that_are_not_there_are_refused(levels):
    for dtype in (jnp.int32, jnp.int16):
        levels = jnp.asarray(levels, dtype)
        for call in (gd.dequantise, jax.jit(gd.dequantise)):
            with pytest.raises(Exception, match="`levels` must be from 0 to 255"):
                jax.block_until_ready(call(jax.random.key(0), levels))
    with pytest.raises(Exception, match="from 0 to 3, for `num_levels=4`"):
        gd.dequantise(jax.random.key(0), jnp.asarray([4], jnp.uint8), 4)
    x = gd.dequantise(jax.random.key(0), jnp.asarray([65535], jnp.uint16), 65536)
    assert 1 - 2 / 65536 <= x[0] <= 1


_vp = gd.VP((2,))
_flow = gd.ProbabilityFlow(_vp, mixture_for(_vp).model(_vp))
_cld = gd.CLD((2,))
_cld_flow = gd.ProbabilityFlow(_cld, mixture_for(_cld).model(_cld))
_x = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: gd.log_likelihood(_flow, _x, solver=gd.GDDIM()),
            "for latent codes alone, `gddim_eqx.invert`",
        ),
        (lambda: gd.log_likelihood(_flow, _x, divergence="trace"), "must be 'exact'"),
        (lambda: gd.log_likelihood(_flow, _x, divergence="gaussian"), "Pass a `key`"),
        (lambda: gd.log_likelihood(_flow, _x, t0=0.5, t1=0.4), "Need 0 <= `t0` < `t1`"),
        (
            lambda: gd.log_likelihood(_flow, _x, t1=1.5),
            "`t1` must be in .* time axis of VP",
        ),
        (lambda: gd.log_likelihood(_flow, _x[:, :1]), "must be an array of shape"),
        (lambda: gd.log_likelihood(_cld_flow, _x), "Use `log_likelihood_bound`"),
        (
            lambda: gd.log_likelihood_bound(_flow, _x, jax.random.key(0)),
            "Use `log_likelihood`",
        ),
        (
            lambda: gd.log_likelihood_bound(_cld_flow, _x, jax.random.key(0), num_draws=0),
            "`num_draws` must be a positive integer; got 0",
        ),
        (
            lambda: gd.log_likelihood(
                _flow, _x, jax.random.key(0), divergence="gaussian", num_probes=0
            ),
            "`num_probes` must be a positive integer; got 0",
        ),
        (lambda: gd.dequantise(jax.random.key(0), _x), "`levels` must be integers"),
        (lambda: gd.bits_per_dimension(_x[:, 0], (2,), 0), "`num_levels` must be"),
    ],
)
def test_bad_input_is_refused(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        call()


def test_sums_are_in_single_precision_where_states_are_in_half():
    process = gd.VP((64,))
    model = gd.GaussianMixture(jnp.zeros((1, 64)), 1.0).model(process)
    x = jax.random.normal(jax.random.key(0), (3, 64), jnp.float16)
    value = gd.log_likelihood(gd.ProbabilityFlow(process, model), x).value
    # Standard normal data stay standard normal.
    wide = np.asarray(x, np.float64)
    expected = -0.5 * (wide**2).sum(-1) - 32 * np.log(2 * np.pi)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, atol=2e-2)
