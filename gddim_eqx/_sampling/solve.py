from typing import Any, cast, Literal

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Real

from .._custom_types import State, Times
from .._linear import at_least_single
from .._misc import check_instance, show
from .._process import AbstractProcess, as_grid
from .._term import ProbabilityFlow, StartedModel
from ..solvers import LearnedGDDIM
from .grid import time_grid


def times_for(
    process: AbstractProcess,
    solver: dfx.AbstractSolver,
    num_steps: int | None,
    ts: Times | None,
    dtype: Any,
    direction: Literal["decreasing", "increasing"] = "decreasing",
) -> Real[Array, " times"]:
    """The times of a solve: those given, those of a learned solver, or the default grid, of
    50 steps unless `num_steps` is given.

    **Raises:** `ValueError` for conflicts between these.
    """
    check_solver(solver)
    if not (num_steps is None or ts is None):
        raise ValueError("Pass `num_steps` or `ts`, not both.")
    if isinstance(solver, LearnedGDDIM):
        return _learned_times(process, solver, num_steps, ts, direction)
    if ts is None:
        ends = process.t_max, process.t_min
        t0, t1 = ends if direction == "decreasing" else ends[::-1]
        number = 50 if num_steps is None else num_steps
        ts = time_grid(process, number, t0=t0, t1=t1, dtype=dtype)
    return as_grid(process, ts, direction)


def _learned_times(process, solver, num_steps, ts, direction):
    if solver.process != process:
        raise ValueError(
            f"This solver was learned for {show(solver.process)}; got {show(process)}."
        )
    own, number = solver.ts, solver.num_evaluations
    if num_steps not in (None, number):
        raise ValueError(
            f"This solver was learned for {number} evaluations, and has its times; got "
            f"num_steps={show(num_steps)}. Leave it out, or learn one by `fit_solver(flow, "
            f"u, num_steps={show(num_steps)})`."
        )
    ts = as_grid(process, own if ts is None else ts)
    if any(isinstance(x, Tracer) for x in (own, ts)):
        return ts
    own, times = (np.asarray(x, np.float64) for x in (own, ts))
    if (own[0] < own[-1]) != (direction == "increasing"):
        raise ValueError(
            f"This solver was learned from t = {own[0]} to {own[-1]}, and cannot solve in "
            "the other direction. Use `GDDIM()`."
        )
    rounding = 8 * max(float(jnp.finfo(x.dtype).eps) for x in (ts, solver.ts))
    first = np.abs(own - times[0]).argmin()
    same = own[first : first + len(times)]
    if len(same) != len(times) or np.abs(same - times).max() > rounding * own.max():
        raise ValueError(
            f"This solver was learned for the times {show(own.tolist())}; got `ts` "
            f"{show(times.tolist())}. Leave out `ts`."
        )
    return ts


class PaddedGrid(dfx.AbstractStepSizeController[int, None]):
    """`diffrax.StepTo` on a time grid that may be followed by copies of its last time, so
    that other numbers of steps have the same shape, and need no other program."""

    ts: Array | np.ndarray

    @classmethod
    def of(cls, ts: Any) -> "PaddedGrid":
        number = max(128, 1 << (len(ts) - 1).bit_length())
        return cls(np.pad(ts, (0, number - len(ts)), mode="edge"))

    def wrap(self, direction):
        return PaddedGrid(self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        following = self.ts[controller_state]
        return True, t1, following, False, controller_state + 1, dfx.RESULTS.successful


def number_of_evaluations(
    flow: ProbabilityFlow, solver: dfx.AbstractSolver, ts: np.ndarray, more: int
) -> int | None:
    """The number of times that a solver evaluates the model on a time grid, without those
    of a closed form, and `more`; `None` if that is not known."""
    stages, shared = getattr(solver, "stages", None), False
    if isinstance(solver, dfx.AbstractERK):
        # The last stage of a step may be the first of the next.
        tableau = cast(dfx.ButcherTableau, solver.tableau)
        stages, shared = (0.0, *tableau.c), tableau.fsal
    elif isinstance(solver, _EVALUATE_AT_START):
        stages = (0.0,)
    if stages is None:
        return None
    ts = ts.astype(at_least_single(ts.dtype))
    places = np.asarray(stages, ts.dtype)
    times = ts[:-1, None] * (1 - places) + ts[1:, None] * places
    times = np.append(times[0], times[1:, int(shared) :])
    free = solver.num_free if isinstance(solver, LearnedGDDIM) else 0
    if isinstance(flow.model, StartedModel):
        free = int(flow.model.is_closed_form(times).sum())
    return len(times) - free + more


_EVALUATE_AT_START = dfx.Euler, dfx.EulerHeun, dfx.ItoMilstein, dfx.StratonovichMilstein


def check_solver(solver: object) -> None:
    """Raise a `ValueError` unless given a solver."""
    if isinstance(solver, tuple) and hasattr(solver, "solver"):
        name = type(solver).__name__
        raise ValueError(f"A {name} is no solver: pass `solver=x.solver, ts=x.ts`.")
    wanted = "a solver such as `GDDIM()` or `diffrax.Tsit5()`"
    check_instance("solver", solver, dfx.AbstractSolver, wanted)


def last(sol: dfx.Solution) -> State:
    """The final state, where nothing else was saved."""
    return jtu.tree_map(lambda y: y[-1], sol.ys)
