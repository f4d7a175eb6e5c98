from typing import Any, get_args, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._misc import as_dtype, check_choice, check_count, check_positive, show
from .._process import (
    AbstractProcess,
    bounded_log_snr,
    clock_table,
    DiscreteVP,
    log_snr_table_from,
    on_time_axis,
    require_process,
)


IndexGridName = Literal["leading", "trailing", "linspace"]
GridName = (
    Literal["clock", "uniform", "quadratic", "log", "log_snr", "karras"] | IndexGridName
)

_NAMES = [name for names in get_args(GridName) for name in get_args(names)]
_POWERS: dict[Any, float] = {"uniform": 1.0, "quadratic": 2.0}


def time_grid(
    process: AbstractProcess,
    num_steps: int,
    grid: float | GridName = "clock",
    *,
    t0: float | None = None,
    t1: float | None = None,
    dtype=None,
) -> Real[Array, " times"]:
    r"""A time grid for sampling.

    Pass it as `diffrax.StepTo(ts)` together with `t0=ts[0], t1=ts[-1]`.

    **Arguments:**

    - `process`: the forward process.
    - `num_steps`: the number of steps, at least 1.
    - `grid`: the variable in which the times are uniformly spaced.
        - `"clock"`, the default: the mean of two clocks that run from `t_max` to `t_min`.
            One is the log-SNR. The other is the square root of time or, for Gaussian
            paths, a function of the noise level, so that the grid does not depend on how
            time is parametrised.
        - a power $p$: $t^{1/p}$. `"uniform"` is $p = 1$, and `"quadratic"`, the authors'
            choice, is $p = 2$.
        - `"log"`: the logarithm of time.
        - `"log_snr"`: the logarithm of the signal-to-noise ratio, `process.log_snr`.
        - `"karras"`: $\sigma^{1/7}$, where $\sigma$ is the noise-to-signal ratio (Karras
            et al. 2022; [`gddim_eqx.EDM`][]). To end without noise, as they do, pass
            `denoise="exact"` to [`gddim_eqx.sample`][]. Here and in `"log_snr"`, $1 / e$
            is added to the signal-to-noise ratio of a process whose signal vanishes.
        - `"leading"`, `"trailing"`, `"linspace"`: for a [`gddim_eqx.DiscreteVP`][] only,
            the times of `num_steps` indices (Lin et al. 2024, table 2), and time 0.
    - `t0`, `t1`: the first and last time; by default `process.t_max` and `process.t_min`.
        `t0 < t1` gives an increasing grid, for encoding.
    - `dtype`: the dtype of the times; by default JAX's default floating dtype. Use that of
        the states.

    **Returns:** `num_steps + 1` strictly monotone times. The first and last are exactly
    `t0` and `t1`, rounded to `dtype`.

    **Raises:** `ValueError` if `num_steps` is not a positive integer, `t0` and `t1` are
    equal or outside `[0, process.t_end]`, the grid is unknown, or the dtype cannot resolve
    the steps.
    """
    require_process(process)
    check_count("num_steps", num_steps)
    dtype = as_dtype(float if dtype is None else dtype)
    if isinstance(grid, str):
        check_choice("grid", grid, _NAMES)
    else:
        check_positive(grid=grid)
    if grid in get_args(IndexGridName):
        if not (t0 is None and t1 is None):
            raise ValueError(
                f"The indices determine the grid {show(grid)}; leave out `t0` and `t1`."
            )
        return jnp.asarray(_index_times(process, num_steps, grid).astype(dtype))
    start = on_time_axis(process, "t0", process.t_max if t0 is None else t0, dtype)
    end = on_time_axis(process, "t1", process.t_min if t1 is None else t1, dtype)
    if start == end:
        raise ValueError(f"`t0` and `t1` must differ; both are {start}.")
    fraction = np.linspace(0, 1, int(num_steps) + 1)
    if grid == "clock":
        times = _by_table(clock_table(process), start, end, fraction)
    elif grid in ("log_snr", "karras"):
        table, values = log_snr_table_from(process, min(start, end))
        values = bounded_log_snr(process, values)
        if grid == "karras":
            # Powers of the times are interpolated: exact where time is the noise level.
            table, values = table ** (1 / 7), np.exp(-values / 7)
            ends = start ** (1 / 7), end ** (1 / 7)
            times = _by_table((table, values), *ends, fraction) ** 7
        else:
            times = _by_table((table, values), start, end, fraction)
    elif grid == "log":
        if min(start, end) == 0:
            raise ValueError("A 'log' grid cannot reach time 0; use a power.")
        times = np.exp(np.log(start) + fraction * (np.log(end) - np.log(start)))
    else:
        power = float(_POWERS.get(grid, grid))
        first, last = start ** (1 / power), end ** (1 / power)
        times = (first + fraction * (last - first)) ** power
    if not np.isfinite(times).all():
        raise ValueError(
            f"The signal-to-noise ratio of this {type(process).__name__} is nan somewhere "
            f"between {start} and {end}, so a {show(grid)} grid cannot be made. "
            "`gddim_eqx.check_process` may tell why; otherwise use another `grid`."
        )
    times[0], times[-1] = start, end
    times = times.astype(dtype)
    steps = np.diff(times.astype(np.float64)) * np.sign(end - start)
    if not (steps > 0).all():
        raise ValueError(
            f"{num_steps} steps between {start} and {end} are too many to be resolved in "
            f"{dtype}; use fewer steps, or a wider dtype."
        )
    return jnp.asarray(times)


