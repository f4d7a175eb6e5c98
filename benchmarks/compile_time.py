"""The time before the first step: tracing, lowering and XLA's compilation.

For each solver, process and model, the seconds until a program for ten steps is compiled,
by `diffrax.diffeqsolve` and by `gddim_eqx.sample`, and their sum divided by Heun's. Then
the sum for a second call, with another number of steps and another key. Minima over some
rounds, each with empty caches.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --models trivial network --rounds 5
    python benchmarks/compile_time.py --models cifar10  # minutes: a network of the paper
    python benchmarks/compile_time.py --quick  # only to see that it runs
"""

import argparse
import collections
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.random as jr

import gddim_eqx as gd


SOLVERS = {
    "Heun": dfx.Heun(),
    "Tsit5": dfx.Tsit5(),
    "GDDIM, order 1": gd.GDDIM(1),
    "GDDIM": gd.GDDIM(),
}

_stages = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "XLA",
}
_seconds: dict[str, float] = collections.defaultdict(float)


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in _stages:
        _seconds[_stages[event]] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def _trivial(process: gd.AbstractProcess) -> gd.ProbabilityFlow:
    """A model of one operation."""
    scale = lambda t, u, args: jax.tree_util.tree_map(lambda x: 0.3 * x, u)
    return gd.ProbabilityFlow(process, scale, predicts="data")


def _cifar10() -> gd.ProbabilityFlow:
    process = gd.CLD((32, 32, 3))
    network = gd.nn.presets.cifar10_cld(key=jr.key(0))
    return gd.ProbabilityFlow(process, gd.nn.NetworkModel(process, network))


MODELS: dict[str, dict[str, Callable[[], gd.ProbabilityFlow]]] = {
    "trivial": {
        "VP": lambda: _trivial(gd.VP((2,))),
        "CLD": lambda: _trivial(gd.CLD((2,))),
        "BDM": lambda: _trivial(gd.BDM((8, 8, 1))),
    },
    "network": {
        "VP": lambda: gd.checkpoints.pretrained("fashion-mnist-vp"),
        "CLD": lambda: gd.checkpoints.pretrained("fashion-mnist-cld"),
        "BDM": lambda: gd.checkpoints.pretrained("fashion-mnist-bdm"),
    },
    "cifar10": {"CLD": _cifar10},
}


@eqx.filter_jit
def _diffeqsolve(flow, solver, u, ts):
    return dfx.diffeqsolve(
        flow,
        solver,
        ts[0],
        ts[-1],
        None,
        u,
        stepsize_controller=dfx.StepTo(ts),
        max_steps=len(ts) - 1,
    ).ys


def by_diffeqsolve(flow, solver, steps: int, seed: int) -> None:
    u, ts = flow.process.prior(jr.key(seed), (2,)), gd.time_grid(flow.process, steps)
    _seconds.clear()
    jax.block_until_ready(_diffeqsolve(flow, solver, u, ts))


def by_sample(flow, solver, steps: int, seed: int) -> None:
    gd.sample(flow, jr.key(seed), 2, steps, solver)


def measured(run: Callable[[], None]) -> dict[str, float]:
    _seconds.clear()
    run()
    return dict(_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["trivial", "network"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    models, solvers = {name: MODELS[name] for name in arguments.models}, SOLVERS
    if arguments.quick:
        models, arguments.rounds = {"trivial": {"VP": MODELS["trivial"]["VP"]}}, 1
        solvers = {name: SOLVERS[name] for name in ("Heun", "GDDIM")}
    print("| model | by | solver | tracing | lowering | XLA | of Heun's | again |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, flows in models.items():
        for process, make in flows.items():
            flow = make()
            for label, run in (("diffeqsolve", by_diffeqsolve), ("sample", by_sample)):
                compare(f"{name}, {process}", label, flow, run, solvers, arguments.rounds)


def compare(name, label, flow, run, solvers, rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {key: [] for key in solvers}
    again: dict[str, list[float]] = {key: [] for key in solvers}
    for _ in range(rounds):
        for key, solver in solvers.items():
            jax.clear_caches()
            found[key].append(measured(lambda: run(flow, solver, 10, 0)))
            again[key].append(sum(measured(lambda: run(flow, solver, 12, 1)).values()))
    best = {
        key: {s: min(x.get(s, 0) for x in all_) for s in _stages.values()}
        for key, all_ in found.items()
    }
    base = sum(best["Heun"].values())
    for key, own in best.items():
        cells = [f"{own[s]:.2f}" for s in _stages.values()]
        cells += [f"{sum(own.values()) / base:.2f}", f"{min(again[key]):.2f}"]
        print(f"| {name} | {label} | {key} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
