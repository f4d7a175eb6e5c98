import functools as ft
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Real

from .._custom_types import PredictionName, RealScalarLike
from .._misc import as_constant, check_choice, check_count, check_positive, show
from .._process import AbstractProcess, RectifiedFlow, VP
from .scheduler_grid import (
    BY_INDEX,
    discrete_times,
    flow_times,
    HIGHEST_LEVEL,
    scheduler_grid,
    spacing_of_levels,
)


class ModelConventions(NamedTuple):
    """What [`gddim_eqx.process_from_config`][] returns."""

    process: AbstractProcess
    """The forward process."""
    predicts: PredictionName
    """What the model predicts."""
    network_time: Callable[[RealScalarLike], Inexact[Array, ""]]
    """Maps a time of the process to the time input of the network, a float. Round it for a
    network that looks up integer indices."""
    grid: Callable[[int], Real[Array, " times"]]
    """Maps a number of steps to the scheduler's time grid, without steps of length zero,
    with which some schedulers end; a single `"linspace"` step starts at the highest noise
    level. Pass one that starts below `process.t_max` to [`gddim_eqx.generate`][]. With
    `num_steps` in place of `ts=grid(num_steps)`, `sample` uses the library's own, usually
    more accurate grid."""
    clip: float | None
    """If not `None`, the scheduler clips data predictions to `[-clip, clip]`: see
    [`gddim_eqx.Clip`][]."""


def process_from_config(
    config: Mapping[str, Any] | str | Path, shape: tuple[int, ...] | int
) -> ModelConventions:
    """The forward process and the conventions of a model, from the configuration of its
    scheduler in the `diffusers` package.

    !!! example

        ```python
        import gddim_eqx as gd
        import jax
        import jax.numpy as jnp

        config = {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        }
        process, predicts, network_time, grid, _ = gd.process_from_config(config, (8, 8, 4))
        network = lambda index, x: jnp.zeros_like(x)
        model = lambda t, x, args: network(network_time(t), x)
        flow = gd.ProbabilityFlow(process, model, predicts)
        x = gd.sample(flow, jax.random.key(0), 4, ts=grid(20)).x
        ```

        If it returns a `clip`, sample with
        `data_guidance(flow, Clip(-clip, clip))`.

    **Arguments:**

    - `config`: a dictionary, the path of a JSON file, or the path of a directory that
        contains `scheduler_config.json` or `scheduler/scheduler_config.json`.
    - `shape`: the shape of one data sample.

    **Returns:** a named tuple: the forward process, what the model predicts, the map from
    time to the network's time input, the map from a number of steps to the time grid, and
    the bound to which data predictions are clipped.

    As in the `diffusers` package, entries that the scheduler does not have, but another one
    does, are ignored. So are those that only configure the sampler, such as `solver_order`.

    **Raises:** `ValueError` if the scheduler, an entry or a value is not supported.
    """
    given = dict(config) if isinstance(config, Mapping) else _read(config)
    name = given.pop("_class_name", None)
    if not isinstance(name, str) or name not in _ENTRIES:
        advice = f" {_EDM}." if str(name).startswith("EDM") else ""
        raise ValueError(
            f"`_class_name` must be one of {', '.join(sorted(_ENTRIES))}; got {show(name)}."
            f"{advice}"
        )
    defaulted = given.get("_use_default_values", ())
    given = {k: x for k, x in given.items() if not k.startswith("_") and k not in defaulted}
    # A file keeps the entries of the class that it was made from: those of other classes
    # are ignored.
    values = _ENTRIES[name] | {k: x for k, x in given.items() if k in _ENTRIES[name]}
    _refuse(name, given, values)
    _check(values, _ENTRIES[name])
    if name.startswith("FlowMatch") or values.get("use_flow_sigmas"):
        return _flow_matching(name, values, shape)
    return _discrete(name, values, shape)


def _refuse(name, given, values) -> None:
    """Raise a `ValueError` for entries that are unknown or not supported."""
    continuous = values.get("timestep_type") == "continuous"
    if continuous and values["prediction_type"] == "v_prediction":
        raise ValueError(
            f"`timestep_type='continuous'` is not supported. {_EDM}, with `sigma_data=1.0` "
            "and the network's output negated."
        )
    if unknown := sorted(given.keys() - _KNOWN):
        raise ValueError(
            f"Unknown entries in the configuration of a {name}: {', '.join(unknown)}. If "
            "they do not change the model, remove them."
        )
    if given.get("predict_epsilon") is False and "prediction_type" not in given:
        raise ValueError(
            "`predict_epsilon=False` is an old entry: set `prediction_type='sample'`."
        )
    for key, advice in _REFUSED.items():
        if values.get(key):
            raise ValueError(f"`{key}={show(values[key])}` is not supported. {advice}")


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if path.is_dir():
        # A pipeline has a folder for its scheduler.
        files = [folder / "scheduler_config.json" for folder in (path, path / "scheduler")]
        path = next((file for file in files if file.exists()), files[0])
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"Cannot read a configuration from {path}: {error}") from None


