import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from typing import cast, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, PyTree, Shaped

from .._custom_types import Args, FrameName, Key, Level, PredictionName, Times
from .._linear import at_least_single
from .._misc import (
    as_dtype,
    as_level,
    check_args,
    check_count,
    check_instance,
    check_key,
    check_per_sample,
    errors_as_nan,
    map_rows,
    show,
)
from .._process import AbstractProcess, as_grid, log_snr_at_start
from .._sharding import Placement
from .._term import (
    evaluated_model,
    ProbabilityFlow,
    reverse_sde,
    StartedModel,
    takes_flow,
)
from ..solvers import GDDIM, LearnedGDDIM, SSCS
from .diagnosis import find_fault
from .solve import last, PaddedGrid, solve, times_for
from .start import GaussianStart, known_start


class Samples(NamedTuple):
    """What [`gddim_eqx.sample`][] returns."""

    x: Float[Array, "number *shape"]
    """The data: a NumPy array if they were drawn in batches."""
    evaluations: int
    """The number of model evaluations per sample (NFE); over several batches, the
    largest."""


# Counts per call, so that calls from several threads do not mix.
_evaluations: dict[int, int] = {}
_calls = itertools.count()


class _Counted(eqx.Module):
    model: Callable
    call: Array

    def __call__(self, t, u, args):
        def count(call):
            _evaluations[int(call)] += 1

        jax.debug.callback(count, self.call)
        return self.model(t, u, args)


class _TracedOnce(eqx.Module):
    """A model that is traced once, not every time that Diffrax traces a step."""

    model: Callable

    @eqx.filter_jit
    def __call__(self, t, u, args):
        return self.model(t, u, args)


def _is_counted(solver: dfx.AbstractSolver) -> bool:
    """Whether the number of evaluations of every step is known. Otherwise a callback counts
    them, which takes time, and keeps the program out of JAX's persistent cache."""
    return isinstance(solver, (GDDIM, LearnedGDDIM, SSCS, dfx.Euler))


class _PathPerSample(dfx.AbstractBrownianPath):
    """An `UnsafeBrownianPath` for each sample."""

    shape: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    keys: Shaped[Array, "number ..."]
    levy_area: type = eqx.field(static=True, default=dfx.BrownianIncrement)

    @property
    def t0(self):
        return -math.inf

    @property
    def t1(self):
        return math.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        def one(key):
            return dfx.UnsafeBrownianPath(self.shape, key).evaluate(t0, t1, left, use_levy)

        return jax.vmap(one)(self.keys)


@eqx.filter_jit
def _solve(flow, lam, solver, denoise, grid, key, index, wanted, args, meter, placement):
    if placement is not None:
        number, shard = len(index), placement.shard
        flow = map_rows(lambda _, x: shard(x), flow)
        is_per_sample = lambda x: eqx.is_array(x) and x.ndim > 0 and len(x) == number
        args = jtu.tree_map(lambda x: shard(x) if is_per_sample(x) else x, args)
        index = shard(index)
    flow = eqx.tree_at(evaluated_model, flow, _TracedOnce(evaluated_model(flow)))
    process, terms, ts = flow.process, flow, grid.ts
    keys = jax.vmap(jr.fold_in, (None, 0))(key, index)
    u = jax.vmap(lambda key: process.prior(key, (), ts.dtype))(keys)
    if not isinstance(lam, float) or lam != 0:
        # Distinct from any key that the prior splits off this one.
        keys = jax.vmap(lambda key: jr.fold_in(key, 2**31 - 1))(keys)
        one = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), u)
        terms = reverse_sde(flow, lam, _PathPerSample(shape=one, keys=keys))
    # Compiles faster than the adjoints for reverse-mode derivatives.
    options = dict(stepsize_controller=grid, max_steps=None, adjoint=dfx.ForwardMode())
    options |= dict(progress_meter=meter, throw=False)
    with contextlib.nullcontext() if grid.raises else errors_as_nan():
        sol = solve(terms, solver, ts, u, args, **options)
    u = last(sol)
    if denoise == "drift":
        drift = flow.reverse_drift(ts[-1], u, args, 1.0)
        u = jtu.tree_map(lambda y, d: y - ts[-1] * d, u, drift)
    elif denoise == "exact":
        u = flow.denoised(ts[-1], u, args)
    x = process.decode(u)
    axes = tuple(range(1, x.ndim))
    counts = jnp.arange(len(x), dtype=jnp.uint32) < wanted
    bad = (counts & ~jnp.isfinite(x).all(axes)).sum()
    squares = (x.astype(at_least_single(x.dtype)) ** 2).mean(axes)
    total = jnp.where(counts, squares, 0).sum()
    return x, sol.result, sol.stats["num_steps"], bad, total


