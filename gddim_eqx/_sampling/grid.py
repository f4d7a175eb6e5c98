from typing import get_args, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._misc import as_dtype, check_count
from .._process import (
    AbstractProcess,
    clock_table,
    log_snr_table,
    on_time_axis,
    require_process,
)


GridName = Literal["clock", "uniform", "quadratic", "karras", "log", "log_snr"]

_POWERS = {"uniform": 1.0, "quadratic": 2.0, "karras": 7.0}


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
    - `grid`: by default `"clock"`, uniform in the mean of two clocks that run from `t_max`
        to `t_min`: the log-SNR and the square root of time. Or a power $p$, for times
        uniform in $t^{1/p}$: `"uniform"` is 1; `"quadratic"`, the authors' choice, is 2;
        and `"karras"`, for [`gddim_eqx.EDM`][], is 7. `"log"` is uniform in the logarithm
        of time, and `"log_snr"` in that of the signal-to-noise ratio.
    - `t0`, `t1`: the first and last time; by default `process.t_max` and `process.t_min`.
        `t0 < t1` gives an increasing grid, for encoding.
    - `dtype`: the dtype of the times; by default JAX's default floating dtype. Use that of
        the states.

    **Returns:** `num_steps + 1` strictly monotone times. The first and last are exactly
    `t0` and `t1` in that dtype.

    **Raises:** `ValueError` if `num_steps` is not a positive integer, `t0` and `t1` are
    equal or outside `[0, process.t_end]`, the grid is unknown, or the dtype cannot resolve
    the steps.
    """
    require_process(process)
    check_count("num_steps", num_steps)
    dtype = as_dtype(float if dtype is None else dtype)
    start = on_time_axis(process, "t0", process.t_max if t0 is None else t0, dtype)
    end = on_time_axis(process, "t1", process.t_min if t1 is None else t1, dtype)
    if start == end:
        raise ValueError(f"`t0` and `t1` must differ; both are {start}.")
    fraction = np.linspace(0, 1, int(num_steps) + 1)
    if grid == "clock":
        times = _by_table(clock_table(process), start, end, fraction)
    elif grid == "log_snr":
        times = _by_table(log_snr_table(process), start, end, fraction)
    elif grid == "log":
        if min(start, end) == 0:
            raise ValueError("A 'log' grid cannot reach time 0; use a power.")
        times = np.exp(np.log(start) + fraction * (np.log(end) - np.log(start)))
    else:
        power = _power(grid)
        first, last = start ** (1 / power), end ** (1 / power)
        times = (first + fraction * (last - first)) ** power
    if not np.isfinite(times).all():
        raise ValueError(
            f"The signal-to-noise ratio of this {type(process).__name__} is nan somewhere "
            f"between {start} and {end}, so a 'clock' grid cannot be made. "
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


def _power(grid):
    try:
        power = _POWERS[grid] if isinstance(grid, str) else float(grid)
        if not 0 < power < np.inf:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "`grid` must be a positive power or one of "
            f"{', '.join(map(repr, get_args(GridName)))}; got {grid!r}."
        ) from None
    return power


def _by_table(table, start, end, fraction):
    """Times uniform in a function that decreases with time, from its table."""
    times, values = table
    first, last = np.interp([start, end], times, values)
    return np.interp(first + fraction * (last - first), values[::-1], times[::-1])
