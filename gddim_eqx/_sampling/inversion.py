from typing import Any, NamedTuple

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._custom_types import Args, State, Times
from .._linear import at_least_single, check_state, coefficient_dtype
from .._term import check_flow, ProbabilityFlow
from ..solvers import GDDIM, LearnedGDDIM
from .solve import last, times_for


class Inversion(NamedTuple):
    """What [`gddim_eqx.invert`][] returns."""

    latent: State
    """Latent codes: states at the last time, `(*batch, *shape)`."""
    error: Inexact[Array, "*batch"] | None
    """The relative error of the round trip: the root mean square of the difference between
    the data and the decoded codes, divided by that of the data. `None` if `check` is
    false."""


def invert(
    flow: ProbabilityFlow,
    x: Inexact[Array, "..."],
    num_steps: int | None = None,
    solver: dfx.AbstractSolver = GDDIM(3),
    *,
    ts: Times | None = None,
    check: bool = True,
    args: Args = None,
) -> Inversion:
    """Encode data: find the noise that the sampler turns into them.

    Solves the probability flow forward in time. For a process with a velocity, the initial
    velocity is taken to be 0.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `x`: data, `(*batch, *shape)`.
    - `num_steps`: the number of steps, by default 50.
    - `solver`: any Diffrax solver for ordinary differential equations. `GDDIM()`, of order
        4, is more accurate for most samples, but with few steps more of them decode to
        something else. Solvers from [`gddim_eqx.fit_solver`][] sample only.
    - `ts`: an increasing time grid in place of [`gddim_eqx.time_grid`][], from the time of
        `x`, which must not be 0, to that of the codes.
    - `check`: whether to decode the codes again, on the same grid, and report the error.
    - `args`: passed to the model.

    **Returns:** [`gddim_eqx.results.Inversion`][]: the codes and the round-trip error.

    **Raises:** `ValueError` for invalid arguments.
    """
    check_flow(flow)
    process, x = flow.process, jnp.asarray(x)
    u = process.encode(x)
    ts = times_for(process, solver, num_steps, ts, coefficient_dtype(u), "increasing")
    if check and isinstance(solver, LearnedGDDIM):
        raise ValueError(
            "A learned solver solves in one direction only, so the codes cannot be decoded "
            "with it. Pass `check=False`, and a solver for decoding to `generate`."
        )
    latent = _end(flow, solver, ts, u, args)
    if not check:
        return Inversion(latent, None)
    decoded = generate(flow, latent, solver=solver, ts=ts[::-1], args=args)
    axes = tuple(range(-len(process.shape), 0))
    decoded, x = (y.astype(at_least_single(y.dtype)) for y in (decoded, x))
    error = jnp.sqrt(((decoded - x) ** 2).mean(axes) / (x**2).mean(axes))
    return Inversion(latent, error)


def generate(
    flow: ProbabilityFlow,
    latent: State,
    num_steps: int | None = None,
    solver: dfx.AbstractSolver = GDDIM(3),
    *,
    ts: Times | None = None,
    args: Args = None,
) -> Inexact[Array, "..."]:
    """Decode latent codes: map given noise to samples by the probability flow.

    Unlike [`gddim_eqx.sample`][], which draws the noise, this works under `jax.jit`,
    `jax.vmap` and `jax.grad`.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `latent`: states at the first time, `(*batch, *shape)`, for example from
        `process.prior` or [`gddim_eqx.invert`][].
    - `num_steps`: the number of steps, by default 50. A learned solver has its own times:
        leave out this and `ts`.
    - `solver`: any Diffrax solver for ordinary differential equations.
    - `ts`: a time grid in place of [`gddim_eqx.time_grid`][].
    - `args`: passed to the model.

    **Returns:** data, `(*batch, *shape)`.

    **Raises:** `ValueError` for invalid arguments.
    """
    check_flow(flow)
    latent = check_state(
        latent, flow.process.num_components, flow.process.shape, "The latent codes"
    )
    ts = times_for(flow.process, solver, num_steps, ts, coefficient_dtype(latent))
    return flow.process.decode(_end(flow, solver, ts, latent, args))


def _end(flow, solver, ts, u, args) -> State:
    """The final state of a solve on a time grid."""
    grid: Any = dict(stepsize_controller=dfx.StepTo(ts), max_steps=len(ts) - 1)
    return last(dfx.diffeqsolve(flow, solver, ts[0], ts[-1], None, u, args, **grid))
