from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Real

from .._custom_types import Args, State
from .._misc import check_instance


def solve(
    terms: dfx.AbstractTerm,
    solver: dfx.AbstractSolver,
    ts: Real[Array, " times"],
    u: State,
    args: Args,
    **kwargs,
) -> dfx.Solution:
    """`diffrax.diffeqsolve` on a time grid. Saves the final state."""
    check_solver(solver)
    grid: Any = dict(stepsize_controller=dfx.StepTo(ts), max_steps=len(ts) - 1)
    return dfx.diffeqsolve(terms, solver, ts[0], ts[-1], None, u, args, **(grid | kwargs))


class PaddedGrid(dfx.AbstractStepSizeController[int, None]):
    """`diffrax.StepTo` on a time grid that may be followed by copies of its last time, so
    that other numbers of steps have the same shape, and need no other program."""

    ts: Real[Array, " times"]
    # Static, so that the compiled solves of both kinds are kept apart.
    raises: bool = eqx.field(static=True)
    """Whether a step that cannot be taken is an error, or gives NaN."""

    @classmethod
    def of(cls, ts: Real[Array, " times"], raises: bool) -> "PaddedGrid":
        number = max(128, 1 << (ts.shape[0] - 1).bit_length())
        return cls(jnp.pad(ts, (0, number - ts.shape[0]), mode="edge"), raises)

    def wrap(self, direction):
        return PaddedGrid(self.ts * direction, self.raises)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        following = self.ts[controller_state]
        return True, t1, following, False, controller_state + 1, dfx.RESULTS.successful


def check_solver(solver: object) -> None:
    """Raise a `ValueError` unless given a solver."""
    wanted = "a solver such as `GDDIM()` or `diffrax.Tsit5()`"
    check_instance("solver", solver, dfx.AbstractSolver, wanted)


def last(sol: dfx.Solution) -> State:
    """The final state, where nothing else was saved."""
    return jtu.tree_map(lambda y: y[-1], sol.ys)
