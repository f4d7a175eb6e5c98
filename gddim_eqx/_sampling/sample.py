import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, cast, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from .._custom_types import Args, Key, Stochasticity, Times
from .._linear import at_least_single
from .._misc import (
    as_dtype,
    check_choice,
    check_count,
    check_instance,
    check_key,
    check_per_sample,
    show,
)
from .._process import AbstractProcess, as_grid
from .._sharding import Placement
from .._term import (
    as_lam,
    as_model,
    check_flow,
    evaluated_model,
    flow_first,
    map_rows,
    ProbabilityFlow,
    reverse_sde,
    without_errors,
)
from ..solvers import GDDIM, LearnedGDDIM
from .diagnosis import find_fault, most_expected
from .solve import last, number_of_evaluations, PaddedGrid, times_for
from .start import GaussianStart, known_start


class Samples(NamedTuple):
    """What [`gddim_eqx.sample`][] returns."""

    x: Float[Array, "number *shape"]
    """The data: a NumPy array if they were drawn in batches."""
    evaluations: int | None
    """The number of model evaluations per sample (NFE). It is known for the solvers of this
    library, and for Diffrax's explicit Runge-Kutta methods and those for stochastic
    equations; for others it is `None`."""


class _TracedOnce(eqx.Module):
    """A model that is traced once, not every time that Diffrax traces a step."""

    model: Callable

    @eqx.filter_jit
    def __call__(self, t, u, args):
        return self.model(t, u, args)


class _PathPerSample(dfx.AbstractBrownianPath):
    path: dfx.UnsafeBrownianPath
    """With one key for each sample."""
    levy_area: type = eqx.field(static=True, default=dfx.BrownianIncrement)
    t0: float = eqx.field(static=True, default=-math.inf)
    t1: float = eqx.field(static=True, default=math.inf)

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        return jax.vmap(lambda path: path.evaluate(t0, t1, left, use_levy))(self.path)


_no_meter = dfx.NoProgressMeter()


