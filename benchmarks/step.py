"""The time per step of GDDIM, excluding the network.

For a batch of 64 CLD states of 32 x 32 x 3 in float32, with a trivial network:

- `diffeqsolve(GDDIM)`, which computes its coefficients in each step;
- a hand-written `lax.scan` with precomputed coefficients;
- the memory traffic alone: the state and all stored predictions are read once, and the
  state and the new prediction are written once.

Then the default, `GDDIM()`, against the traffic of order 4, which for the corrector also
reads and writes a state. Last, for a tiny model in the plane, the time per evaluation of
the model against Heun's.

    python benchmarks/step.py
    python benchmarks/step.py --quick  # only to see that it runs
"""

import argparse
import time
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import gddim_eqx as gd
from gddim_eqx import Phase
from gddim_eqx._exponential import lagrange, NoiseSplitting, weights


_process = gd.CLD(shape=(32, 32, 3))


def network(t: jax.Array, u: Phase, args: None) -> Phase:
    return Phase(0.1 * u.v, 0.1 * u.x)


def with_diffrax(
    solver: dfx.AbstractSolver,
    term: gd.ProbabilityFlow = gd.ProbabilityFlow(_process, network),
) -> Callable:
    @eqx.filter_jit
    def run(u, ts):
        return dfx.diffeqsolve(
            term,
            solver,
            ts[0],
            ts[-1],
            None,
            u,
            stepsize_controller=dfx.StepTo(ts),
            max_steps=len(ts) - 1,
            throw=False,
        ).ys

    return run


def by_hand(order: int, ts: jax.Array) -> Callable:
    """What one would write for CLD alone, with precomputed coefficients and the history in
    a ring buffer."""
    slots = order - 1
    step = np.arange(len(ts) - 1)[:, None]
    # Node 0 is the new prediction, node k + 1 is slot k, last written at this step:
    written = step - 1 - (step - 1 - np.arange(slots)) % max(slots, 1)
    written = np.concatenate([step, written], axis=1)
    valid, known = jnp.asarray(written >= 0), ts[np.maximum(written, 0)]

    @jax.vmap
    def prepare(s, t, times, valid):
        c = NoiseSplitting().integrate(_process, s, t, order)
        coefficients = weights(lagrange((times - s) / (t - s), valid), c.moments)
        return c.linear, coefficients

    table = jax.jit(prepare)(ts[:-1], ts[1:], known, valid)
    slot = jnp.asarray(step[:, 0] % max(slots, 1))

    @jax.jit
    def run(u, ts):
        def step(carry, inputs):
            u, ring = carry
            t, slot, psi, c = inputs
            new = network(t, u, None)
            noises = [new, *(jtu.tree_map(lambda x: x[k], ring) for k in range(slots))]

            def row(i):
                out = psi[i, 0] * u.x + psi[i, 1] * u.v
                for cj, noise in zip(c, noises):
                    out = out + cj[i, 0] * noise.x + cj[i, 1] * noise.v
                return out

            if slots:
                ring = jtu.tree_map(lambda x, y: x.at[slot].set(y), ring, new)
            return (Phase(row(0), row(1)), ring), None

        ring = jtu.tree_map(lambda x: jnp.zeros((slots, *x.shape)), u)
        return jax.lax.scan(step, (u, ring), (ts[:-1], slot, *table))[0][0]

    return run


def read_and_write(order: int, corrects: bool = False) -> Callable:
    """The memory traffic alone: per step, read the state and the stored predictions, and
    write the state and one prediction. To correct, read and write one more state."""
    slots = order - 1

    @jax.jit
    def run(u, ts):
        def step(carry, i):
            u, ring, base = carry
            new = jtu.tree_map(lambda x, y: sum(y, 0.5 * x), u, ring)
            if slots:
                ring = jtu.tree_map(lambda x, y: x.at[i % slots].set(0.1 * y), ring, u)
            if corrects:
                new = jtu.tree_map(lambda x, y: x + 0.2 * y, new, base)
                base = jtu.tree_map(lambda x: 0.3 * x, new)
            return (new, ring, base), None

        ring = jtu.tree_map(lambda x: jnp.zeros((slots, *x.shape)), u)
        base = u if corrects else None
        return jax.lax.scan(step, (u, ring, base), jnp.arange(len(ts) - 1))[0][0]

    return run


def measure(candidates: dict[str, tuple], rounds: int) -> dict[str, float]:
    """The best time of each, interleaved so that all run under the same conditions."""
    best = dict.fromkeys(candidates, np.inf)
    for fn, arguments in candidates.values():
        jax.block_until_ready(fn(*arguments))
    for _ in range(rounds):
        for name, (fn, arguments) in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    quick = parser.parse_args().quick
    steps, rounds, batch, orders = (
        (5, 2, 1, (1, 2)) if quick else (100, 30, 64, (1, 2, 3, 4))
    )
    device = jax.devices()[0]
    print(f"{device.device_kind}, {steps} steps, microseconds per step, best of {rounds}")
    columns = ("diffeqsolve", "scan", "ratio", "traffic", "ratio")
    print("order " + "".join(f"{c:>13s}" for c in columns))
    ts = gd.time_grid(_process, steps, "quadratic")
    u = _process.prior(jax.random.key(0), (batch,))
    for order in orders:
        times = measure(
            {
                "diffrax": (with_diffrax(gd.GDDIM(order, "noise")), (u, ts)),
                "scan": (by_hand(order, ts), (u, ts)),
                "bytes": (read_and_write(order), (u, ts)),
            },
            rounds,
        )
        ours, scan, once = (1e6 * times[k] / steps for k in ("diffrax", "scan", "bytes"))
        print(
            f"{order:5d} {ours:12.1f} {scan:12.1f} {ours / scan:12.2f} "
            f"{once:12.1f} {ours / once:12.2f}"
        )
    times = measure(
        {
            "diffrax": (with_diffrax(gd.GDDIM()), (u, ts)),
            "bytes": (read_and_write(4, corrects=True), (u, ts)),
        },
        rounds,
    )
    ours, once = (1e6 * times[k] / steps for k in ("diffrax", "bytes"))
    print(f"GDDIM() {ours:.1f}, traffic {once:.1f}, ratio {ours / once:.2f}")
    tiny(steps, rounds, 4 if quick else 256)


def tiny(steps: int, rounds: int, batch: int) -> None:
    """The time per evaluation with a tiny model."""
    network = gd.nn.presets.points(4, key=jax.random.key(0))
    process = gd.CLD((2,))
    flow = gd.ProbabilityFlow(process, gd.nn.NetworkModel(process, network))
    u, ts = process.prior(jax.random.key(0), (batch,)), gd.time_grid(process, steps)
    solvers = {"Heun": (dfx.Heun(), 2), "GDDIM()": (gd.GDDIM(), 1)}
    times = measure(
        {
            name: (with_diffrax(solver, flow), (u, ts))
            for name, (solver, _) in solvers.items()
        },
        rounds,
    )
    each = {name: 1e6 * times[name] / steps / n for name, (_, n) in solvers.items()}
    ratio = each["GDDIM()"] / each["Heun"]
    print(
        f"{batch} points, microseconds per evaluation: Heun {each['Heun']:.1f}, "
        f"GDDIM() {each['GDDIM()']:.1f}, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
