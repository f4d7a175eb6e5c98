"""The error with few steps of `GDDIM()` on `time_grid`, with the defaults of both.

The data are mixtures of Gaussians, whose scores are exact: eight on a ring in 2-D, forty in
5-D, and one around each of 500 real images (`--fashion-mnist`: the directory of the data
set), under VP, CLD and BDM (images only); each with the exact noise prediction and with one
that is off by 5%, as that of a trained network would be. Errors are distances to the
endpoint of the exact flow of the same model, RMS per coordinate: the median over samples,
divided by that of the paper's sampler, `GDDIM(3, "noise")` on the quadratic grid, with the
same number of evaluations. `--others` takes held-out data, on which no default was chosen,
and `--float32` samples in single precision.

    python benchmarks/few_steps.py
    python benchmarks/few_steps.py --quick  # two cases, only to see that it runs
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

import gddim_eqx as gd
from gddim_eqx import AbstractProcess


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import data as data_sets


Grid = Literal["clock", "quadratic"]

fashion_mnist = Path("/usr/share/datasets/fashion-mnist")

_methods: list[tuple[str, gd.GDDIM, Grid]] = [
    ("GDDIM()", gd.GDDIM(), "clock"),
    ("the paper's", gd.GDDIM(3, "noise"), "quadratic"),
]


class Perturbed(eqx.Module):
    """A noise prediction, perturbed by random sinusoids of state and time."""

    model: Callable
    size: float
    waves: Float[Array, "size 16"]
    speeds: Float[Array, " 16"]
    directions: Float[Array, "16 size"]

    def __init__(self, model: Callable, process: AbstractProcess, size: float):
        rng = np.random.default_rng(9)
        number = process.num_components * int(np.prod(process.shape))
        self.model, self.size = model, size
        self.waves = jnp.asarray(rng.standard_normal((number, 16)))
        self.speeds = jnp.asarray(rng.standard_normal(16))
        self.directions = jnp.asarray(rng.standard_normal((16, number)) / 4)

    def __call__(self, t, u, args):
        leaves, treedef = jtu.tree_flatten(u)
        flat = jnp.stack(leaves, -1).reshape(leaves[0].shape[0], -1)
        waves, speeds, directions = (
            x.astype(flat.dtype) for x in (self.waves, self.speeds, self.directions)
        )
        phases = flat @ waves + (6 * t * speeds)[None]
        change = (jnp.sin(phases) @ directions).reshape(*leaves[0].shape, -1)
        parts = [self.size * change[..., i] for i in range(len(leaves))]
        change = jtu.tree_unflatten(treedef, parts)
        noise = self.model(t, u, args)
        return jtu.tree_map(lambda a, b: a + b, noise, change)


class Counted(eqx.Module):
    """A model that calls a function whenever it is evaluated."""

    model: Callable
    call: Callable = eqx.field(static=True)

    def __call__(self, t, u, args):
        jax.debug.callback(self.call)
        return self.model(t, u, args)


def mixtures(
    path: Path, others: bool, quick: bool = False
) -> dict[str, tuple[gd.GaussianMixture, int]]:
    """The data sets, and the number of samples to draw for each."""
    if quick:
        images = data_sets.digits()[:20] / 127.5 - 1
        return {
            "2 in 2-D": (gd.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.1), 16),
            "images": (gd.GaussianMixture(images, 0.1), 8),
        }
    if others:
        lattice = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 5)] * 2), -1).reshape(-1, 2)
        weights = np.random.default_rng(5).uniform(0.5, 2, 25)
        small = {
            "25 in 2-D": (gd.GaussianMixture(lattice, 0.1, weights), 512),
            "2 in 1-D": (gd.GaussianMixture([[-1.0], [1.5]], 0.3, [0.4, 0.6]), 256),
        }
    else:
        angle = np.pi / 4 * np.arange(8)
        ring = np.stack([np.cos(angle), np.sin(angle)], -1)
        cloud = np.random.default_rng(1).uniform(-1, 1, (40, 5))
        small = {
            "8 in 2-D": (gd.GaussianMixture(ring, 0.05), 512),
            "40 in 5-D": (gd.GaussianMixture(cloud, 0.05), 512),
        }
    if not path.exists():
        print(f"No images: {path} does not exist (Debian: dataset-fashion-mnist).")
        return small
    raw = data_sets.fashion_mnist(path)
    first = 10_000 if others else 0
    images = raw[first : first + 500] / 127.5 - 1
    return small | {"images": (gd.GaussianMixture(images, 0.02), 64)}


def cases(path: Path, others: bool, quick: bool):
    """All cases: a name, the process, the model and the number of samples."""
    for size in (0.05,) if quick else (0.0, 0.05):
        for name, (mixture, number) in mixtures(path, others, quick).items():
            shape = mixture.means.shape[1:]
            kinds = [gd.VP, gd.CLD, gd.BDM] if name == "images" else [gd.VP, gd.CLD]
            kinds = kinds[-1:] if quick else kinds
            for kind in kinds:
                process = kind(shape)
                model = mixture.model(process)
                label = f"{kind.__name__}, {name}"
                if size:
                    model, label = Perturbed(model, process, size), f"{label}, 5% off"
                yield label, process, model, number


def exact_flow(process: AbstractProcess, model: Callable, u) -> jax.Array:
    """The endpoint of the exact flow, as data, by another solver."""
    tolerance = 1e-9 if u_size(u) < 10_000 else 1e-7
    sol = dfx.diffeqsolve(
        gd.ProbabilityFlow(process, model),
        dfx.Dopri8(),
        process.t_max,
        process.t_min,
        None,
        u,
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=100_000,
    )
    return process.decode(sol.ys)[-1]


def u_size(u) -> int:
    return sum(leaf.size for leaf in jtu.tree_leaves(u))


@eqx.filter_jit
def _through(term: gd.ProbabilityFlow, solver: dfx.AbstractSolver, u, ts, number):
    def step(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(term, ts[i], ts[i + 1], y, None, state, False)
        return y, state

    state = solver.init(term, ts[0], ts[1], u, None)
    y, _ = jax.lax.fori_loop(0, number, step, (u, state))
    return term.process.decode(y)


def step_through(term: gd.ProbabilityFlow, solver, u, ts) -> jax.Array:
    """The data at the end of a grid of up to 300 steps. Compiled once for all lengths."""
    number = len(ts) - 1
    padded = np.pad(np.asarray(ts), (0, 300 - number), mode="edge")
    return _through(term, solver, u, jnp.asarray(padded), jnp.asarray(number))


class Counter:
    """Counts the evaluations of a model at run time."""

    def __init__(self, model: Callable):
        self.count = 0
        self.model = Counted(model, self._increment)

    def _increment(self) -> None:
        self.count += 1

    def __call__(self, run: Callable, *arguments) -> tuple[jax.Array, int]:
        """What `run(model, *arguments)` returns, and how many evaluations it took."""
        self.count = 0
        x = jax.block_until_ready(run(self.model, *arguments))
        jax.effects_barrier()
        return x, self.count


def main():
    parser = argparse.ArgumentParser(description="The error with few steps.")
    parser.add_argument("--fashion-mnist", type=Path, default=fashion_mnist)
    parser.add_argument("--others", action="store_true", help="use held-out data")
    parser.add_argument("--float32", action="store_true", help="sample in float32")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    names, errors = [], []
    numbers = (5, 8) if arguments.quick else (5, 8, 10, 15, 20, 30, 50)
    every = cases(arguments.fashion_mnist, arguments.others, arguments.quick)
    for name, process, model, number in tqdm(list(every), unit="case"):
        u = process.prior(jax.random.key(0), (number,))
        exact = eqx.filter_jit(exact_flow)(process, model, u)
        if arguments.float32:
            u = jtu.tree_map(lambda x: x.astype(jnp.float32), u)
        rows, counter = [], Counter(model)
        dtype = jtu.tree_leaves(u)[0].dtype
        for _, solver, grid in _methods:
            rows.append([])
            for evaluations in numbers:
                ts = gd.time_grid(process, evaluations, grid, dtype=dtype)
                term_of = lambda model: gd.ProbabilityFlow(process, model)
                run = lambda model, u: step_through(term_of(model), solver, u, ts)
                x, count = counter(run, u)
                assert count == evaluations
                square = (x - exact) ** 2
                distance = jnp.sqrt(square.reshape(number, -1).mean(1))
                rows[-1].append(float(jnp.median(distance)))
        names.append(name)
        errors.append(rows)
    # Indexed by case, method and number of evaluations.
    table = np.array(errors)
    header = " | ".join(str(n) for n in numbers)
    print(f"\n| median error | | {header} |\n| --- | --- |{' --- |' * len(numbers)}")
    for name, rows in zip(names, table):
        for (method, _, _), row in zip(_methods, rows):
            print(f"| {name} | {method} | " + " | ".join(f"{e:.1e}" for e in row) + " |")
    ratios = table[:, 0] / table[:, 1]
    print(f"\n| ratio to the paper's | {header} |\n| --- |{' --- |' * len(numbers)}")
    summary = [
        ("geometric mean", np.exp(np.log(ratios).mean(0))),
        ("worst case", ratios.max(0)),
        *zip(names, ratios),
    ]
    for name, row in summary:
        print(f"| {name} | " + " | ".join(f"{r:.2f}" for r in row) + " |")


if __name__ == "__main__":
    main()