def clock_times(
    process: AbstractProcess, start: float, end: float, fraction: np.ndarray
) -> np.ndarray:
    """The times at fractions of the way from `start` to `end` in the default clock, the
    ends exactly."""
    times = _by_table(clock_table(process), start, end, fraction)
    return np.where(fraction == 0, start, np.where(fraction == 1, end, times))


def _by_table(table, start, end, fraction):
    """Times that are uniform in a monotone function of time, given as a table."""
    times, values = table
    first, last = np.interp([start, end], times, values)
    at, sign = first + fraction * (last - first), np.sign(values[-1] - values[0])
    return np.interp(sign * at, sign * values, times)


def _index_times(process, num_steps, grid):
    """The times of `num_steps` indices of a discrete-time model, and time 0."""
    if not isinstance(process, DiscreteVP):
        raise ValueError(
            f"The grid {grid!r} is for discrete-time models; got {type(process).__name__}. "
            "Use `VP.from_betas` or `VP.from_alphas_cumprod`, or another grid."
        )
    total = len(process.alphas_cumprod)
    return np.append((indices(total, num_steps, grid) + 1) / total, 0.0)


def indices(
    total: int,
    num_steps: int,
    grid: IndexGridName,
    *,
    offset: int = 0,
    skip_last: bool = False,
    whole: bool = True,
    count: int | None = None,
) -> Real[np.ndarray, " steps"]:
    """`num_steps` decreasing indices of a discrete-time model.

    **Arguments:**

    - `total`: the number of indices of the model.
    - `num_steps`, `grid`: as in `time_grid`.
    - `offset`: added to the indices of a `"leading"` grid.
    - `skip_last`: for a `"leading"` or `"linspace"` grid, whether to compute
        `num_steps + 1` indices and drop the last.
    - `whole`: whether the indices of a `"linspace"` grid are rounded to integers.
    - `count`: use only the first `count` indices of the model; by default all.
    """
    count, skip = total if count is None else count, skip_last and grid != "trailing"
    number = int(num_steps) + skip
    if grid == "trailing":
        # In the order that decides how halves are rounded.
        found = np.round(np.arange(count, 0, -total / number)) - 1
        found = found[found >= 0]
    elif grid == "leading":
        found = np.arange(number)[::-1] * (count // number) + offset
    else:
        found = np.linspace(0, count - 1, number)[::-1] if number > 1 else [count - 1.0]
        found = np.round(found) if whole else np.asarray(found)
    found = found[: len(found) - skip]
    inside = len(found) and 0 <= found[-1] and found[0] <= total - 1
    if not (inside and (np.diff(found) < 0).all()):
        raise ValueError(
            f"A model of {count} indices has no {show(grid)} grid of {num_steps} steps"
            f"{f' with offset {offset}' if offset else ''}; use fewer steps."
        )
    return found
