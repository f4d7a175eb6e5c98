from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from ._check import check_count
from ._clock import clock
from ._process import AbstractProcess, check_process


_POWERS = {"uniform": 1.0, "quadratic": 2.0}


def time_grid(
    process: AbstractProcess,
    num_steps: int,
    grid: float | Literal["clock", "uniform", "quadratic", "log"] = "clock",
    *,
    t0: float | None = None,
    t1: float | None = None,
    dtype=None,
) -> Real[Array, " times"]:
    r"""The times to step to when sampling.

    Pass it as `diffrax.StepTo(ts)` together with `t0=ts[0], t1=ts[-1]`.

    **Arguments:**

    - `process`: the forward process.
    - `num_steps`: the number of steps, at least 1.
    - `grid`: by default `"clock"`, uniform in the mean of two clocks that run from
        `t_max` to `t_min`: the logarithm of the signal-to-noise ratio and the square root
        of time. Or a power $p$ for times uniform in $t^{1/p}$, or another name:
        `"uniform"` is 1, `"quadratic"` is 2, the authors' choice, and `"log"` is uniform
        in the logarithm of time.
    - `t0`, `t1`: where to start and end; by default `process.t_max` and `process.t_min`.
        `t0 < t1` gives a grid that increases, for encoding.
    - `dtype`: of the times; by default JAX's default floating dtype. Use the states'.

    **Returns:** `num_steps + 1` strictly monotone times. The first and last are exactly
    `t0` and `t1` in that dtype.

    **Raises:** `ValueError` if `num_steps` is not a positive integer, the times are not
    distinct or outside `[0, process.t_end]`, the grid is unknown, or the dtype cannot
    hold so many different times.
    """
    check_process(process)
    check_count("num_steps", num_steps)
    start = float(process.t_max if t0 is None else t0)
    end = float(process.t_min if t1 is None else t1)
    for name, value in (("t0", start), ("t1", end)):
        if not 0 <= value <= process.t_end:
            raise ValueError(
                f"`{name}` must be in [0, {process.t_end}], the time axis of "
                f"{type(process).__name__}; got {value}."
            )
    if start == end:
        raise ValueError(f"`t0` and `t1` must differ; both are {start}.")
    fraction = np.linspace(0, 1, int(num_steps) + 1)
    if grid == "clock":
        times = _by_clock(process, start, end, fraction)
    elif grid == "log":
        if min(start, end) == 0:
            raise ValueError("A 'log' grid cannot reach time 0; use a power.")
        times = np.exp(np.log(start) + fraction * (np.log(end) - np.log(start)))
    else:
        power = _POWERS.get(grid, None) if isinstance(grid, str) else float(grid)
        if power is None or not 0 < power < np.inf:
            raise ValueError(
                "`grid` must be a positive power or one of 'clock', 'uniform', "
                f"'quadratic', 'log'; got {grid!r}."
            )
        first, last = start ** (1 / power), end ** (1 / power)
        times = (first + fraction * (last - first)) ** power
    times[0], times[-1] = start, end
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a floating dtype; got {dtype}.")
    times = times.astype(dtype)
    steps = np.diff(times.astype(np.float64)) * np.sign(end - start)
    if not (steps > 0).all():
        raise ValueError(
            f"{num_steps} steps between {start} and {end} are too many to be told apart "
            f"in {dtype}; take fewer, or a wider dtype."
        )
    return jnp.asarray(times)


def _by_clock(process, start, end, fraction):
    fine = np.linspace(start**0.25, end**0.25, 4001) ** 4
    with jax.ensure_compile_time_eval():
        times = jnp.asarray(fine, jnp.result_type(float))
        readings = np.asarray(_readings(process, times), np.float64)
    wanted = readings[0] + fraction * (readings[-1] - readings[0])
    order = np.argsort(readings)
    return np.interp(wanted, readings[order], fine[order])


@eqx.filter_jit
def _readings(process, times):
    # Below `t_min`, where the signal-to-noise ratio may grow without bound, the clock by
    # time runs on alone.
    return jax.vmap(lambda t: clock(process, t, process.t_min))(times)
