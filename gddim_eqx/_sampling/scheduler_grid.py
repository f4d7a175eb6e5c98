"""The time grids of the schedulers of the `diffusers` package. In this file, `name` is the
class of a scheduler, and `values` are the entries of its configuration."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._misc import as_dtype, check_count
from .._process import DiscreteVP
from .grid import indices


# Classes that step through whole indices, and may start at an infinite noise-to-signal
# ratio.
BY_INDEX = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
# The others have this instead.
HIGHEST_LEVEL = (2.0**24 - 1) ** 0.5


def scheduler_grid(
    steps: Callable[[int], tuple[np.ndarray, float]],
) -> Callable[..., Real[Array, " times"]]:
    """The map from a number of steps to the times of a scheduler, given the map to where
    its steps start and the last one ends (`nan` if it does nothing, to leave it out)."""

    def grid(num_steps: int, dtype=None):
        check_count("num_steps", num_steps)
        times, end = steps(int(num_steps))
        if end < times[-1] * (1 - 1e-6):
            times = np.append(times, end)
        ts = times.astype(as_dtype(float if dtype is None else dtype))
        decreasing = (np.diff(ts.astype(np.float64)) < 0).all() and ts[0] <= 1
        if len(ts) < 2 or not decreasing:
            raise ValueError(
                f"With `num_steps={num_steps}`, the times of this scheduler are "
                f"{np.array2string(ts, threshold=6)}, not two or more that decrease in "
                "[0, 1]. Use another number of steps, or a grid of the library."
            )
        return jnp.asarray(ts)

    return grid


def spacing_of_levels(values) -> str | None:
    """How noise levels are spaced, unless by index."""
    for name in ("karras_sigmas", "lu_lambdas", "exponential_sigmas"):
        if values.get(f"use_{name}"):
            return name
    return None


def discrete_times(
    name, values, process: DiscreteVP, num_steps: int
) -> tuple[np.ndarray, float]:
    """The times at which the steps start, and the end of the last."""
    sigmas = _noise_levels(process.alphas_cumprod)
    multistep, clipped = "use_flow_sigmas" in values, values.get("lambda_min_clipped")
    whole = multistep or name in BY_INDEX
    at = lambda: indices(
        len(sigmas),
        num_steps,
        values["timestep_spacing"],
        offset=int(values["steps_offset"]),
        skip_last=multistep,
        whole=whole,
        count=None if clipped is None else int((-np.log(sigmas) >= clipped).sum()),
    )
    end = {"zero": 0.0, "first": process.t_min}.get(_end(name, values), math.nan)
    by_level = spacing_of_levels(values)
    if not by_level and whole:
        return (at() + 1) / len(sigmas), end
    used = sigmas[::-1]
    if not (multistep or values.get("interpolation_type") == "log_linear"):
        used = np.interp(at(), np.arange(len(sigmas)), sigmas)
    if not by_level:
        return process.time_of_sigma(used), end
    highest = used[0]
    if values.get("rescale_betas_zero_snr"):
        highest = min(highest, HIGHEST_LEVEL)
    levels = _spaced(values, highest, used[-1], num_steps)
    if levels[0] > 1.0001 * sigmas[-1]:
        raise ValueError(
            f"`sigma_max` must be at most {sigmas[-1]}, the noise level of the last index; "
            f"got {levels[0]}."
        )
    return process.time_of_sigma(levels), end


def flow_times(name, values, betas, num_steps: int) -> tuple[np.ndarray, float]:
    """The same for a `RectifiedFlow`."""
    shift, first = values.get("shift", values.get("flow_shift")), math.nan
    lowest = 1 / values["num_train_timesteps"]
    shifted = lambda s: shift * s / (1 + (shift - 1) * s)
    if name.startswith("FlowMatch"):
        # The lowest level is shifted twice.
        sigmas = shifted(np.linspace(1, shifted(lowest), num_steps))
    elif name == "UniPCMultistepScheduler":
        sigmas = shifted(np.linspace(1, lowest, num_steps + 1)[:-1])
    else:
        sigmas = shifted(np.linspace(1 - lowest, 0, num_steps + 1)[:-1])
    if values.get("shift_terminal") and num_steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - values["shift_terminal"]) / (1 - sigmas[-1])
    if betas is not None:
        # The noise-to-signal ratios of a discrete model, although this is a flow.
        levels = _noise_levels(np.cumprod(1 - betas))
        first = levels[0]
        if spacing_of_levels(values):
            sigmas = _spaced(values, levels[-1], first, num_steps)
            sigmas = sigmas / (1 + sigmas)
    elif spacing_of_levels(values):
        sigmas = _spaced(values, sigmas[0], sigmas[-1], num_steps)
    end = {"zero": 0.0, "first": first}.get(_end(name, values), math.nan)
    time = lambda s: s / (shift - (shift - 1) * s)
    return time(sigmas), time(end)


def _end(name, values) -> str:
    """Where the last step ends: at `"zero"`, at the noise of the `"first"` index, or at the
    `"lowest"` level of its grid, so that it does nothing."""
    by_level = spacing_of_levels(values) or values.get("use_flow_sigmas")
    if name == "DEISMultistepScheduler":
        return "lowest" if by_level else "first"
    to_data = values.get("final_sigmas_type", "zero") == "zero"
    if to_data and values.get("set_alpha_to_one", True):
        return "zero"
    return "lowest" if by_level and name == "UniPCMultistepScheduler" else "first"


def _spaced(values, highest, lowest, num_steps: int) -> np.ndarray:
    """Noise levels from the highest to the lowest, uniform in their logarithm or spaced as
    by Karras et al. (2022, equation 5)."""
    spacing = spacing_of_levels(values)
    if spacing != "lu_lambdas" and values.get("sigma_max") is not None:
        highest = values["sigma_max"]
    if spacing != "lu_lambdas" and values.get("sigma_min") is not None:
        lowest = values["sigma_min"]
    if spacing == "karras_sigmas":
        return np.linspace(highest ** (1 / 7), lowest ** (1 / 7), num_steps) ** 7
    return np.exp(np.linspace(np.log(highest), np.log(lowest), num_steps))


def _noise_levels(alphas_cumprod) -> np.ndarray:
    return np.sqrt(1 / np.maximum(alphas_cumprod, 1e-300) - 1)
