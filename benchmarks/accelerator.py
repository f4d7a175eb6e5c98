"""Sampling on an accelerator: accuracy, and images per second of the paper's network.

Accuracy: the RMS difference of samples in float32 from the CPU's, for the same noise and
exact models. Speed: `sample` with `GDDIM()`, against the network alone, evaluated as often
in a loop, and the model FLOP utilisation: the share of the rate of a large matrix product,
for which PyTorch and JAX use TF32 in single precision.

    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --quick  # a small network, only to see that it runs

Training: `python benchmarks/train_throughput.py --cases cifar10 --dtypes float32 bfloat16`.
"""

import argparse
import functools
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from network import count_flops

import gddim_eqx as gd


_solvers: dict[str, tuple[dfx.AbstractSolver, float]] = {
    "GDDIM()": (gd.GDDIM(), 0.0),
    "GDDIM(2), lambda 1": (gd.GDDIM(2), 1.0),
}
_processes = {"VP": gd.VP, "BDM": gd.BDM, "CLD": gd.CLD}


def difference(make, solver: dfx.AbstractSolver, lam: float) -> float:
    """The RMS difference between the samples of the accelerator and of the CPU."""
    shape, drawn = (8, 8, 1), []
    means = np.random.default_rng(0).normal(size=(10, *shape)).astype(np.float32)
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            process = make(shape)
            model = gd.GaussianMixture(means, 0.3).model(process)
            flow = gd.ProbabilityFlow(process, model)
            x = gd.sample(flow, jr.key(0), 64, solver=solver, lam=lam, num_steps=20).x
            drawn.append(np.asarray(x, np.float64))
    return float(np.sqrt(np.mean((drawn[0] - drawn[1]) ** 2)))


def accuracy(options: argparse.Namespace) -> None:
    least = 1 if options.quick else None
    names, solvers = list(_processes)[:least], list(_solvers)[:least]
    cases = [(_processes[name], *_solvers[solver]) for name in names for solver in solvers]
    with ThreadPoolExecutor(options.parallel) as pool:
        found = iter(list(pool.map(lambda case: difference(*case), cases)))
    print(f"| RMS difference from the CPU's samples | {' | '.join(solvers)} |")
    print("| --- " * (len(solvers) + 1) + "|")
    for name in names:
        print(f"| {name} | {' | '.join(f'{next(found):.1e}' for _ in solvers)} |")


class Timed:
    """One way to evaluate the network for a batch of samples."""

    def __init__(self, run):
        self.run, self.seconds = run, []

    def __call__(self, n: int) -> None:
        begin = time.perf_counter()
        jax.block_until_ready(self.run(jr.key(n)))
        self.seconds.append(time.perf_counter() - begin)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:])


def product(dtype, size: int) -> Timed:
    """A matrix product; its FLOPs are 2 size^3."""
    keys = jr.split(jr.key(0))
    a, b = (jr.normal(key, (size, size), dtype) for key in keys)
    multiply = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: a @ x / 90, b))
    return Timed(lambda _: multiply(a, b))


def by_sample(model, batch: int, num_steps: int) -> Timed:
    flow = gd.ProbabilityFlow(model.process, model)
    return Timed(lambda key: gd.sample(flow, key, batch, num_steps=num_steps).x)


def alone(model, batch: int, num_steps: int) -> Timed:
    """The network alone, evaluated as often."""

    @eqx.filter_jit
    def repeat(model, key):
        u = model.process.prior(key, (batch,))
        evaluate = lambda n, u: jax.vmap(lambda u: model(1 - n / num_steps, u, None))(u)
        return jax.lax.fori_loop(0, num_steps, evaluate, u)

    return Timed(functools.partial(repeat, model))


def operations(model) -> float:
    """The FLOPs of the network for one sample."""
    arrays, static = eqx.partition(model, eqx.is_array)
    run = lambda arrays, u: eqx.combine(arrays, static)(jnp.asarray(0.5), u, None)
    return count_flops(run, arrays, jax.eval_shape(lambda: model.process.prior(jr.key(0))))


def speed(options: argparse.Namespace) -> None:
    ways: dict[str, dict[str, Timed]] = {}
    work: dict[str, float] = {}
    for dtype in ("float32",) if options.quick else ("float32", "bfloat16"):
        key, inside = jr.key(0), jnp.dtype(dtype)
        make: Any = gd.nn.presets.cifar10_cld
        shape = (8, 8, 1) if options.quick else (32, 32, 3)
        if options.quick:
            make = functools.partial(gd.nn.presets.small, (8, 8, 2), features=4)
        model = gd.nn.NetworkModel(gd.CLD(shape), make(key=key, dtype=inside))
        work[dtype] = operations(model)
        ways[dtype] = {
            "product": product(inside, options.size),
            "sample": by_sample(model, options.batch_size, options.num_steps),
            "alone": alone(model, options.batch_size, options.num_steps),
        }
    every = [way for some in ways.values() for way in some.values()]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda way: way(0), every))
    for n in range(options.rounds):
        for way in every:
            way(1 + n)
    print(
        "| activations | images/s | the network alone | ratio | TFLOP/s | of a matrix "
        "product | utilisation |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype, some in ways.items():
        sampled, alone_ = some["sample"].median, some["alone"].median
        rate = work[dtype] * options.num_steps * options.batch_size / sampled / 1e12
        best = 10 * 2 * options.size**3 / some["product"].median / 1e12
        print(
            f"| {dtype} | {options.batch_size / sampled:.1f} | "
            f"{options.batch_size / alone_:.1f} | {alone_ / sampled:.3f} | {rate:.3g} | "
            f"{best:.3g} | {rate / best:.2f} |"
        )
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        print(f"\nPeak memory: {stats['peak_bytes_in_use'] / 2**30:.1f} GiB.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=8192, help="of the matrix product")
    parser.add_argument("--parallel", type=int, default=1, help="compilations at once")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.num_steps, options.rounds, options.size = 4, 3, 1, 64
    # The network is not trained.
    warnings.filterwarnings("ignore", "The samples have a root mean square")
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}\n")
    accuracy(options)
    print()
    speed(options)


if __name__ == "__main__":
    main()
