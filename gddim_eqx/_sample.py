import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Float, Real

from ._custom_types import Args, Key, RealScalarLike
from ._grid import time_grid
from ._placement import Placement
from ._process import AbstractProcess, check_process
from ._reverse_sde import reverse_sde
from ._reverse_transition import as_level
from ._solve import last, solve
from ._term import ProbabilityFlow
from .solvers import GDDIM


class Samples(NamedTuple):
    """What [`gddim_eqx.sample`][] returns."""

    x: Float[Array, "number *shape"]
    """The data."""
    evaluations: int
    """How often the model was evaluated, counted as it ran."""


# Counts by the number of the call, so that calls on several threads stay apart.
_evaluations: dict[int, int] = {}
_calls = itertools.count()


class _Counted(eqx.Module):
    model: Callable

    def __call__(self, t, u, args):
        call, args = args

        def count(call):
            _evaluations[int(call)] += 1

        jax.debug.callback(count, call)
        return self.model(t, u, args)


@eqx.filter_jit
def _solve(
    process,
    model,
    predicts,
    factor,
    lam,
    solver,
    denoise,
    ts,
    key,
    number,
    args,
    meter,
    placement,
):
    u = process.prior(key, (number,), ts.dtype)
    if placement is not None:
        u = placement.divide(u)
    flow = ProbabilityFlow(process, model, predicts, factor)
    terms, adjoint = flow, dfx.RecursiveCheckpointAdjoint()
    if not isinstance(lam, float) or lam != 0:
        # Other than any key that the prior makes by splitting this one.
        key = jr.fold_in(key, 2**31 - 1)
        leaves = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), u)
        path = dfx.UnsafeBrownianPath(leaves, key)
        terms = reverse_sde(process, model, lam, path, predicts=predicts, factor=factor)
        adjoint = dfx.DirectAdjoint()
    options = dict(progress_meter=meter, adjoint=adjoint, throw=False)
    sol = solve(terms, solver, ts, u, args, **options)
    u = last(sol)
    if denoise == "drift":
        drift = flow.reverse_drift(ts[-1], u, args, 1.0)
        u = jtu.tree_map(lambda y, d: y - ts[-1] * d, u, drift)
    elif denoise == "exact":
        u = flow.initial(ts[-1], u, args)
    x = process.decode(u)
    return x, sol.result, jnp.isfinite(x).all(range(1, x.ndim)).sum()