@takes_flow
def sample(
    process: AbstractProcess,
    model: Callable,
    key: Key,
    number: int,
    num_steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    *,
    lam: Level = 0.0,
    denoise: Literal["drift", "exact"] | None = None,
    ts: Times | None = None,
    start: GaussianStart | Literal["auto"] | None = "auto",
    predicts: PredictionName = "noise",
    factor: FrameName = "R",
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

    - `process`, `model`: the forward process, and a model called as `model(t, u, args)` on
        the whole batch. Alternatively, pass a [`gddim_eqx.ProbabilityFlow`][] in place of
        both, `predicts` and `factor`: `sample(flow, key, number)`. Passing the same object
        again does not recompile; a new `lambda`, or another Python number in a model, does.
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
    - `predicts`, `factor`: as in [`gddim_eqx.ProbabilityFlow`][].
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
        per sample in guidance, such as `y` of [`gddim_eqx.PosteriorGuidance`][], are
        split too; those in a model of your own cannot be: pass them as `args`.
    - `placement`: how to shard the samples over devices, which does not change them; by
        default all are on the first device. The model must be on the same devices.
    - `progress_meter`: for example `diffrax.TextProgressMeter()`. With `batch_size` it
        shows progress over all batches.

    **Returns:** [`gddim_eqx.Samples`][]: the data, `(number, *shape)`, and the number of
    evaluations of the model.

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
    flow = ProbabilityFlow(process, model, predicts, factor)
    check_key(key)
    check_count("number", number, least=0)
    solver = GDDIM() if solver is None else solver
    check_instance("placement", placement, Placement | None, "a `Placement()`")
    wanted = "a Diffrax progress meter, such as `TextProgressMeter()`"
    check_instance("progress_meter", progress_meter, dfx.AbstractProgressMeter, wanted)
    if denoise not in (None, "drift", "exact"):
        raise ValueError(
            f"`denoise` must be None, 'drift' or 'exact'; got {show(denoise)}."
        )
    dtype = None if dtype is None else as_dtype(dtype)
    if start == "auto":
        plain = ts is None and isinstance(lam, (int, float)) and lam == 0
        start = known_start(flow, solver, num_steps) if plain else None
    if start is not None:
        flow, ts = _started(flow, solver, start, num_steps, ts, dtype)
        num_steps = None
    ts = times_for(process, solver, num_steps, ts, dtype)
    ts = _checked_times(process, ts, dtype)
    check_count("first", first, least=0)
    number, first = int(number), int(first)
    if first + number > 2**32:
        raise ValueError(
            f"Samples are numbered up to 2**32; got first={first} and number={number}. "
            "Use another key."
        )
    size = _size_of_batch(number, batch_size, placement)
    if denoise is not None and float(ts[-1]) == 0:
        raise ValueError("At time 0 nothing is left to denoise; leave out `denoise`.")
    args = jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args)
    check_args(model, args)
    flow = map_rows(lambda name, x: _check_number(name, x, number, first), flow)
    given = as_level(lam), solver, denoise, ts, key
    if batch_size is not None:
        _check_other_sizes(flow, args, ts, size, number)

    def draw(start: int, meter: dfx.AbstractProgressMeter):
        some = flow, args
        if batch_size is not None:
            some = _rows(flow, args, start + np.arange(size), number)
        index = jnp.uint32(first + start) + jnp.arange(size, dtype=jnp.uint32)
        # The last batch is filled up.
        wanted = jnp.uint32(min(size, number - start))
        return _draw(some[0], *given, index, wanted, some[1], meter, placement)

    if batch_size is None:
        x, evaluations, total = draw(0, progress_meter)
    else:
        x, evaluations, total = _in_batches(draw, number, size, progress_meter)
    root_mean_square = (total / max(number, 1)) ** 0.5
    if root_mean_square > (most := _most_expected(process, model)):
        some = flow, args
        if batch_size is not None:
            some = _rows(flow, args, np.arange(size), number)
        fault = find_fault(*some, size, ts.dtype, key, most, placement)
        warnings.warn(
            f"The samples have a root mean square of {root_mean_square:.1e}, but at most "
            f"about {most:.1e} is plausible for this process and model. {fault}",
            stacklevel=3,
        )
    return Samples(cast(Array, x), evaluations)


