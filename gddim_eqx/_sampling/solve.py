import diffrax as dfx
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
    return dfx.diffeqsolve(
        terms,
        solver,
        ts[0],
        ts[-1],
        None,
        u,
        args,
        stepsize_controller=dfx.StepTo(ts),
        max_steps=ts.shape[0] - 1,
        **kwargs,
    )


def check_solver(solver: object) -> None:
    """Raise a `ValueError` unless given a solver."""
    wanted = "a solver such as `GDDIM()` or `diffrax.Tsit5()`"
    check_instance("solver", solver, dfx.AbstractSolver, wanted)


def last(sol: dfx.Solution) -> State:
    """The final state, where nothing else was saved."""
    return jtu.tree_map(lambda y: y[-1], sol.ys)
