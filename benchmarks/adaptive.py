"""Adaptive steps: the error in tolerances, and the evaluations of the model.

64 states from the prior are solved down to `t_min`, with `diffrax.PIDController` at equal
relative and absolute tolerances, for normal data and for a mixture with two modes that are
ten standard deviations from their middle. The error is the root mean square of the
difference from Dopri8 at a tolerance of 1e-10. Evaluations include those of rejected steps
and those that choose the first step size.

    python benchmarks/adaptive.py
    python benchmarks/adaptive.py --quick  # only to see that it runs
"""

import argparse
from collections.abc import Sequence

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

import gddim_eqx as gd


jax.config.update("jax_enable_x64", True)

processes = {
    "EDM": (gd.EDM((2,)), "data"),
    "VE": (gd.VE((2,)), "data"),
    "VP": (gd.VP((2,)), "noise"),
    "RectifiedFlow": (gd.RectifiedFlow((2,)), "flow"),
    "CLD": (gd.CLD((2,)), "noise"),
}
data = {
    "normal": gd.GaussianMixture(jnp.array([[1.3, 0.0]]), 0.4),
    "mixture": gd.GaussianMixture(jnp.array([[-1.0, 0.0], [1.0, 0.0]]), 0.1),
}
solvers = {"GDDIM": gd.GDDIM(), "Tsit5": dfx.Tsit5(), "Dopri8": dfx.Dopri8()}
# Evaluations per attempted step, and before the first.
_stages = {"GDDIM": (1, 2), "Tsit5": (6, 3), "Dopri8": (13, 3)}


@eqx.filter_jit
def solve(
    flow: gd.ProbabilityFlow, solver: dfx.AbstractSolver, tolerance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The data at the end, and the number of attempted steps."""
    process = flow.process
    solution = dfx.diffeqsolve(
        flow,
        solver,
        process.t_max,
        process.t_min,
        None,
        process.prior(jax.random.key(0), (64,)),
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=100_000,
    )
    last = jax.tree_util.tree_map(lambda y: y[-1], solution.ys)
    return process.decode(last), solution.stats["num_steps"]


def main(names: Sequence[str], tolerances: Sequence[float]) -> None:
    print(f"| process | data | tolerance | {' | '.join(solvers)} |")
    print(f"| --- | --- | --- | {' | '.join('---' for _ in solvers)} |")
    for name in names:
        process, predicts = processes[name]
        for kind, mixture in data.items():
            model = mixture.model(process, predicts)
            flow = gd.ProbabilityFlow(process, model, predicts)
            exact, _ = solve(flow, dfx.Dopri8(), jnp.asarray(1e-10))
            for tolerance in tolerances:
                cells = []
                for label, solver in solvers.items():
                    x, steps = solve(flow, solver, jnp.asarray(tolerance))
                    error = float(jnp.sqrt(jnp.mean((x - exact) ** 2)))
                    each, before = _stages[label]
                    count = each * int(steps) + before
                    cells.append(f"{error / tolerance:.2g} ({count})")
                print(f"| {name} | {kind} | {tolerance:.0e} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        main(["VP"], [1e-2])
    else:
        main(list(processes), [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