# For each class, the entries that determine its model or its time grid, with their
# defaults.
_all = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    prediction_type="epsilon",
    steps_offset=0,
)
_clipping = dict(clip_sample=True, clip_sample_range=1.0)
_zero_snr = dict(rescale_betas_zero_snr=False)
_final = dict(final_sigmas_type="zero")
_levels = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
# Used where a file has them, even by classes without such an argument.
_range = dict(sigma_min=None, sigma_max=None)

_leading = _all | dict(timestep_spacing="leading")
_ddpm = _leading | _clipping | _zero_snr | dict(thresholding=False)
_euler = _all | dict(timestep_spacing="linspace")
_flow = dict(use_flow_sigmas=False, flow_shift=1.0, use_dynamic_shifting=False)
_multistep = _euler | _levels | _range | _flow | dict(thresholding=False)

_ENTRIES: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddpm | dict(set_alpha_to_one=True),
    "PNDMScheduler": _leading | dict(set_alpha_to_one=False),
    "EulerDiscreteScheduler": (_euler | _levels | _range | _zero_snr | _final)
    | dict(interpolation_type="linear", timestep_type="discrete"),
    "EulerAncestralDiscreteScheduler": _euler | _zero_snr,
    "HeunDiscreteScheduler": (_euler | _levels | _range | _clipping)
    | dict(beta_start=0.00085, beta_end=0.012, clip_sample=False),
    "LMSDiscreteScheduler": _euler | _levels,
    "DEISMultistepScheduler": _multistep,
    "DPMSolverMultistepScheduler": (_multistep | _zero_snr | _final)
    | dict(lambda_min_clipped=None, use_lu_lambdas=False),
    "UniPCMultistepScheduler": (_multistep | _zero_snr | _final)
    | dict(shift_terminal=None),
    "FlowMatchEulerDiscreteScheduler": (_levels | _range)
    | dict(num_train_timesteps=1000, shift=1.0, shift_terminal=None)
    | dict(use_dynamic_shifting=False, invert_sigmas=False, stochastic_sampling=False),
    "FlowMatchHeunDiscreteScheduler": dict(num_train_timesteps=1000, shift=1.0),
}

# Entries that only configure the sampler, and those that only other schedulers have.
_OTHERS = """
algorithm_type base_image_seq_len base_shift clip_denoised correct_steps corrector_order
disable_corrector dynamic_thresholding_ratio eta euler_at_final lower_order_final
max_image_seq_len max_shift original_inference_steps predict_epsilon predict_x0
predictor_order rho s_noise sample_max_value sampling_eps scale_factors sigma_data
sigma_schedule skip_prk_steps snr snr_shift_scale solver_order solver_p solver_type
tau_func tensor_format time_shift_type timestep_scaling timestep_values upscale_mode
variance_type
"""
_KNOWN = set(_OTHERS.split()).union(*_ENTRIES.values())

_EDM = (
    'This is an EDM model, whose network takes "log(sigma) / 4" instead of an index: use '
    "the process `gddim_eqx.EDM` and the model `gddim_eqx.nn.EDMPreconditioned`"
)

# Entries that change the model or its time grid when they are set.
_REFUSED = {
    "thresholding": "Remove it, and use `gddim_eqx.DynamicThreshold`.",
    "use_beta_sigmas": "Remove it, and choose another grid.",
    "use_dynamic_shifting": "It makes the shift depend on the image size: remove it, and "
    "set `shift` (or `flow_shift`) to the exponential of `mu` for your size; if "
    "`time_shift_type` is 'linear', to `mu`.",
    "invert_sigmas": "It is for networks of the opposite path, from noise to data: remove "
    "it, call the network with `num_train_timesteps - network_time(t)`, and negate its "
    "output.",
    "stochastic_sampling": "Remove it, and use `gddim_eqx.reverse_sde`.",
}

_CHOICES = {
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}

_PREDICTIONS: dict[str, PredictionName]
_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}