class _Sampler(eqx.Module):
    """What to draw samples with; all of it, or with the rows of one batch."""

    flow: ProbabilityFlow
    args: Args
    solver: dfx.AbstractSolver
    lam: Stochasticity
    denoise: str | None = eqx.field(static=True)
    grid: PaddedGrid
    key: Key
    placement: Placement | None

    @eqx.filter_jit
    def draw(self, index: Array | np.ndarray, meter: dfx.AbstractProgressMeter):
        """The samples of these indices, the mean square of each, and how the solve
        ended."""
        flow, args = self.flow, self.args
        if self.placement is not None:
            size, shard = len(index), self.placement.shard
            flow = map_rows(lambda _, x: shard(x), flow)
            is_per_sample = lambda x: eqx.is_array(x) and x.ndim > 0 and len(x) == size
            args = jtu.tree_map(lambda x: shard(x) if is_per_sample(x) else x, args)
            index = shard(index)
        flow = eqx.tree_at(evaluated_model, flow, _TracedOnce(evaluated_model(flow)))
        terms, ts = flow, self.grid.ts
        keys = jax.vmap(jr.fold_in, (None, 0))(self.key, index)
        u = jax.vmap(lambda key: flow.process.prior(key, (), ts.dtype))(keys)
        if not isinstance(self.lam, float) or self.lam != 0:
            # Distinct from any key that the prior splits off this one.
            keys = jax.vmap(lambda key: jr.fold_in(key, 2**31 - 1))(keys)
            one = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), u)
            paths = jax.vmap(lambda key: dfx.UnsafeBrownianPath(one, key))(keys)
            terms = reverse_sde(flow, self.lam, _PathPerSample(path=paths))
        sol = dfx.diffeqsolve(
            *(terms, self.solver, ts[0], ts[-1], None, u, args),
            stepsize_controller=self.grid,
            max_steps=None,
            # Compiles faster than the adjoints for reverse-mode derivatives.
            adjoint=dfx.ForwardMode(),
            progress_meter=meter,
            throw=False,
        )
        u = last(sol)
        if self.denoise == "drift":
            drift = flow.reverse_drift(ts[-1], u, args, 1.0)
            u = jtu.tree_map(lambda y, d: y - ts[-1] * d, u, drift)
        elif self.denoise == "exact":
            u = flow.denoised(ts[-1], u, args)
        x = flow.process.decode(u)
        squares = x.astype(at_least_single(x.dtype)) ** 2
        mean = squares.mean(tuple(range(1, x.ndim)))
        return x, mean, dfx.is_successful(sol.result), sol.result

    def rows(self, index: np.ndarray, number: int) -> "_Sampler":
        """For some of the samples. Those beyond the last have the rows of the last."""
        is_array = lambda x: eqx.is_array(x) and x.ndim > 0
        arrays, rest = eqx.partition(self.args, is_array)
        check_per_sample("With `batch_size`, every array in `args`", arrays, (number,))
        index = np.minimum(index, number - 1)
        flow = map_rows(lambda _, x: x[index], self.flow)
        args = eqx.combine(jtu.tree_map(lambda x: x[index], arrays), rest)
        return dataclasses.replace(self, flow=flow, args=args)

    def checked(self, first: int, size: int, wanted: int, meter: Any = _no_meter):
        """A batch of samples, from an index on, and the sum of the first mean squares."""
        index = np.arange(first, first + size, dtype=np.uint64).astype(np.uint32)
        quiet = dataclasses.replace(self, flow=without_errors(self.flow))
        x, squares, successful, result = quiet.draw(index, meter)
        if not successful:
            raise RuntimeError(f"The solver failed: {dfx.RESULTS[result]}")
        squares = _on_host(squares)[:wanted].astype(np.float64)
        if wrong := (~np.isfinite(squares)).sum():
            # If the solver or the model cannot start at this time, this raises the reason.
            step = dataclasses.replace(self, grid=PaddedGrid.of(self.grid.ts[:2]))
            step.draw(index, _no_meter)
            where = f", from index {first}," if first else ""
            raise FloatingPointError(
                f"{wrong} of {wanted} samples{where} are not finite. {self.fault(size)}"
            )
        return x, squares.sum()

    def in_batches(self, first: int, number: int, size: int, meter):
        """As `checked`, for all samples, with the data on the host."""
        starts, shown = range(0, number, size) if number else (0,), meter.init()
        whole, total = np.empty(0), 0.0
        try:
            for n, start in enumerate(starts, 1):
                # The last batch is filled up.
                some = self.rows(np.arange(start, start + size), number)
                wanted = min(size, number - start)
                x, square = some.checked(first + start, size, wanted)
                x = _on_host(x)[:wanted]
                whole = np.empty((number, *x.shape[1:]), x.dtype) if n == 1 else whole
                whole[start : start + size] = x
                done = jnp.asarray(n / len(starts))
                total, shown = total + square, meter.step(shown, done)
        finally:
            meter.close(shown)
        return whole, total

    def fault(self, size: int) -> str:
        dtype = self.grid.ts.dtype
        return find_fault(self.flow, self.args, size, dtype, self.key, self.placement)


