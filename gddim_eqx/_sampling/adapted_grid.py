from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Real

from .._custom_types import Args, State, Times
from .._linear import at_least_single, batch_axes, check_state, coefficient_dtype
from .._misc import as_number, check_count
from .._process import as_grid
from .._term import check_flow, ProbabilityFlow
from ..solvers import GDDIM
from .grid import time_grid
from .inversion import generate
from .solve import check_solver


class AdaptedGrid(NamedTuple):
    """What [`gddim_eqx.adapted_grid`][] returns."""

    ts: Real[Array, " times"]
    """The times."""
    error: Inexact[Array, ""]
    """The error of the solver on this grid: the root mean square distance, over coordinates
    of the data, from the endpoint of the exact flow; its geometric mean over samples."""
    error_before: Inexact[Array, ""]
    """The same for the initial grid."""


def adapted_grid(
    flow: ProbabilityFlow,
    u: State,
    num_steps: int = 20,
    solver: dfx.AbstractSolver = GDDIM(),
    *,
    ts: Times | None = None,
    num_iterations: int = 60,
    learning_rate: float = 0.1,
    args: Args = None,
) -> AdaptedGrid:
    """Optimise a time grid for a model, its data and a solver, on a few samples.

    Where steps should be short depends on the data, and on how much local errors affect the
    final sample. The times are therefore optimised by gradient descent, through the solver,
    on the final error of these samples; the exact flow is approximated with 8 times as many
    steps (at least 200). The grid can then be used for any number of other samples.

    Takes about three times `num_iterations * num_steps` evaluations of the model on `u`.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `u`: states at the first time, to optimise on: a few dozen suffice.
    - `num_steps`: the number of steps of the grid.
    - `solver`: any Diffrax solver for ordinary differential equations.
    - `ts`: the initial grid, in place of [`gddim_eqx.time_grid`][] with `num_steps`.
    - `num_iterations`: the number of Adam steps.
    - `learning_rate`: the initial learning rate for the logarithms of the step sizes, which
        decays along a cosine.
    - `args`: passed to the model.

    **Returns:** [`gddim_eqx.AdaptedGrid`][]: the best times found, with the endpoints of
    the initial grid, and their error.

    **Raises:** `ValueError` for invalid arguments.
    """
    check_flow(flow)
    check_solver(solver)
    process = flow.process
    u = check_state(u, process.num_components, process.shape, "The states `u`")
    check_count("num_iterations", num_iterations)
    if 0 in batch_axes(u, process.shape):
        raise ValueError("`u` holds no states to optimise on; pass a few dozen.")
    if ts is None:
        ts = time_grid(process, num_steps, dtype=coefficient_dtype(u))
    ts = as_grid(process, ts)
    # Optimised times need more precision than states.
    ts = jnp.minimum(ts.astype(at_least_single(ts.dtype)), process.t_end)
    number, ends = max(200, 8 * (len(ts) - 1)), dict(t0=float(ts[0]), t1=float(ts[-1]))
    fine = time_grid(process, number, **ends, dtype=ts.dtype)
    learning_rate = as_number("learning_rate", learning_rate)
    return _adapt(flow, u, ts, fine, solver, args, int(num_iterations), learning_rate)


@eqx.filter_jit
def _adapt(flow, u, ts, fine, solver, args, num_iterations, learning_rate):
    schedule = optax.cosine_decay_schedule(learning_rate, num_iterations)
    optimiser = optax.chain(optax.zero_nans(), optax.adam(schedule))
    exact = generate(flow, u, solver=GDDIM(), ts=fine, args=args)
    axes = tuple(range(exact.ndim - len(flow.process.shape), exact.ndim))
    # A coordinate in which the default grid is uniform, and the power of time that is
    # interpolated.
    place, root = jnp.linspace(0, 1, len(fine), dtype=ts.dtype), fine**0.25
    order = jnp.argsort(fine)
    lengths = jnp.diff(jnp.interp(ts, fine[order], place[order]))

    def times(change):
        steps = lengths * jnp.exp(change)
        places = jnp.cumsum(steps[:-1]) / steps.sum()
        inner = jnp.interp(places, place, root) ** 4
        return jnp.concatenate([ts[:1], inner, ts[-1:]])

    # Without `diffeqsolve`, whose adjoints are about three times as slow to compile.
    @jax.checkpoint
    def step(carry, ends):
        y, _, _, state, _ = solver.step(flow, *ends, carry[0], args, carry[1], False)
        return (y, state), None

    def error(change):
        ts = times(change)
        start = (u, solver.init(flow, ts[0], ts[1], u, args))
        (y, _), _ = jax.lax.scan(step, start, (ts[:-1], ts[1:]))
        square = ((flow.process.decode(y) - exact) ** 2).mean(axes)
        smallest = jnp.finfo(square.dtype).tiny
        return 0.5 * jnp.log(jnp.where(square > smallest, square, smallest)).mean()

    def improve(carry, _):
        change, state, best = carry
        value, gradient = jax.value_and_grad(error)(change)
        distinct = (jnp.diff(times(change)) * jnp.sign(ts[-1] - ts[0]) > 0).all()
        better = distinct & (value < best[0])
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), (value, change), best)
        # Optax multiplies integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(change, updates), state, best), value

    start = jnp.zeros_like(lengths)
    best = (jnp.asarray(jnp.inf, exact.dtype), start)
    carry = (start, optimiser.init(start), best)
    (_, _, best), values = jax.lax.scan(improve, carry, length=num_iterations)
    return AdaptedGrid(times(best[1]), jnp.exp(best[0]), jnp.exp(values[0]))
