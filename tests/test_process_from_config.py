"""Configurations of schedulers, against numbers of diffusers 0.42.1."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import solve


def _read(name="DDIMScheduler", **entries):
    return gd.process_from_config({"_class_name": name, **entries}, (2,))


_scaled = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize(
    "entries, expected",
    [
        ({}, [0.9999, 0.9997801, 0.521423, 0.07779665, 4.03583e-05]),
        (_scaled, [0.99915, 0.998296, 0.6737923, 0.2763325, 0.004660095]),
        (
            dict(beta_schedule="squaredcos_cap_v2"),
            [0.9999587, 0.9999126, 0.845888, 0.492285, 2.428735e-09],
        ),
        (
            dict(beta_schedule="sigmoid"),
            [0.9998508, 0.999701, 0.902799, 0.2988876, 3.968182e-05],
        ),
        (
            _scaled | dict(rescale_betas_zero_snr=True),
            [0.99915, 0.9982335, 0.6524568, 0.2410186, 0.0],
        ),
        (
            dict(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()),
            [0.9999, 0.9997801, 0.521423, 0.07779665, 4.03583e-05],
        ),
    ],
)
def test_schedules(entries, expected):
    process = _read("DDPMScheduler", **entries).process
    alphas = np.asarray(process.alphas_cumprod)[[0, 1, 250, 500, 999]]
    # They are computed in single precision there.
    np.testing.assert_allclose(alphas, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "name, spacing, expected",
    [
        ("DDIMScheduler", "leading", [853, 711, 569, 427, 285, 143, 1]),
        ("DDIMScheduler", "linspace", [999, 832, 666, 500, 333, 166, 0]),
        ("DDIMScheduler", "trailing", [999, 856, 713, 570, 428, 285, 142]),
        ("UniPCMultistepScheduler", "leading", [876, 751, 626, 501, 376, 251, 126]),
        ("UniPCMultistepScheduler", "linspace", [999, 856, 714, 571, 428, 285, 143]),
        ("UniPCMultistepScheduler", "trailing", [999, 856, 713, 570, 428, 285, 142]),
        ("EulerDiscreteScheduler", "leading", [853, 711, 569, 427, 285, 143, 1]),
        ("EulerDiscreteScheduler", "linspace", [999, 832.5, 666, 499.5, 333, 166.5, 0]),
    ],
)
def test_the_indices_of_a_grid(name, spacing, expected):
    found = _read(name, timestep_spacing=spacing, steps_offset=1)
    ts = found.grid(7)
    assert len(ts) == 8 and ts[-1] == 0
    np.testing.assert_allclose(found.network_time(ts[:-1]), expected, atol=2e-3)
    if name == "DDIMScheduler" and spacing != "leading":
        named = gd.time_grid(found.process, 7, spacing)
        np.testing.assert_allclose(named, ts, rtol=1e-6)


@pytest.mark.parametrize(
    "spacing, expected",
    [
        ("karras", [157.40727, 50.580917, 13.037985, 2.4228885, 0.26313808, 0.01000133]),
        (
            "exponential",
            [157.40727, 22.784074, 3.2979037, 0.4773584, 0.06909572, 0.010001],
        ),
    ],
)
def test_grids_of_noise_levels(spacing, expected):
    found = _read("UniPCMultistepScheduler", **{f"use_{spacing}_sigmas": True})
    ts = found.grid(6)
    sigma = gd.WithTime(found.process, lambda t, u, args: u, "sigma").convert
    np.testing.assert_allclose([sigma(t) for t in ts[:-1]], expected, rtol=2e-4)
    assert ts[-1] == 0


@pytest.mark.parametrize(
    "name, entries, expected",
    [
        ("FlowMatchEulerDiscreteScheduler", {}, [1000, 750.25, 500.5, 250.75, 1, 0]),
        (
            "FlowMatchEulerDiscreteScheduler",
            dict(shift=3.0),
            [1000, 900.35907, 751.12109, 502.98505, 8.9285717, 0],
        ),
        (
            "UniPCMultistepScheduler",
            dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
            [1000, 923.16568, 818.42965, 667.22184, 429.79452, 0],
        ),
    ],
)
def test_flow_matching(name, entries, expected):
    found = _read(name, **entries)
    assert isinstance(found.process, gd.RectifiedFlow) and found.predicts == "flow"
    np.testing.assert_allclose(found.network_time(found.grid(5)), expected, rtol=1e-5)


@pytest.mark.x64
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_a_flow_matching_network_as_its_scheduler_does(shift):
    """Euler's method in the noise level, for a network that predicts noise minus data."""
    data = gd.GaussianMixture(jnp.array([[1.0, -1.0], [-2.0, 0.5]]), 0.3)
    straight = data.model(gd.RectifiedFlow((2,)), "flow")
    network = lambda timestep, x: straight(jnp.asarray(timestep / 1000), x, None)
    found = _read("FlowMatchEulerDiscreteScheduler", shift=shift)
    ts = found.grid(10)
    start = found.process.prior(jax.random.key(0), (5,))

    steps = np.linspace(1, shift / (1000 + shift - 1), 10)
    sigmas = np.append(shift * steps / (1 + (shift - 1) * steps), 0)
    if shift == 1:
        np.testing.assert_allclose(found.network_time(ts), 1000 * sigmas, atol=1e-9)
    sigmas, x = np.asarray(found.network_time(ts)) / 1000, start
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        x = x + (then - now) * network(1000 * now, x)

    model = lambda t, u, args: network(found.network_time(t), u)
    flow = gd.ProbabilityFlow(found.process, model, found.predicts)
    np.testing.assert_allclose(solve(flow, gd.GDDIM(1), ts, start), x, atol=1e-10)
    # More steps converge to the data.
    x = gd.sample(flow, jax.random.key(1), 200, 20).x
    nearest = jnp.linalg.norm(x[:, None] - data.means[None], axis=-1).min(1)
    assert jnp.median(nearest) < 0.5


