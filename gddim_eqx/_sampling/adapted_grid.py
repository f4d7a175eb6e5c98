import math
from typing import NamedTuple

import diffrax as dfx
import numpy as np
from jaxtyping import Array, Real

from .._custom_types import Args, State, Times
from .._misc import as_number, check_count
from .._term import ProbabilityFlow
from ..solvers import GDDIM, LearnedGDDIM
from .learning import descend, Learned, Pilots
from .solve import check_solver


class AdaptedGrid(NamedTuple):
    """What [`gddim_eqx.adapted_grid`][] returns."""

    ts: Real[Array, " times"]
    """The times."""
    error: float
    """The error of the solver on this grid: the root mean square distance, over coordinates
    of the data, from the endpoint of the exact flow; its geometric mean over samples."""
    error_before: float
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

    With 5 to 10 steps of `GDDIM()`, [`gddim_eqx.fit_solver`][] learns more than times.

    Takes about four times `num_iterations * num_steps` evaluations of the model on `u`.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `u`: states at the first time, `(number, *shape)`, to optimise on: a few dozen
        suffice.
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
    check_solver(solver)
    if isinstance(solver, LearnedGDDIM):
        raise ValueError(
            "A learned solver has its own times. Adapt those of `solver.solver`, which it "
            "was learned from, or learn both with `fit_solver`."
        )
    check_count("num_iterations", num_iterations)
    rate = as_number("learning_rate", learning_rate)
    pilots = Pilots.of(flow, u, args, num_steps, ts, 200)
    learned = Learned(solver, flow, pilots.ts, pilots.grid, corrects=False)
    error = lambda change: float(np.exp(learned.log_distances(change, pilots).mean()))
    best, least, change = learned.zero, math.inf, learned.zero
    for later, value in descend(learned, change, ("times",), pilots, num_iterations, rate):
        if value < least:
            best, least = change, value
        change = later
    return AdaptedGrid(learned(best)[1], error(best), error(learned.zero))