def sample(
    process: AbstractProcess,
    model: Callable,
    key: Key,
    number: int,
    num_steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    *,
    lam: RealScalarLike = 0.0,
    denoise: Literal["drift", "exact"] | None = None,
    ts: Real[Array, " times"] | None = None,
    predicts: Literal["noise", "data", "score", "velocity"] = "noise",
    factor: Literal["R", "cholesky"] = "R",
    args: Args = None,
    placement: Placement | None = None,
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter(),
) -> Samples:
    """Draw samples from a diffusion model: the prior, a time grid, a solve and a check,
    in one call.

    For gradients, saved trajectories, adaptive steps or a solve inside `jax.jit` or
    `jax.vmap`, call `diffrax.diffeqsolve` on a [`gddim_eqx.ProbabilityFlow`][].

    **Arguments:**

    - `process`: the forward process.
    - `model`: called as `model(t, u, args)` on the whole batch. Pass the same object
        again and nothing is recompiled; a new `lambda` is.
    - `key`: a random key.
    - `number`: how many samples.
    - `num_steps`: the number of steps of the default grid; 50 if neither this nor `ts`
        is given.
    - `solver`: any Diffrax solver for ordinary differential equations, or for stochastic
        ones if `lam` is not 0; [`gddim_eqx.GDDIM`][] by default.
    - `lam`: the level of noise: 0 for the probability flow, else as in
        [`gddim_eqx.reverse_sde`][]. The noise is drawn afresh at every step, so another
        grid has other noise.
    - `denoise`: what to do about the noise that is left at the last time. Each takes one
        more evaluation.
        - `None`: leave it.
        - `"drift"`: the step of the authors' code, an Euler step of the drift of
            `lam=1` to time 0. For a process with a velocity it cannot change the data by
            what the model says there, as only the velocity is driven by the score: the
            evaluation is spent for nothing.
        - `"exact"`: the step of the exponential integrator to time 0, less the noise
            that the process has there: the data that the model predicts.
    - `ts`: the times to step to instead, for example from [`gddim_eqx.time_grid`][]. The
        samples have their dtype. They must start at `process.t_max`, where the prior is.
    - `predicts`, `factor`: as in [`gddim_eqx.ProbabilityFlow`][].
    - `args`: passed to the model.
    - `placement`: over which devices to divide the samples, which are the same as on one;
        by default the first has all. The model must be on them too.
    - `progress_meter`: for example `diffrax.TextProgressMeter()`.

    **Returns:** [`gddim_eqx.Samples`][]: the data, `(number, *shape)`, and the number of
    evaluations of the model.

    **Raises:** `ValueError` for arguments that do not fit, or if called while JAX is
    tracing. `FloatingPointError` if a sample is not finite.
    """
    if isinstance(key, Tracer):
        raise ValueError(
            "`sample` counts evaluations and checks its result, so it cannot be traced "
            "by `jax.jit`, `jax.vmap` or `jax.grad`. There, call "
            "`diffrax.diffeqsolve(ProbabilityFlow(process, model), GDDIM(), ...)`."
        )
    check_process(process)
    if not isinstance(solver, dfx.AbstractSolver | None):
        raise ValueError(f"`solver` must be a solver such as `GDDIM()`; got {solver!r}.")
    if isinstance(number, bool) or int(number) != number or number < 0:
        raise ValueError(f"`number` must be a non-negative integer; got {number!r}.")
    if denoise not in (None, "drift", "exact"):
        raise ValueError(f"`denoise` must be None, 'drift' or 'exact'; got {denoise!r}.")
    if ts is None:
        ts = time_grid(process, 50 if num_steps is None else num_steps)
    elif num_steps is not None:
        raise ValueError("Give `num_steps` or `ts`, not both.")
    else:
        _check_times(ts, process)
    if placement is not None:
        placement.check_batch(int(number))
    if denoise is not None and float(ts[-1]) == 0:
        raise ValueError("At time 0 nothing is left to denoise; leave out `denoise`.")
    call = next(_calls)
    _evaluations[call] = 0
    try:
        x, result, finite = _solve(
            process,
            _Counted(model),
            predicts,
            factor,
            as_level(lam),
            GDDIM() if solver is None else solver,
            denoise,
            ts,
            key,
            int(number),
            (jnp.asarray(call), args),
            progress_meter,
            placement,
        )
        jax.block_until_ready(x)
        jax.effects_barrier()
        evaluations = _evaluations[call]
    finally:
        del _evaluations[call]
    if result != dfx.RESULTS.successful:
        raise RuntimeError(f"The solver failed: {dfx.RESULTS[result]}")
    if int(finite) < number:
        raise FloatingPointError(
            f"{number - int(finite)} of {number} samples are not finite after "
            f"{evaluations} evaluations. Either the model returned values that are not, "
            "or the solver diverged: take more steps, or `GDDIM` instead of a solver that "
            "is only stable for short ones."
        )
    return Samples(x, evaluations)


def _check_times(ts, process):
    if jnp.ndim(ts) != 1 or jnp.shape(ts)[0] < 2:
        raise ValueError(
            f"`ts` must hold at least two times; got an array of shape {jnp.shape(ts)}."
        )
    if not bool((ts[1:] < ts[:-1]).all()):
        raise ValueError(
            f"`ts` must be strictly decreasing, as sampling runs backward; got {ts}."
        )
    tolerance = float(jnp.finfo(ts.dtype).eps)
    if not (abs(float(ts[0]) - process.t_max) <= tolerance and float(ts[-1]) >= 0):
        raise ValueError(
            f"`ts` must start at {process.t_max}, which is `process.t_max`, where the "
            f"prior is, and not go below 0; got times from {ts[0]} to {ts[-1]}."
        )