def _check(values, defaults) -> None:
    """Raise a `ValueError` for numbers of the wrong kind, or options that exclude each
    other."""
    check_count("num_train_timesteps", values["num_train_timesteps"])
    check_count("steps_offset", values.get("steps_offset", 0), 0)
    for key, default in defaults.items():
        given = key in ("sigma_min", "sigma_max") and values[key] is not None
        if given or isinstance(default, float):
            check_positive(**{key: values[key]})
    if values.get("shift_terminal"):
        check_positive(shift_terminal=values["shift_terminal"])
    if values.get("lambda_min_clipped") not in (None, -math.inf):
        as_constant("lambda_min_clipped", values["lambda_min_clipped"])
    for key in _CHOICES.keys() & values.keys():
        check_choice(key, values[key], _CHOICES[key])
    if values.get("use_karras_sigmas") and values.get("use_exponential_sigmas"):
        raise ValueError(
            "Only one of `use_karras_sigmas` and `use_exponential_sigmas` may be set."
        )


def _discrete(name, values, shape) -> ModelConventions:
    process = VP.from_betas(shape, _betas(name, values))
    check_choice("prediction_type", values["prediction_type"], _PREDICTIONS)
    predicts = _PREDICTIONS[values["prediction_type"]]
    clip = float(values["clip_sample_range"]) if values.get("clip_sample") else None
    if values.get("interpolation_type") == "log_linear" and not spacing_of_levels(values):
        raise ValueError(
            "`interpolation_type='log_linear'` gives the network indices that do not "
            "belong to the noise levels. Set `use_exponential_sigmas` instead."
        )
    # Levels below the noise of the first index share it.
    network_time = lambda t: process.index(jnp.maximum(t, process.t_min))
    grid = scheduler_grid(ft.partial(discrete_times, name, values, process))
    return ModelConventions(process, predicts, network_time, grid, clip)


def _betas(name, values) -> np.ndarray:
    number, trained = int(values["num_train_timesteps"]), values["trained_betas"]
    first, last = values["beta_start"], values["beta_end"]
    if trained is not None:
        if np.shape(trained) != (number,):
            raise ValueError(
                f"`trained_betas` must hold `num_train_timesteps={number}` numbers; got an "
                f"array of shape {np.shape(trained)}."
            )
        betas = np.asarray(trained, np.float64)
    else:
        sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, number)))
        make = {
            "linear": lambda: np.linspace(first, last, number),
            "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, number) ** 2,
            "squaredcos_cap_v2": lambda: _cosine_betas(number),
            "exp": lambda: np.full(number, -np.expm1(-12 / number)),
            "sigmoid": lambda: first + (last - first) * sigmoid,
        }
        check_choice("beta_schedule", values["beta_schedule"], make)
        betas = make[values["beta_schedule"]]()
    if not values.get("rescale_betas_zero_snr"):
        return betas
    return _rescaled(betas, 0.0 if name in BY_INDEX else 1 / (1 + HIGHEST_LEVEL**2))


def _cosine_betas(number) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17."""
    squares = np.cos((np.linspace(0, 1, number + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - squares[1:] / squares[:-1], 0.999)


def _rescaled(betas, least) -> np.ndarray:
    """Zero-terminal SNR: Lin et al. 2024, algorithm 1, except that the squared signal ends
    at `least`, or lower where it has to decrease."""
    roots = np.sqrt(np.cumprod(1 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    alphas = roots**2
    alphas[-1] = min(least, 0.5 * alphas[-2])
    return 1 - alphas / np.append(1.0, alphas[:-1])


def _flow_matching(name, values, shape) -> ModelConventions:
    predicts = values.get("prediction_type", "flow_prediction")
    check_choice("prediction_type", predicts, ["flow_prediction"])
    spacing = spacing_of_levels(values)
    converts = (name, spacing) == ("UniPCMultistepScheduler", "karras_sigmas")
    if spacing and not (name.startswith("FlowMatch") or converts):
        raise ValueError(
            f"`use_{spacing}` is not for flow sigmas in a {name}, whose noise levels would "
            "not be those of a flow. Remove it."
        )
    process = RectifiedFlow(shape, values.get("shift", values.get("flow_shift")))
    network_time = lambda t: int(values["num_train_timesteps"]) * process.sigma(t)
    betas = _betas(name, values) if "use_flow_sigmas" in values else None
    grid = scheduler_grid(ft.partial(flow_times, name, values, betas))
    return ModelConventions(process, "flow", network_time, grid, None)