def test_where_a_grid_ends():
    # Without `set_alpha_to_one` the last step is to the first index, if it is one.
    ts = _read(set_alpha_to_one=False, steps_offset=1).grid(4)
    np.testing.assert_allclose(ts, [0.752, 0.502, 0.252, 0.002, 0.001], rtol=1e-6)
    ts = _read("PNDMScheduler").grid(4)
    np.testing.assert_allclose(ts, [0.751, 0.501, 0.251, 0.001], rtol=1e-6)


def test_what_else_is_returned():
    assert _read().clip == 1.0 and _read(clip_sample=False).clip is None
    for name, predicts in (("epsilon", "noise"), ("sample", "data"), ("v_prediction", "v")):
        assert _read(prediction_type=name).predicts == predicts
    # Entries of samplers, and those that say where the file is from, are not used.
    _read("DPMSolverMultistepScheduler", solver_order=3, algorithm_type="sde", _version="1")


def test_files(tmp_path):
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10}
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    for given in (path, str(path), tmp_path):
        process = gd.process_from_config(given, 2).process
        assert len(process.alphas_cumprod) == 10
    for text, match in (("[]", "must be a dictionary"), ("{", "Cannot read")):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            gd.process_from_config(path, 2)
    with pytest.raises(ValueError, match="Cannot read"):
        gd.process_from_config(tmp_path / "none.json", 2)


@pytest.mark.parametrize(
    "entries, match",
    [
        (dict(_class_name="Mine"), "`_class_name` must be one of DDIMScheduler, .*'Mine'"),
        (dict(sample_maximum=1.0), "Unknown entries .* DDIMScheduler: sample_maximum"),
        (dict(thresholding=True), "`thresholding=True` is not supported.*DynamicThreshold"),
        (dict(beta_schedule="laplace"), "`beta_schedule` must be one of .*'laplace'"),
        (dict(prediction_type="x"), "`prediction_type` must be one of 'epsilon'.*'x'"),
        (
            dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"),
            "`timestep_type` must be one of 'discrete'; got 'continuous'",
        ),
        (dict(timestep_spacing="x"), "`timestep_spacing` must be one of 'leading'"),
        (dict(trained_betas=[0.1, 1.2]), "`betas` must be between 0 and 1.*1.2"),
        (
            dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
            "`use_dynamic_shifting=True` is not supported.*exponential of `mu`",
        ),
        (
            dict(
                _class_name="UniPCMultistepScheduler",
                use_flow_sigmas=True,
                prediction_type="epsilon",
            ),
            "`prediction_type` must be 'flow_prediction'",
        ),
    ],
)
def test_what_is_not_supported_is_named(entries, match):
    with pytest.raises(ValueError, match=match):
        gd.process_from_config({"_class_name": "DDIMScheduler"} | entries, (2,))


def test_a_grid_that_the_indices_cannot_make():
    process = gd.VP.from_betas((2,), jnp.linspace(0.1, 0.2, 10))
    with pytest.raises(ValueError, match="10 indices has no 'leading' grid of 20 steps"):
        gd.time_grid(process, 20, "leading")
    with pytest.raises(ValueError, match="is for discrete-time models; got VP"):
        gd.time_grid(gd.VP((2,)), 5, "trailing")
    with pytest.raises(ValueError, match="leave out `t0` and `t1`"):
        gd.time_grid(process, 5, "trailing", t1=0.1)
    for index in (-1, 10, 2.5e3):
        with pytest.raises(ValueError, match="`index` must be from 0 to 9"):
            process.time(index)


@pytest.mark.parametrize(
    "entries",
    [
        dict(name="UniPCMultistepScheduler", use_karras_sigmas=True),
        dict(name="EulerDiscreteScheduler"),
        dict(name="FlowMatchEulerDiscreteScheduler"),
    ],
    ids=["karras", "linspace", "flow"],
)
def test_a_single_step_goes_from_noise_to_data(entries, without_type_checks):
    found = _read(**entries)
    ts = found.grid(1)
    np.testing.assert_allclose(ts, [found.process.t_max, 0])
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`num_steps` must be a positive integer"):
            found.grid(number)