@flow_first("sample(flow, key, number)")
def sample(
    flow: ProbabilityFlow,
    key: Key,
    number: int,
    num_steps: int | None = None,
    solver: dfx.AbstractSolver = GDDIM(),
    *,
    lam: Stochasticity = 0.0,
    denoise: Literal["drift", "exact"] | None = None,
    ts: Times | None = None,
    start: GaussianStart | Literal["auto"] | None = "auto",
    args: Args = None,
    dtype=None,
    first: int = 0,
    batch_size: int | None = None,
    placement: Placement | None = None,
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter(),
) -> Samples:
    """Draw samples from a diffusion model: the prior, a time grid, a solve and a check,
    in one call.

    Each sample depends only on the key and on its index: the first 10 of 1,000 are those
    of `number=10`. (This holds for JAX's default kind of keys, threefry.)

    For gradients, saved trajectories, adaptive steps or a solve inside `jax.jit` or
    `jax.vmap`, call `diffrax.diffeqsolve` on a [`gddim_eqx.ProbabilityFlow`][].

    **Arguments:**

    - `flow`: the probability flow of the model. Passing the same model again does not
        recompile; a new `lambda`, or another Python number in a model, does.
    - `key`: a random key.
    - `number`: the number of samples.
    - `num_steps`: the number of steps of the default grid; 50 if neither this nor `ts`
        is given. A learned solver has its own times: leave out both.
    - `solver`: any Diffrax solver for ordinary differential equations, or for stochastic
        ones if `lam` is not 0; [`gddim_eqx.GDDIM`][] by default.
    - `lam`: the stochasticity: 0 for the probability flow, else a number or a function of
        time, as in [`gddim_eqx.reverse_sde`][]. Noise is drawn anew at every step, so it
        depends on the grid.
    - `denoise`: how to treat the noise left at the last time. Both methods below cost one
        more evaluation.
        - `None`: leave it.
        - `"drift"`: the step of the authors' code, an Euler step to time 0 with the drift
            of `lam=1`. For a process with a velocity only the velocity is driven by the
            score, so the prediction cannot change the data and the evaluation is wasted.
        - `"exact"`: a step of the exponential integrator to time 0, without the noise that
            the process has there: the data prediction.
    - `ts`: a time grid in place of `num_steps`, for example from [`gddim_eqx.time_grid`][].
        It must start at `process.t_max`, the time of the prior.
    - `start`: how to treat high noise levels.
        - a [`gddim_eqx.GaussianStart`][]: in closed form. `num_steps` is then the number of
            evaluations of the model; a few more steps need none. With `ts`, these are the
            times of all steps, and the start must have its time `t`.
        - `"auto"`: for up to 10 evaluations, the start `GaussianStart(data)`, if the model
            has the moments of its data, as a preconditioned
            [`gddim_eqx.nn.NetworkModel`][] does; or an earlier one, if it has only their
            standard deviation. For a process with a velocity, such as [`gddim_eqx.CLD`][],
            in the regime `"sharpest"`. Only for `GDDIM` in data space, on the default grid,
            and without noise. Not from a standard deviation under [`gddim_eqx.BDM`][],
            where frequencies differ.
        - `None`: the model is evaluated at all times.
    - `args`: passed to the model: for a conditional one, such as a
        [`gddim_eqx.nn.NetworkModel`][], the condition of each sample, `(number, ...)`, or a
        pytree of these.
    - `dtype`: of the times, states and samples; by default that of `ts`, or JAX's default.
        Coefficients have at least single precision. For a large model, keep float32 and let
        the network compute in bfloat16, as by `gddim_eqx.nn.NCSNpp(dtype=jnp.bfloat16)`.
    - `first`: the index of the first sample, to continue an earlier call.
    - `batch_size`: if given, samples are drawn in batches of this size, to save memory, and
        collected in a NumPy array. They are the same whatever the batch size, up to
        rounding. All arrays in `args` must then have one row per sample. Arrays of one row
        per sample in guidance, such as `y` of [`gddim_eqx.posterior_guidance`][], are
        split too; those in a model of your own cannot be: pass them as `args`.
    - `placement`: how to shard the samples over devices, which does not change them; by
        default all are on the first device. The model must be on the same devices.
    - `progress_meter`: for example `diffrax.TextProgressMeter()`. With `batch_size` it
        shows progress over all batches.

    **Returns:** [`gddim_eqx.results.Samples`][]: the data, `(number, *shape)`, and the
    number of evaluations of the model.

    **Raises:** `ValueError` for invalid arguments, or if called while JAX is tracing.
    `FloatingPointError` if a sample is not finite.

    **Warns:** if samples are implausibly large for the process and model.

    The warning and the `FloatingPointError` name the time at which the model is off, found
    with 21 more evaluations; or the solver.
    """
    if isinstance(key, Tracer):
        raise ValueError(
            "`sample` counts evaluations and checks its result, so it cannot be traced "
            "by `jax.jit`, `jax.vmap` or `jax.grad`. There, call "
            "`diffrax.diffeqsolve(ProbabilityFlow(process, model), GDDIM(), ...)`."
        )
    check_flow(flow)
    check_key(key)
    check_count("number", number, least=0)
    check_count("first", first, least=0)
    number, first = int(number), int(first)
    if first + number > 2**32:
        raise ValueError(
            f"Samples are numbered up to 2**32; got first={first} and number={number}. "
            "Use another key."
        )
    check_instance("placement", placement, Placement | None, "a `Placement()`")
    wanted = "a Diffrax progress meter, such as `TextProgressMeter()`"
    check_instance("progress_meter", progress_meter, dfx.AbstractProgressMeter, wanted)
    check_choice("denoise", denoise, (None, "drift", "exact"))
    if start == "auto":
        plain = ts is None and isinstance(lam, (int, float)) and lam == 0
        start = known_start(flow, solver, num_steps) if plain else None
    if start is not None:
        flow, ts = _started(flow, solver, start, num_steps, ts, dtype)
        num_steps = None
    ts = times_for(flow.process, solver, num_steps, ts, dtype)
    if dtype is not None:
        ts = as_grid(flow.process, ts.astype(as_dtype(dtype)), "decreasing")
    times = np.asarray(ts)
    _check_ends(flow.process, times, denoise)
    args = jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args)
    as_model(flow.model).check_args(args)
    flow = map_rows(lambda name, x: _check_number(name, x, number, first), flow)
    size = _size_of_batch(number, batch_size, placement)
    grid = PaddedGrid.of(times)
    sampler = _Sampler(flow, args, solver, as_lam(lam), denoise, grid, key, placement)
    if batch_size is None:
        x, square = sampler.checked(first, size, number, progress_meter)
    else:
        _check_other_sizes(sampler, size, number)
        x, square = sampler.in_batches(first, number, size, progress_meter)
        sampler = sampler.rows(np.arange(size), number)
    most = most_expected(flow)
    if (root_mean_square := (square / max(number, 1)) ** 0.5) > most:
        warnings.warn(
            f"The samples have a root mean square of {root_mean_square:.1e}, but at most "
            f"about {most:.1e} is plausible for this process and model. "
            f"{sampler.fault(size)}",
            stacklevel=3,
        )
    evaluations = number_of_evaluations(flow, solver, times, denoise is not None)
    return Samples(cast(Array, x), evaluations)