def _started(flow, solver, start, num_steps, ts, dtype):
    """The flow and the times of a sampler with a start."""
    check_instance("start", start, GaussianStart, "a `GaussianStart`, 'auto' or None")
    if isinstance(solver, LearnedGDDIM):
        raise ValueError("A learned solver has its own times; leave out `start`.")
    if ts is None:
        number = 50 if num_steps is None else num_steps
        # Searched for once.
        start = dataclasses.replace(start, t=start.time(flow.process, number))
        ts = start.time_grid(flow.process, number, dtype=dtype)
        return start.flow(flow, number), ts
    if num_steps is not None:
        raise ValueError("Pass `num_steps` or `ts`, not both.")
    if start.t is None:
        raise ValueError("With `ts`, pass the time `t` of the `GaussianStart` too.")
    return start.flow(flow, 1), ts


def _size_of_batch(number: int, size: int | None, placement: Placement | None) -> int:
    devices = 1
    if size is not None:
        check_count("batch_size", size)
    if placement is not None:
        placement.check_batch(number if size is None else size)
        devices = placement.mesh.size
    return number if size is None else min(int(size), -(-number // devices) * devices)


def _check_number(name: str, x: Array, number: int, first: int) -> Array:
    if len(x) != number:
        raise ValueError(
            f"{name} has {len(x)} rows, one per sample, but {number} samples are drawn"
            + (f", from {first} to {first + number - 1}." if first else ".")
        )
    return x


def _rows(flow, args: Args, index: np.ndarray, number: int):
    """The flow and args of some samples. Those beyond the last get those of the last."""
    arrays, rest = eqx.partition(args, lambda x: eqx.is_array(x) and x.ndim > 0)
    check_per_sample("With `batch_size`, every array in `args`", arrays, (number,))
    index = np.minimum(index, max(number - 1, 0))
    take = lambda x: x[index] if len(x) else x
    flow = map_rows(lambda _, x: take(x), flow)
    return flow, eqx.combine(jtu.tree_map(take, arrays), rest)


def _check_other_sizes(flow, args: Args, ts: Array, size: int, number: int) -> None:
    """**Raises:** `ValueError` for a model that is for batches of one size only, if there
    are several: it may hold one row per sample, and every batch would get the same."""
    if number <= size:
        return

    def predict(size):
        some, its_args = _rows(flow, args, np.arange(size), number)
        u = flow.process.prior(jr.key(0), (size,), ts.dtype)
        return some.predict(ts[0], u, its_args)

    try:
        jax.eval_shape(lambda: predict(2 * size))
    except Exception as error:
        try:
            jax.eval_shape(lambda: predict(size))
        except Exception:
            return  # Whatever the size: it is raised when samples are drawn.
        raise ValueError(
            f"The model is for batches of {size} samples only. If it holds arrays of one "
            f"row per sample, every batch of `batch_size={size}` would get the same: pass "
            "them as `args`. Otherwise call `sample` for each batch, with `first`. For a "
            f"batch of {2 * size} it raised: {show(error)}"
        ) from error


def _draw(flow, lam, solver, denoise, ts, key, index, wanted, args, meter, placement):
    """A batch of samples, the number of evaluations, and the sum of mean squares."""
    known, call = _is_counted(solver), next(_calls)
    uncounted = flow, args
    _evaluations[call] = 0
    if not known:
        counted = _Counted(evaluated_model(flow), jnp.asarray(call))
        flow = eqx.tree_at(evaluated_model, flow, counted)
    given, rest = (flow, lam, solver, denoise), (key, index, wanted, args)
    try:
        grid = PaddedGrid.of(ts, raises=False)
        x, result, steps, bad, total = _solve(*given, grid, *rest, meter, placement)
        jax.block_until_ready(x)
        jax.effects_barrier()
        if not known:
            evaluations = _evaluations[call]
        else:
            evaluations = _number_evaluated(flow, solver, ts[: int(steps) + 1])
            evaluations += denoise is not None
    finally:
        del _evaluations[call]
    if int(bad) and known:
        # If there was a step that the solver cannot take, this raises the reason.
        grid = PaddedGrid.of(ts, raises=True)
        _solve(*given, grid, *rest, dfx.NoProgressMeter(), placement)
    if result != dfx.RESULTS.successful:
        raise RuntimeError(f"The solver failed: {dfx.RESULTS[result]}")
    if int(bad):
        where = f", from index {index[0]}," if index[0] else ""
        most = _most_expected(uncounted[0].process, uncounted[0].model)
        fault = find_fault(*uncounted, len(index), ts.dtype, key, most, placement)
        raise FloatingPointError(
            f"{bad} of {wanted} samples{where} are not finite after {evaluations} "
            f"evaluations. {fault}"
        )
    return x, evaluations, float(total)


def _number_evaluated(flow, solver, ts: Array) -> int:
    """The number of evaluations of the model on a grid, if each step takes one at its
    start; and with `reevaluate`, one at its end."""
    evaluated = np.ones(len(ts), bool)
    if isinstance(solver, LearnedGDDIM):
        evaluated[: solver.num_free] = False
    if isinstance(flow.model, StartedModel):
        evaluated = ~np.asarray(flow.model.is_closed_form(ts))
    again = isinstance(solver, GDDIM) and solver.corrector.reevaluates
    return int(evaluated[:-1].sum() + (evaluated[1:].sum() if again else 0))


def _in_batches(draw: Callable, number: int, size: int, meter: dfx.AbstractProgressMeter):
    """As `_draw`, for all batches, with the data on the host."""
    starts = range(0, number, size) if number else (0,)
    whole, most, total, shown = None, 0, 0.0, meter.init()
    try:
        for n, start in enumerate(starts, 1):
            x, evaluations, square = draw(start, dfx.NoProgressMeter())
            x = _on_host(x)[: number - start]
            whole = np.empty((number, *x.shape[1:]), x.dtype) if whole is None else whole
            whole[start : start + size] = x
            most, total = max(most, evaluations), total + square
            shown = meter.step(shown, jnp.asarray(n / len(starts)))
    finally:
        meter.close(shown)
    return whole, most, total


def _on_host(x: Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _most_expected(process: AbstractProcess, model: Callable) -> float:
    """The root mean square above which samples are implausibly large: a hundred times the
    `data_std` of the model; or, if it has none, that of data whose signal-to-noise ratio at
    `t_max` would be 0.01, but at most a hundred."""
    data_std = getattr(model, "data_std", None)
    if isinstance(data_std, (float, int)):
        return 100.0 * data_std
    return 0.1 * math.exp(min(-log_snr_at_start(process), math.log(1000)))


def _checked_times(process, ts, dtype):
    grid = ts
    if dtype not in (None, grid.dtype):
        grid = as_grid(process, grid.astype(dtype), "decreasing")
    rounding = float(jnp.finfo(grid.dtype).eps)
    if abs(float(grid[0]) - process.t_max) > rounding * process.t_max:
        raise ValueError(
            f"`ts` must start at {process.t_max}, which is `process.t_max`, the time of "
            f"the prior; got times from {grid[0]} to {grid[-1]}. Use `num_steps`. For a "
            "'leading' grid, which starts later, use one with 'trailing' spacing, or "
            "`gddim_eqx.generate(flow, process.prior(key, (number,)), ts=ts)`."
        )
    return grid
