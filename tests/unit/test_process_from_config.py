"""Configurations of schedulers, against numbers of diffusers 0.42.1 and against NumPy."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import solve


def _read(name="DDIMScheduler", **entries):
    return gd.process_from_config({"_class_name": name, **entries}, (2,))


_scaled = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
X64 = jnp.result_type(float) == np.float64


def _levels(found, ts) -> np.ndarray:
    """The noise level at each time."""
    if found.predicts == "flow":
        return np.asarray(found.process.sigma(ts))
    levels = np.exp(-np.asarray(jax.vmap(found.process.log_snr)(ts[ts > 0])))
    return np.append(levels, np.zeros(int(ts[-1] == 0)))


def _of_betas(betas) -> np.ndarray:
    """The noise-to-signal ratio at every index."""
    return np.sqrt(1 / np.cumprod(1 - betas) - 1)


def _cosine() -> np.ndarray:
    at = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
    return _of_betas(np.minimum(1 - at[1:] / at[:-1], 0.999))


def _karras(first, last, number) -> np.ndarray:
    return np.linspace(first ** (1 / 7), last ** (1 / 7), number) ** 7


def _shift(s, shift):
    return shift * s / (1 + (shift - 1) * s)


_LDM = _of_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
_LINEAR = _of_betas(np.linspace(1e-4, 0.02, 1000))


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


# Public files: Stable Diffusion and its relatives, DDPMs, latent diffusion, PixArt, Wan.
_sd = _scaled | dict(num_train_timesteps=1000, trained_betas=None)
_sd_kept = dict(set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
_ddpm = dict(
    beta_end=0.02,
    beta_schedule="linear",
    beta_start=0.0001,
    num_train_timesteps=1000,
    trained_betas=None,
)
_ldm = dict(
    beta_end=0.0195,
    beta_schedule="scaled_linear",
    beta_start=0.0015,
    num_train_timesteps=1000,
)
_sdxl = (_sd | _sd_kept) | dict(
    clip_sample=False,
    interpolation_type="linear",
    prediction_type="epsilon",
    sample_max_value=1.0,
)
_unipc = _ddpm | dict(
    disable_corrector=[],
    dynamic_thresholding_ratio=0.995,
    final_sigmas_type="zero",
    lower_order_final=True,
    predict_x0=True,
    rescale_betas_zero_snr=False,
    sample_max_value=1.0,
    solver_order=2,
    solver_p=None,
    solver_type="bh2",
    steps_offset=0,
    thresholding=False,
    timestep_spacing="linspace",
)
_offset, _plain = [751, 501, 251, 1], [750, 500, 250, 0]
# The class, the entries, the indices of 4 steps, the last time, and what else is returned.
_files = {
    "stable-diffusion-xl": (
        "EulerDiscrete",
        _sdxl | dict(timestep_spacing="leading", use_karras_sigmas=False),
        (_offset, 0, "noise", None),
    ),
    "stable-diffusion-xl, more entries": (
        "EulerDiscrete",
        _sdxl
        | dict(timestep_spacing="leading", use_karras_sigmas=False)
        | dict(clip_sample_range=1.0, thresholding=False, rescale_betas_zero_snr=False),
        (_offset, 0, "noise", None),
    ),
    "sdxl-turbo": (
        "EulerAncestralDiscrete",
        _sdxl | dict(timestep_spacing="trailing"),
        ([999, 749, 499, 249], 0, "noise", None),
    ),
    "ssd-1b": (
        "EulerAncestralDiscrete",
        _sdxl | dict(timestep_spacing="linspace"),
        ([999, 666, 333, 0], 0, "noise", None),
    ),
    "zero123plus": (
        "EulerAncestralDiscrete",
        (_sd | _sd_kept)
        | dict(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False),
        ([999, 666, 333, 0], 0, "v", None),
    ),
    "stable-diffusion-v1-5": (
        "PNDM",
        (_sd | _sd_kept) | dict(clip_sample=False, timestep_spacing="leading"),
        (_offset, 0.001, "noise", None),
    ),
    "sd-image-variations": (
        "PNDM",
        _sd | dict(skip_prk_steps=True),
        (_plain, 0.001, "noise", None),
    ),
    "stable-diffusion-2-1": (
        "DDIM",
        (_sd | _sd_kept) | dict(clip_sample=False, prediction_type="v_prediction"),
        (_offset, 0.001, "v", None),
    ),
    "stable-diffusion-inpainting": (
        "DDIM",
        (_sd | _sd_kept) | dict(clip_sample=False),
        (_offset, 0.001, "noise", None),
    ),
    "hunyuan3d-paint": (
        "DDIM",
        _sd
        | dict(prediction_type="v_prediction", set_alpha_to_one=True, steps_offset=1)
        | dict(timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False),
        ([999, 749, 499, 249], 0, "v", None),
    ),
    "audioldm2": (
        "DDIM",
        _ldm
        | dict(prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False)
        | dict(steps_offset=1, timestep_spacing="leading", thresholding=False),
        (_offset, 0.001, "noise", None),
    ),
    "ldm-celebahq": (
        "DDIM",
        _ldm | dict(clip_sample=False, trained_betas=None),
        (_plain, 0, "noise", None),
    ),
    "dit-xl": (
        "DDIM",
        _ddpm
        | dict(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
        | dict(prediction_type="epsilon"),
        (_plain, 0, "noise", None),
    ),
    "ddpm-butterflies": (
        "DDPM",
        _ddpm
        | dict(clip_sample=True, prediction_type="epsilon", variance_type="fixed_small"),
        (_plain, 0, "noise", 1.0),
    ),
    "ddpm-cifar10": (
        "DDPM",
        _ddpm | dict(clip_sample=True, variance_type="fixed_large"),
        (_plain, 0, "noise", 1.0),
    ),
    "dreambooth": (
        "DDPM",
        _sd
        | dict(clip_sample=False, clip_sample_range=1.0, set_alpha_to_one=False)
        | dict(steps_offset=1, variance_type="fixed_small"),
        (_offset, 0, "noise", None),
    ),
    "fit": (
        "DDPM",
        _ddpm
        | dict(clip_sample=False, clip_sample_range=1.0, steps_offset=0)
        | dict(variance_type="learned_range", timestep_spacing="linspace"),
        ([999, 666, 333, 0], 0, "noise", None),
    ),
    "pixart": (
        "DPMSolverMultistep",
        _ddpm
        | dict(algorithm_type="dpmsolver++", dynamic_thresholding_ratio=0.995)
        | dict(euler_at_final=False, lambda_min_clipped=-math.inf, solver_order=2)
        | dict(lower_order_final=True, sample_max_value=1.0, solver_type="midpoint")
        | dict(steps_offset=0, thresholding=False, timestep_spacing="linspace")
        | dict(use_karras_sigmas=False, use_lu_lambdas=False, variance_type=None),
        ([999, 749, 500, 250], 0, "noise", None),
    ),
    "illustrious": (
        "DPMSolverMultistep",
        _sd
        | dict(prediction_type="epsilon", solver_order=2, solver_type="midpoint")
        | dict(thresholding=False, timestep_spacing="leading", use_karras_sigmas=True),
        (_karras(_LDM[-1], _LDM[0], 4), 0, "noise", None),
    ),
    "wan2.1": (
        "UniPCMultistep",
        _unipc
        | dict(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True)
        | dict(use_beta_sigmas=False, use_karras_sigmas=False),
        (_shift(np.array([1, 0.75025, 0.5005, 0.25075]), 3), 0, "flow", None),
    ),
    "wan-animate": (
        "DPMSolverMultistep",
        dict(algorithm_type="dpmsolver++", prediction_type="flow_prediction")
        | dict(use_flow_sigmas=True, flow_shift=5.0, final_sigmas_type="zero")
        | dict(solver_order=2),
        (_shift(np.array([0.999, 0.74925, 0.4995, 0.24975]), 5), 0, "flow", None),
    ),
    "stable-diffusion-3.5": (
        "FlowMatchEulerDiscrete",
        dict(num_train_timesteps=1000, shift=3.0),
        (_shift(np.linspace(1, _shift(0.001, 3), 4), 3), 0, "flow", None),
    ),
    "flux-schnell": (
        "FlowMatchEulerDiscrete",
        dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096)
        | dict(max_shift=1.15, num_train_timesteps=1000, shift=1.0)
        | dict(use_dynamic_shifting=False),
        (np.linspace(1, 0.001, 4), 0, "flow", None),
    ),
}


@pytest.mark.precision
@pytest.mark.parametrize("file", _files)
def test_public_files(file, tmp_path):
    name, entries, (expected, last, predicts, clip) = _files[file]
    entries = {"_class_name": f"{name}Scheduler", "_diffusers_version": "0.1"} | entries
    (tmp_path / "scheduler_config.json").write_text(json.dumps(entries))
    found = gd.process_from_config(tmp_path, (2,))
    assert (found.predicts, found.clip) == (predicts, clip)
    if predicts != "flow":
        power = 0.5 if entries["beta_schedule"] == "scaled_linear" else 1.0
        ends = entries["beta_start"] ** power, entries["beta_end"] ** power
        signals = np.sqrt(np.cumprod(1 - np.linspace(*ends, 1000) ** (1 / power)))
        if file == "hunyuan3d-paint":
            signals = (signals - signals[-1]) / (1 - signals[-1] / signals[0])
        np.testing.assert_allclose(
            found.process.alphas_cumprod, signals**2, rtol=1e-9, atol=1e-15
        )
    ts = found.grid(4)
    assert (jnp.diff(ts) < 0).all()
    if isinstance(expected, list):
        # Without a last step from index 0 to itself.
        times = [(index + 1) / 1000 for index in expected]
        times = times if times[-1] == last else [*times, last]
        np.testing.assert_allclose(ts, times, rtol=1e-6)
    else:
        levels = np.append(expected, last)
        np.testing.assert_allclose(_levels(found, ts), levels, rtol=1e-8 if X64 else 1e-3)


# The classes that have an entry, in diffusers 0.42.1, and a value that they would obey.
_owners = {
    "rescale_betas_zero_snr": (True, "DDPM DDIM Euler Ancestral DPM++ UniPC"),
    "set_alpha_to_one": (False, "DDIM PNDM"),
    "clip_sample": (True, "DDPM DDIM Heun"),
    "clip_sample_range": (3.0, "DDPM DDIM Heun"),
    "thresholding": (True, "DDPM DDIM DEIS DPM++ UniPC"),
    "final_sigmas_type": ("sigma_min", "Euler DPM++ UniPC"),
    "use_karras_sigmas": (True, "Euler Heun LMS DEIS DPM++ UniPC FlowEuler"),
    "use_exponential_sigmas": (True, "Euler Heun LMS DEIS DPM++ UniPC FlowEuler"),
    "use_beta_sigmas": (True, "Euler Heun LMS DEIS DPM++ UniPC FlowEuler"),
    "use_lu_lambdas": (True, "DPM++"),
    "lambda_min_clipped": (-1.0, "DPM++"),
    "interpolation_type": ("log_linear", "Euler"),
    "timestep_type": ("continuous", "Euler"),
    "use_flow_sigmas": (True, "DEIS DPM++ UniPC"),
    "flow_shift": (3.0, "DEIS DPM++ UniPC"),
    "shift": (3.0, "FlowEuler FlowHeun"),
    "shift_terminal": (0.1, "UniPC FlowEuler"),
    "use_dynamic_shifting": (True, "DEIS DPM++ UniPC FlowEuler"),
    "invert_sigmas": (True, "FlowEuler"),
    "stochastic_sampling": (True, "FlowEuler"),
    # Of schedulers that are not supported, and of samplers.
    "timestep_scaling": (3.0, ""),
    "solver_order": (3, "DEIS DPM++ UniPC"),
    "algorithm_type": ("sde-dpmsolver++", "DEIS DPM++"),
}
_classes = {
    "DDPM": "DDPM",
    "DDIM": "DDIM",
    "PNDM": "PNDM",
    "Euler": "EulerDiscrete",
    "Ancestral": "EulerAncestralDiscrete",
    "Heun": "HeunDiscrete",
    "LMS": "LMSDiscrete",
    "DEIS": "DEISMultistep",
    "DPM++": "DPMSolverMultistep",
    "UniPC": "UniPCMultistep",
    "FlowEuler": "FlowMatchEulerDiscrete",
    "FlowHeun": "FlowMatchHeunDiscrete",
}


@pytest.mark.parametrize("name", _classes)
def test_entries_of_other_classes_are_ignored(name):
    others = {k: x for k, (x, owners) in _owners.items() if name not in owners.split()}
    if name.startswith("Flow"):
        others |= dict(prediction_type="epsilon", beta_schedule="none", steps_offset=7)
    alone, given = (_read(f"{_classes[name]}Scheduler", **x) for x in ({}, others))
    assert given.process == alone.process
    assert (given.predicts, given.clip) == (alone.predicts, alone.clip)
    np.testing.assert_array_equal(given.grid(5), alone.grid(5))


_refused = """
thresholding use_beta_sigmas use_dynamic_shifting invert_sigmas stochastic_sampling
""".split()


@pytest.mark.parametrize(
    "name, key", [(name, key) for key in _refused for name in _owners[key][1].split()]
)
def test_what_a_class_would_obey_is_refused(name, key):
    with pytest.raises(ValueError, match=f"`{key}=True` is not supported"):
        _read(f"{_classes[name]}Scheduler", **{key: True})


_flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
_leading = _scaled | dict(timestep_spacing="leading", steps_offset=1)
_squares = dict(beta_schedule="squaredcos_cap_v2")
_uniform = np.array([1, 0.75025, 0.5005, 0.25075])
_zero = _karras((2**24 - 1) ** 0.5, _LDM[0], 5)


@pytest.mark.precision
@pytest.mark.parametrize(
    "name, entries, expected",
    [
        # Those of Euler's kind respace the levels of their indices; the others, all.
        *(
            (name, _leading | dict(use_karras_sigmas=True), [*_karras(*x, 5), 0])
            for name, x in [
                ("Euler", _LDM[[801, 1]]),
                ("Heun", _LDM[[801, 1]]),
                ("LMS", _LDM[[801, 1]]),
                ("DPM++", _LDM[[999, 0]]),
                ("UniPC", _LDM[[999, 0]]),
                # Without a last step from a level to itself.
                ("DEIS", _LDM[[999, 0]]),
            ]
        ),
        (
            "Euler",
            _scaled | dict(timestep_spacing="trailing", use_exponential_sigmas=True),
            [*np.geomspace(_LDM[999], _LDM[199], 5), 0],
        ),
        (
            "Euler",
            _leading | dict(use_karras_sigmas=True, interpolation_type="log_linear"),
            [*_karras(_LDM[-1], _LDM[0], 5), 0],
        ),
        (
            "Euler",
            _leading | dict(use_karras_sigmas=True, final_sigmas_type="sigma_min"),
            [*_karras(_LDM[801], _LDM[1], 5), _LDM[0]],
        ),
        (
            "Euler",
            _leading | dict(use_karras_sigmas=True, sigma_min=0.01, sigma_max=7.0),
            [*_karras(7.0, 0.01, 5), 0],
        ),
        (
            "DPM++",
            _scaled | dict(use_karras_sigmas=True, sigma_min=0.1, sigma_max=7.0),
            [*_karras(7.0, 0.1, 5), 0],
        ),
        (
            "UniPC",
            _scaled | dict(use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
            np.geomspace(_LDM[-1], _LDM[0], 5),
        ),
        (
            "DPM++",
            dict(use_lu_lambdas=True, sigma_min=0.1),
            [*np.geomspace(_LINEAR[-1], _LINEAR[0], 5), 0],
        ),
        (
            "Euler",
            _squares | dict(use_karras_sigmas=True),
            [*_karras(_cosine()[-1], _cosine()[0], 5), 0],
        ),
        (
            "Euler",
            _scaled | dict(use_karras_sigmas=True, rescale_betas_zero_snr=True),
            [*_zero, 0],
        ),
        ("DEIS", {}, _LINEAR[[999, 799, 599, 400, 200, 0]]),
        (
            "DPM++",
            dict(final_sigmas_type="sigma_min"),
            _LINEAR[[999, 799, 599, 400, 200, 0]],
        ),
        # Linear between indices.
        (
            "Euler",
            {},
            [
                *_LINEAR[[999]],
                *(_LINEAR[[749, 750]] @ [0.75, 0.25],),
                *(_LINEAR[[499, 500]] @ [0.5, 0.5],),
                *(_LINEAR[[249, 250]] @ [0.25, 0.75],),
                _LINEAR[0],
                0,
            ],
        ),
        # Indices 995 and less have more signal.
        (
            "DPM++",
            _squares | dict(lambda_min_clipped=-5.1),
            [*_cosine()[[995, 796, 597, 398, 199]], 0],
        ),
        (
            "DPM++",
            _squares | dict(lambda_min_clipped=-5.1, timestep_spacing="trailing"),
            [*_cosine()[[995, 795, 595, 395, 195]], 0],
        ),
        (
            "DPM++",
            _squares | dict(lambda_min_clipped=-5.1, timestep_spacing="leading"),
            [*_cosine()[[830, 664, 498, 332, 166]], 0],
        ),
        ("DPM++", _flow, [*_shift(np.arange(5, 0, -1) * 0.1998, 3), 0]),
        ("DEIS", _flow, _shift(np.arange(5, 0, -1) * 0.1998, 3)),
        (
            "DPM++",
            _flow | dict(final_sigmas_type="sigma_min"),
            [*_shift(np.arange(5, 0, -1) * 0.1998, 3), _LINEAR[0]],
        ),
        (
            "UniPC",
            _flow | dict(use_karras_sigmas=True),
            [*(lambda s: s / (1 + s))(_karras(_LINEAR[-1], _LINEAR[0], 5)), 0],
        ),
        (
            "FlowEuler",
            dict(shift_terminal=0.1),
            [*(1 - (1 - np.linspace(1, 0.001, 5)) * 0.9 / 0.999), 0],
        ),
        (
            "FlowEuler",
            dict(shift=3.0, use_karras_sigmas=True),
            [*_karras(1, _shift(_shift(0.001, 3), 3), 5), 0],
        ),
    ],
)
def test_grids_are_those_of_the_class(name, entries, expected):
    found = _read(f"{_classes[name]}Scheduler", **entries)
    levels = _levels(found, ts := found.grid(5))
    expected = np.asarray(expected)
    if name == "DEIS" and "use_karras_sigmas" in entries:
        expected = expected[:-1]
    # In single precision, times close to 1 are rounded.
    rtol, atol = (1e-8, 1e-12) if X64 else (5e-3, 1e-6)
    np.testing.assert_allclose(levels, expected, rtol=rtol, atol=atol)
    assert (found.network_time(ts) >= 0).all()


@pytest.mark.parametrize("number", [27, 48, 61, 112, 199])
def test_halves_are_rounded_as_by_the_schedulers(number):
    trailing = np.round(np.arange(1000, 0, -1000 / number)) - 1
    linspace = np.linspace(0, 999, number).round()[::-1]
    for spacing, expected in (
        ("trailing", trailing[trailing >= 0]),
        ("linspace", linspace),
    ):
        ts = _read(timestep_spacing=spacing).grid(number)
        np.testing.assert_allclose(ts[:-1], (expected + 1) / 1000, rtol=1e-6)


def test_schedules_of_a_class():
    heun = np.asarray(_read("HeunDiscreteScheduler").process.alphas_cumprod)
    np.testing.assert_allclose(heun, np.cumprod(1 - np.linspace(0.00085, 0.012, 1000)))
    # As in `{**scheduler.config, "_class_name": ...}`.
    switched = dict(beta_start=0.0001, _use_default_values=["beta_start"])
    switched = _read("HeunDiscreteScheduler", **switched).process.alphas_cumprod
    np.testing.assert_array_equal(switched, heun)
    falling = _read("HeunDiscreteScheduler", beta_schedule="exp").process.alphas_cumprod
    np.testing.assert_allclose(falling, np.exp(-12 * np.arange(1, 1001) / 1000), rtol=1e-9)
    # Zero-terminal SNR: those that divide by the signal keep 2**-24 of its variance.
    ends = {
        name: _read(f"{_classes[name]}Scheduler", rescale_betas_zero_snr=True, **_scaled)
        for name in ("DDIM", "Euler", "DPM++", "UniPC")
    }
    last = {name: found.process.alphas_cumprod[-1] for name, found in ends.items()}
    assert last.pop("DDIM") == 0
    np.testing.assert_allclose(list(last.values()), 2.0**-24, rtol=1e-6)


def test_where_a_grid_ends():
    # Without `set_alpha_to_one` the last step is to the first index, if it is one.
    ts = _read(set_alpha_to_one=False, steps_offset=1).grid(4)
    np.testing.assert_allclose(ts, [0.752, 0.502, 0.252, 0.002, 0.001], rtol=1e-6)
    ts = _read("PNDMScheduler").grid(4)
    np.testing.assert_allclose(ts, [0.751, 0.501, 0.251, 0.001], rtol=1e-6)


@pytest.mark.parametrize(
    "name, entries",
    [
        ("DDIM", dict(set_alpha_to_one=False)),
        ("PNDM", {}),
        ("DEIS", dict(use_karras_sigmas=True)),
        ("DEIS", _flow),
        ("UniPC", dict(use_exponential_sigmas=True, final_sigmas_type="sigma_min")),
    ],
)
def test_a_grid_without_a_step_is_refused(name, entries):
    with pytest.raises(
        ValueError, match="With `num_steps=1`, the times .* not two or more"
    ):
        _read(f"{_classes[name]}Scheduler", **entries).grid(1)


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
    pipeline = tmp_path / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "scheduler" / path.name).write_text(path.read_text())
    for given in (path, str(path), tmp_path, pipeline, str(pipeline)):
        process = gd.process_from_config(given, 2).process
        assert len(process.alphas_cumprod) == 10
    for text, match in (("[1]", "Cannot read"), ("{", "Cannot read")):
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
        (dict(_class_name=["DDIMScheduler"]), "`_class_name` must be one of"),
        (dict(_class_name="EDMEulerScheduler"), "EDM model.*sigma. / 4.*`gddim_eqx.EDM`"),
        (dict(beta_schedule="laplace"), "`beta_schedule` must be .*'laplace'"),
        (dict(beta_schedule=["linear"]), "`beta_schedule` must be"),
        (dict(beta_start="0.1"), "`beta_start` must be a number; got '0.1'"),
        (dict(num_train_timesteps=None), "`num_train_timesteps` must be a positive int"),
        (dict(steps_offset=0.5), "`steps_offset` must be a non-negative int"),
        (dict(trained_betas=[0.1]), "`num_train_timesteps=1000` numbers.*shape .1,"),
        (dict(predict_epsilon=False), "set `prediction_type='sample'`"),
        (
            dict(_class_name="EulerDiscreteScheduler", interpolation_type="log_linear"),
            "`interpolation_type='log_linear'`.*`use_exponential_sigmas`",
        ),
        (
            dict(_class_name="LMSDiscreteScheduler")
            | dict(use_karras_sigmas=True, use_exponential_sigmas=True),
            "Only one of `use_karras_sigmas`",
        ),
        (
            dict(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True) | _flow,
            "`use_karras_sigmas` is not for flow sigmas",
        ),
        (dict(prediction_type="x"), "`prediction_type` must be 'epsilon'.*'x'"),
        (
            # Stable Video Diffusion.
            _sdxl
            | dict(_class_name="EulerDiscreteScheduler", prediction_type="v_prediction")
            | dict(sigma_max=700.0, sigma_min=0.002, timestep_spacing="leading")
            | dict(timestep_type="continuous", use_karras_sigmas=True),
            "`timestep_type='continuous'`.*\"log.sigma. / 4\".*`gddim_eqx.EDM`",
        ),
        (dict(timestep_spacing="x"), "`timestep_spacing` must be 'leading'"),
        (
            dict(trained_betas=[0.1, 1.2], num_train_timesteps=2),
            "one minus `betas`, must decrease",
        ),
        (
            # FLUX.1, Krea, BRIA and others.
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
def test_what_is_not_supported_is_named(entries, match, without_type_checks):
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
