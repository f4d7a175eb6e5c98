import functools as ft
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Real

from .._custom_types import PredictionName, RealScalarLike
from .._misc import as_dtype, check_count
from .._process import AbstractProcess, from_betas, RectifiedFlow
from .grid import index_grid, time_grid


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
    """Maps a number of steps to the scheduler's time grid. With `num_steps` in place of
    `ts=grid(num_steps)`, `sample` uses the library's own, usually more accurate one."""
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
        `ProbabilityFlow(process, DataGuidance(flow, Clip(-clip, clip)), predicts)`.

    **Arguments:**

    - `config`: a dictionary, the path of a JSON file, or the path of a directory that
        contains `scheduler_config.json`.
    - `shape`: the shape of one data sample.

    **Returns:** a named tuple: the forward process, what the model predicts, the map from
    time to the network's time input, the map from a number of steps to the time grid, and
    the bound to which data predictions are clipped.

    Entries that only configure the sampler, such as `solver_order`, are ignored.

    **Raises:** `ValueError` if the scheduler, an entry or a value is not supported.
    """
    given = dict(config) if isinstance(config, Mapping) else _read(config)
    name = given.pop("_class_name", None)
    if name not in _DEFAULTS:
        raise ValueError(
            f"`_class_name` must be one of {', '.join(sorted(_DEFAULTS))}; got {name!r}."
        )
    given = {key: x for key, x in given.items() if not key.startswith("_")}
    known = {**_DEFAULTS[name], **_REFUSED}
    if unknown := sorted(given.keys() - known.keys() - _SAMPLERS_ONLY):
        raise ValueError(
            f"Unknown entries in the configuration of a {name}: {', '.join(unknown)}. If "
            "they do not change the model, remove them."
        )
    for key, advice in _REFUSED.items():
        if given.get(key) and key not in _DEFAULTS[name]:
            raise ValueError(f"`{key}={given[key]!r}` is not supported. {advice}")
    values = _DEFAULTS[name] | given
    if name.startswith("FlowMatch") or values.get("use_flow_sigmas"):
        return _flow_matching(values, shape)
    return _discrete(name, values, shape)


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    path = path / "scheduler_config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read a configuration from {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"The configuration in {path} must be a dictionary; got {found!r}."
        )
    return found


_discrete_defaults = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
}
_multistep = _discrete_defaults | {
    "timestep_spacing": "linspace",
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
}
_euler = _discrete_defaults | {
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
}
_clipped = _discrete_defaults | {"clip_sample": True}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _clipped,
    "DDIMScheduler": _clipped,
    "PNDMScheduler": _discrete_defaults | {"set_alpha_to_one": False},
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _euler,
    "LMSDiscreteScheduler": _euler,
    "DEISMultistepScheduler": _multistep,
    "DPMSolverMultistepScheduler": _multistep,
    "UniPCMultistepScheduler": _multistep,
    "FlowMatchEulerDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}

# Entries that change the model or its time grid when they are set.
_REFUSED = {
    "thresholding": "Remove it, and use `gddim_eqx.DynamicThreshold`.",
    "use_beta_sigmas": "Remove it, and choose another grid.",
    "use_lu_lambdas": "Remove it, and choose another grid.",
    "use_karras_sigmas": "Remove it, and choose another grid.",
    "use_exponential_sigmas": "Remove it, and choose another grid.",
    "use_dynamic_shifting": "It makes the shift depend on the image size: remove it, and "
    "set `shift` (or `flow_shift`) to the exponential of `mu` for your size.",
    "shift_terminal": "Remove it, and choose where the time grid ends.",
    "invert_sigmas": "It is for networks of the opposite path, from noise to data: remove "
    "it, call the network with `num_train_timesteps - network_time(t)`, and negate its "
    "output.",
    "sigma_min": "Remove it, and choose the ends of `gddim_eqx.time_grid`.",
    "sigma_max": "Remove it, and choose the ends of `gddim_eqx.time_grid`.",
    "stochastic_sampling": "Remove it, and use `gddim_eqx.reverse_sde`.",
}

# Entries that only configure the sampler, or options that are not in use.
_SAMPLERS_ONLY = {
    "algorithm_type",
    "base_image_seq_len",
    "base_shift",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "max_image_seq_len",
    "max_shift",
    "predict_x0",
    "sample_max_value",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "time_shift_type",
    "variance_type",
}

_PREDICTIONS: dict[str, PredictionName] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
}


def _choose(values, key, choices):
    if values[key] not in choices:
        raise ValueError(
            f"`{key}` must be one of {', '.join(map(repr, choices))}; got {values[key]!r}."
        )
    return values[key]


def _discrete(name, values, shape) -> ModelConventions:
    if "timestep_type" in values:
        _choose(values, "timestep_type", ("discrete",))
    process = from_betas(shape, _betas(values))
    predicts = _PREDICTIONS[_choose(values, "prediction_type", _PREDICTIONS)]
    clip = float(values["clip_sample_range"]) if values["clip_sample"] else None
    ends_at_zero = values["set_alpha_to_one"] and (
        _choose(values, "final_sigmas_type", ("zero", "sigma_min")) == "zero"
    )
    if values["use_karras_sigmas"] or values["use_exponential_sigmas"]:
        spacing = "karras" if values["use_karras_sigmas"] else "log_snr"
        grid = ft.partial(_noise_levels, process, spacing, ends_at_zero)
    else:
        spacing = _choose(values, "timestep_spacing", ("leading", "trailing", "linspace"))
        grid = ft.partial(
            index_grid,
            process,
            grid=spacing,
            offset=int(values["steps_offset"]),
            skip_last=_DEFAULTS[name] is _multistep,
            whole=_DEFAULTS[name] is not _euler,
            end=0.0 if ends_at_zero else None,
        )
    return ModelConventions(process, predicts, process.index, grid, clip)


def _noise_levels(process, spacing, ends_at_zero, num_steps: int, dtype=None):
    """`num_steps` steps from the last index to the first or, past it, to time 0."""
    check_count("num_steps", num_steps)
    if num_steps == 1 and ends_at_zero:
        ts = jnp.array([process.t_max], as_dtype(float if dtype is None else dtype))
    else:
        ts = time_grid(process, num_steps - ends_at_zero, spacing, dtype=dtype)
    return jnp.append(ts, jnp.zeros((), ts.dtype)) if ends_at_zero else ts


def _betas(values) -> np.ndarray:
    number, trained = values["num_train_timesteps"], values["trained_betas"]
    first, last = values["beta_start"], values["beta_end"]
    if trained is not None:
        betas = np.asarray(trained, np.float64)
    else:
        make = {
            "linear": lambda: np.linspace(first, last, number),
            "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, number) ** 2,
            "squaredcos_cap_v2": lambda: _cosine_betas(number),
            "sigmoid": lambda: (
                first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, number)))
            ),
        }
        betas = make[_choose(values, "beta_schedule", make)]()
    return _rescaled(betas) if values["rescale_betas_zero_snr"] else betas


def _cosine_betas(number) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17."""
    squares = np.cos((np.linspace(0, 1, number + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - squares[1:] / squares[:-1], 0.999)


def _rescaled(betas) -> np.ndarray:
    """Zero-terminal SNR: Lin et al. 2024, algorithm 1."""
    roots = np.sqrt(np.cumprod(1 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return 1 - roots**2 / np.append(1.0, roots[:-1] ** 2)


def _flow_matching(values, shape) -> ModelConventions:
    if values.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            "With flow sigmas `prediction_type` must be 'flow_prediction'; got "
            f"{values['prediction_type']!r}."
        )
    total = int(values["num_train_timesteps"])
    process = RectifiedFlow(shape, values.get("shift", values.get("flow_shift", 1.0)))
    network_time = lambda t: total * process.sigma(t)
    # The multistep schedulers omit the lowest noise level; the others keep and shift it.
    first = 1 / total if "flow_shift" in values else float(process.sigma(1 / total))
    grid = ft.partial(_flow_times, first, "flow_shift" in values)
    return ModelConventions(process, "flow", network_time, grid, None)


def _flow_times(first, skip_first, num_steps: int, dtype=None):
    """Uniform times from pure noise to the lowest noise level, followed by time 0."""
    check_count("num_steps", num_steps)
    times = np.linspace(1, first, num_steps + skip_first)[:num_steps]
    return jnp.asarray(np.append(times, 0), as_dtype(float if dtype is None else dtype))