def _started(flow, solver, start, num_steps, ts, dtype):
    """The flow and the times of a sampler with a start."""
    check_instance("start", start, GaussianStart, "a `GaussianStart`, 'auto' or None")
    if isinstance(solver, LearnedGDDIM):
        raise ValueError("A learned solver has its own times; leave out `start`.")
    if ts is None:
        num_steps = 50 if num_steps is None else num_steps
        # Searched for once.
        start = dataclasses.replace(start, t=start.time(flow.process, num_steps))
        ts = start.time_grid(flow.process, num_steps, dtype=dtype)
    elif num_steps is not None:
        raise ValueError("Pass `num_steps` or `ts`, not both.")
    elif start.t is None:
        raise ValueError("With `ts`, pass the time `t` of the `GaussianStart` too.")
    return start.flow(flow, 1), ts


def _check_ends(process: AbstractProcess, ts: np.ndarray, denoise: str | None) -> None:
    rounding = float(jnp.finfo(ts.dtype).eps)
    if abs(float(ts[0]) - process.t_max) > rounding * process.t_max:
        raise ValueError(
            f"`ts` must start at {process.t_max}, which is `process.t_max`, the time of "
            f"the prior; got times from {ts[0]} to {ts[-1]}. Use `num_steps`. For a "
            "'leading' grid, which starts later, use one with 'trailing' spacing, or "
            "`gddim_eqx.generate(flow, process.prior(key, (number,)), ts=ts)`."
        )
    if denoise is not None and float(ts[-1]) == 0:
        raise ValueError("At time 0 nothing is left to denoise; leave out `denoise`.")


def _size_of_batch(number: int, size: int | None, placement: Placement | None) -> int:
    if size is None:
        size = number
    else:
        check_count("batch_size", size)
    if placement is None:
        return min(int(size), number)
    placement.check_batch(size)
    return min(int(size), -(-number // placement.mesh.size) * placement.mesh.size)


def _check_number(name: str, x: Array, number: int, first: int) -> Array:
    if len(x) != number:
        raise ValueError(
            f"{name} has {len(x)} rows, one per sample, but {number} samples are drawn"
            + (f", from {first} to {first + number - 1}." if first else ".")
        )
    return x


def _check_other_sizes(sampler: _Sampler, size: int, number: int) -> None:
    """**Raises:** `ValueError` for a model that is for batches of one size only, if there
    are several: it may hold one row per sample, and every batch would get the same."""
    if number <= size:
        return

    def predict(size):
        some, ts = sampler.rows(np.arange(size), number), sampler.grid.ts
        u = some.flow.process.prior(jr.key(0), (size,), ts.dtype)
        return some.flow.predict(ts[0], u, some.args)

    jax.eval_shape(lambda: predict(size))
    try:
        jax.eval_shape(lambda: predict(2 * size))
    except Exception as error:
        raise ValueError(
            f"The model is for batches of {size} samples only. If it holds arrays of one "
            f"row per sample, every batch of `batch_size={size}` would get the same: pass "
            "them as `args`. Otherwise call `sample` for each batch, with `first`. For a "
            f"batch of {2 * size} it raised: {show(error)}"
        ) from error


def _on_host(x: Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
