"""Paths from data to noise given two functions, also without signal at the start."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import mixture_for, prior_state, slow, solve


def _vp():
    integral = lambda t: 0.1 * t + 0.5 * 19.9 * t**2
    signal = lambda t: jnp.exp(-0.5 * integral(t))
    noise = lambda t: jnp.sqrt(-jnp.expm1(-integral(t)))
    return gd.GaussianPath((3,), signal, noise, prior_std=1.0), gd.VP((3,))


def _sub_vp():
    integral = lambda t: 0.1 * t + 0.5 * 19.9 * t**2
    signal = lambda t: jnp.exp(-0.5 * integral(t))
    noise = lambda t: -jnp.expm1(-integral(t))
    return gd.GaussianPath((3,), signal, noise, prior_std=1.0), gd.SubVP((3,))


def _ve():
    noise = lambda t: 0.01 * 5000**t
    return gd.GaussianPath((3,), jnp.ones_like, noise, t_min=1e-5), gd.VE((3,))


def _edm():
    options = dict(t_min=0.002, t_end=80.0)
    path = gd.GaussianPath((3,), lambda t: 1.0, lambda t: t, **options)
    return path, gd.EDM((3,))


def _rectified():
    return gd.GaussianPath((3,), lambda t: 1 - t, lambda t: t), gd.RectifiedFlow((3,))


@pytest.mark.x64
@pytest.mark.parametrize("make", [_vp, _sub_vp, _ve, _edm, _rectified])
def test_a_path_with_the_functions_of_a_process_is_the_process(make):
    path, process = make()
    assert path.t_zero_signal >= path.t_max and path.data_scale == process.data_scale

    def quantities(process, t, s):
        names = ("drift", "diffusion", "factor", "signal_rate", "factor_rate")
        operators = [getattr(process, name)(t) for name in names]
        operators += [process.transition(t, s), process.prior_factor()]
        return jnp.stack([x.blocks.squeeze() for x in operators])

    t, s = (jnp.asarray(x) * process.t_max for x in ([0.9, 0.3, 0.01], [0.2, 0.8, 0.5]))
    got, expected = (
        jax.jit(jax.vmap(lambda t, s: quantities(p, t, s)))(t, s) for p in (path, process)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    # The default grid does not depend on how fast the time of a path runs.
    if isinstance(process, gd.EDM | gd.RectifiedFlow):
        grids = [gd.time_grid(p, 10) for p in (path, process)]
        np.testing.assert_allclose(*grids, rtol=1e-9)


@pytest.mark.x64
def test_the_default_grid_does_not_depend_on_the_speed_of_time():
    shifted = gd.RectifiedFlow((3,), 3.0, t_min=0.01)
    plain = gd.RectifiedFlow((3,), t_min=float(shifted.sigma(0.01)))
    sigma = shifted.sigma(gd.time_grid(shifted, 10))
    np.testing.assert_allclose(sigma, gd.time_grid(plain, 10), rtol=1e-5)


_flows = {
    "rectified": gd.RectifiedFlow((3,)),
    "shifted": gd.RectifiedFlow((3,), shift=3.0),
    "trigonometric": gd.TrigonometricFlow((3,)),
    "squared": gd.GaussianPath((3,), lambda t: 1 - t**2, lambda t: t),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", _flows)
def test_it_obeys_the_laws(name):
    gd.check_process(_flows[name])


@pytest.mark.precision
@pytest.mark.parametrize("predicts", ["data", "v", "flow"])
@pytest.mark.parametrize("name", [*_flows, "edm"])
def test_one_step_from_the_start_is_exact_for_one_data_point(name, predicts):
    process = _flows.get(name, gd.EDM((3,)))
    x = jnp.asarray([[0.5, -1.0, 0.2]])
    model = gd.GaussianMixture(x).model(process, predicts)
    flow = gd.ProbabilityFlow(process, model, predicts)
    u = prior_state(process, (4,))
    ts = jnp.asarray([process.t_max, process.t_min])
    got = solve(flow, gd.GDDIM(), ts, u)
    mean = process.transition(ts[1], 0.0).mv(x)
    share = (process.factor(ts[1]).blocks / process.factor(ts[0]).blocks).squeeze()
    start = process.transition(ts[0], 0.0).mv(x)
    expected = mean + share * (u - start)
    tolerance = 1e-12 if jax.config.jax_enable_x64 else 1e-5
    if name == "edm" and predicts == "flow":
        # The data are x - 80 times the prediction, which is itself rounded.
        tolerance *= 3
    np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.x64
def test_ddim_on_a_rectified_flow_is_eulers_method():
    process = _flows["rectified"]
    model = mixture_for(process).model(process, "flow")
    flow = gd.ProbabilityFlow(process, model, "flow")
    u, ts = prior_state(process, (4,)), gd.time_grid(process, 8, "uniform")
    solver = gd.GDDIM(1, coordinate="time")
    got, expected = (solve(flow, x, ts, u) for x in (solver, dfx.Euler()))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize(
    "name", ["rectified", "shifted", *slow("trigonometric", "squared")]
)
def test_all_predictions_give_the_same_samples_from_zero_signal(name):
    process = _flows[name]
    data = mixture_for(process)
    u, ts = prior_state(process, (4,)), gd.time_grid(process, 10)
    samples = {}
    for predicts in ("data", "v", "flow"):
        flow = gd.ProbabilityFlow(process, data.model(process, predicts), predicts)
        samples[predicts] = solve(flow, gd.GDDIM(), ts, u)
    tsit5 = solve(flow, dfx.Tsit5(), gd.time_grid(process, 200), u)
    for x in samples.values():
        np.testing.assert_allclose(x, tsit5, atol=0.05)
        np.testing.assert_allclose(x, samples["data"], rtol=1e-10)


@pytest.mark.precision
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_of_a_rectified_flow_is_noise_minus_data(shift):
    process = gd.RectifiedFlow((2,), shift)
    x, noise = jnp.array([[0.5, -2.0]]), jnp.array([[1.5, 0.25]])
    for t in (1e-3, 0.3, 1.0):
        sigma = process.sigma(t)
        u = (1 - sigma) * x + sigma * noise
        model = gd.GaussianMixture(x).model(process, "flow")
        np.testing.assert_allclose(model(t, u, None), noise - x, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("predicts", ["noise", "score"])
def test_noise_says_nothing_about_data_without_signal(predicts):
    process = _flows["rectified"]
    model = mixture_for(process).model(process)
    # A function, which does not say what it predicts.
    flow = gd.ProbabilityFlow(process, lambda *inputs: model(*inputs), predicts)
    with pytest.raises(Exception, match="there is no signal.*predicts 'data', 'v'"):
        gd.sample(flow, jax.random.key(0), 2, 5)
    # With some signal it does.
    process = gd.RectifiedFlow((3,), t_end=0.999)
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    assert jnp.isfinite(gd.sample(flow, jax.random.key(0), 2, 5).x).all()


def test_reverse_drift_is_infinite_without_signal():
    process = _flows["rectified"]
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process, "flow"), "flow")
    with pytest.raises(Exception, match="the drift of the reverse diffusion is infinite"):
        gd.sample(flow, jax.random.key(0), 2, 5, dfx.Euler(), lam=1.0)


def test_noise_space_cannot_start_without_signal():
    process = _flows["rectified"]
    model = mixture_for(process).model(process, "data")
    flow = gd.ProbabilityFlow(process, model, "data")
    with pytest.raises(Exception, match="In noise space .* no signal"):
        gd.sample(flow, jax.random.key(0), 2, 5, solver=gd.GDDIM(1, "noise"))
    with pytest.raises(Exception, match="cannot start or end where there is no signal"):
        ts = gd.time_grid(process, 5)[::-1]
        solve(flow, gd.GDDIM(1, "noise"), ts, jnp.zeros(3, ts.dtype))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(signal=lambda t: t, noise=lambda t: 1 - t), "Time runs from data to noise"),
        (dict(signal=lambda t: 1 - 2 * t, noise=lambda t: t), "`signal` must be positive"),
        (
            dict(signal=lambda t: 1.0, noise=lambda t: 0.5 + t * (1 - t)),
            "must decrease with time, but `signal",
        ),
        (dict(signal=lambda t: jnp.ones(3), noise=lambda t: t), "`signal` must return one"),
        (dict(signal=lambda t: 1.0, noise=lambda t: t, t_min=2.0), "Need 0 < `t_min`"),
        (dict(signal=1.0, noise=lambda t: t), "`signal` must be a function of time"),
        (
            dict(signal=lambda t: 1.0, noise=lambda t: t, prior_std=-1.0),
            "`prior_std` must be positive",
        ),
    ],
)
def test_what_is_no_path_is_refused(arguments, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        gd.GaussianPath((2,), **arguments)
    with pytest.raises(
        ValueError, match="`t_max` must not be after t = 1.0, where the signal"
    ):
        gd.RectifiedFlow((2,), t_end=1.5)
    with pytest.raises(ValueError, match="Need `sigma_min` < `sigma_max`"):
        gd.EDM((2,), sigma_min=3.0, sigma_max=1.0)
