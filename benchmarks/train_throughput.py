"""Training throughput in images per second, against a minimal hand-written loop.

The loop has the same network, loss, optimiser and EMA, and nothing else: no shuffling,
checks, logging or sharding. `fit` has all of these. For the speed, the two alternate in one
process, so that other load on the machine affects both; for the peak memory, each runs in
its own process before. "From disk" is `fit` on a memory-mapped file of the same images,
which the operating system has in its cache. Each round calls `fit` anew, so that short ones
measure how long it takes to start.

    python benchmarks/train_throughput.py
    python benchmarks/train_throughput.py --cases cifar10 --dtypes float32 bfloat16
    python benchmarks/train_throughput.py --quick  # only to see that it runs
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from network import count_flops, peak_bytes

import gddim_eqx as gd
from gddim_eqx.training import Batches, DenoisingLoss, fit, Trainer


def make(case: str, dtype: str):
    """The model, the images and the batch size."""
    key, random = jr.key(0), np.random.default_rng(0)
    inside = jnp.bfloat16 if dtype == "bfloat16" else None
    if case == "quick":
        shape, batch = (8, 8, 1), 4
        network = gd.nn.presets.mlp((8, 8, 2), key=key, width=8)
    elif case == "mlp":
        shape, batch = (8, 8, 1), 256
        network = gd.nn.presets.mlp((8, 8, 2), key=key)
    elif case == "small":
        shape, batch = (28, 28, 1), 16
        network = gd.nn.presets.small((28, 28, 2), key=key, dtype=inside)
    elif case == "small-gpu":
        shape, batch = (28, 28, 1), 128
        network = gd.nn.presets.small((28, 28, 2), key=key, dtype=inside, features=64)
    else:
        shape, batch = (32, 32, 3), 128
        network = gd.nn.presets.cifar10_cld(key=key, dtype=inside)
    images = random.integers(0, 256, (1024, *shape), np.uint8)
    return gd.nn.NetworkModel(gd.CLD(shape), network), images, batch


class ByHand:
    def __init__(self, model, images, batch):
        process = model.process
        optimiser = gd.training.Trainer(gd.training.DenoisingLoss(process)).optimiser
        parameters, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(parameters, x, key):
            model = eqx.combine(parameters, static)
            time_key, noise_key = jr.split(key)
            t = 1e-5 + (1 - 1e-5) * jr.uniform(time_key, (batch,))
            keys = jr.split(noise_key, batch)
            u, noise = jax.vmap(process.perturb)(keys, x, t)
            predicted = jax.vmap(model)(t, u)
            squares = jtu.tree_map(lambda a, b: jnp.mean((a - b) ** 2), predicted, noise)
            return (squares.x + squares.v) / 2

        def step(parameters, average, state, x, key):
            x = x.astype(jnp.float32) / 127.5 - 1
            value, gradient = jax.value_and_grad(loss)(parameters, x, key)
            updates, state = optimiser.update(gradient, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
            average = jtu.tree_map(lambda a, p: a + 1e-4 * (p - a), average, parameters)
            return parameters, average, state, value

        # Copies, as `step` donates its buffers.
        parameters, average = (jtu.tree_map(jnp.copy, parameters) for _ in range(2))
        self.state = (parameters, average, optimiser.init(parameters))
        self.step = jax.jit(step, donate_argnums=(0, 1, 2))
        self.images, self.batch, self.done = images, batch, 0

    def run(self, steps: int) -> None:
        value = None
        for n in range(self.done, self.done + steps):
            start = n * self.batch % (len(self.images) - self.batch + 1)
            x = jax.device_put(self.images[start : start + self.batch])
            *self.state, value = self.step(*self.state, x, jr.fold_in(jr.key(1), n))
        jax.block_until_ready(value)
        self.done += steps


class Ours:
    def __init__(self, model, images, batch):
        self.batches = Batches(images, batch)
        self.trainer = Trainer(DenoisingLoss(model.process), ema_decay=0.9999, debias=False)
        self.state: Any = self.trainer.init(model, jr.key(1))
        self.done = 0

    def run(self, steps: int) -> None:
        self.done += steps
        # No other reference is kept, so its memory is freed after the first step.
        state, self.state = [self.state], None
        self.state = fit(self.trainer, state.pop(), self.batches, self.done, progress=False)


class FromDisk(Ours):
    def __init__(self, model, images, batch):
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name) / "images.npy"
        np.save(path, images)
        super().__init__(model, np.load(path, mmap_mode="r"), batch)


_ways = {"by hand": ByHand, "fit": Ours, "from disk": FromDisk}


def seconds(way, steps: int) -> float:
    begin = time.perf_counter()
    way.run(steps)
    return time.perf_counter() - begin


def operations(loop: ByHand) -> float:
    """The FLOPs of a step."""
    return count_flops(loop.step, *loop.state, loop.images[: loop.batch], jr.key(0))


def peaks(options: argparse.Namespace) -> dict[tuple[str, ...], float]:
    """The peak memory in GiB for each case, dtype and way. The programs are stored in
    JAX's compilation cache if it is enabled."""

    def peak(which: tuple[str, ...]) -> float:
        command = [sys.executable, __file__, "--memory", *which]
        return int(subprocess.check_output(command, env=environment)) / 2**30

    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    which = [
        (case, dtype, name)
        for case in options.cases
        for dtype in options.dtypes
        for name in ("by hand", "fit")
    ]
    with ThreadPoolExecutor(options.parallel) as pool:
        return dict(zip(which, pool.map(peak, which)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=["mlp", "small"])
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=4.0, help="per round, roughly")
    parser.add_argument(
        "--parallel", type=int, default=1, help="processes at once, for the peak memory"
    )
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        case, dtype, name = options.memory
        _ways[name](*make(case, dtype)).run(5)
        print(peak_bytes())
        return
    if options.quick:
        options.cases, options.rounds, options.seconds = ["quick"], 1, 0.0
    peak = peaks(options)
    print(
        "| network | activations | images/s | by hand | ratio | from disk / from memory | "
        "peak memory | by hand | TFLOP/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in options.cases:
        for dtype in options.dtypes:
            model, images, batch = make(case, dtype)
            ways = {name: way(model, images, batch) for name, way in _ways.items()}
            for way in ways.values():
                way.run(3)
            steps = max(2, round(options.seconds * 3 / seconds(ways["by hand"], 3)))
            rounds = [
                {name: seconds(way, steps) for name, way in ways.items()}
                for _ in range(options.rounds)
            ]
            ratio = statistics.median(r["by hand"] / r["fit"] for r in rounds)
            disk = statistics.median(r["fit"] / r["from disk"] for r in rounds)
            rate = {
                name: batch * steps / statistics.median(r[name] for r in rounds)
                for name in ways
            }
            work = operations(ways["by hand"]) * rate["fit"] / batch / 1e12
            print(
                f"| {case}, batch {batch} | {dtype} | {rate['fit']:.0f} | "
                f"{rate['by hand']:.0f} | {ratio:.3f} | {disk:.3f} | "
                f"{peak[case, dtype, 'fit']:.2f} GiB | "
                f"{peak[case, dtype, 'by hand']:.2f} GiB | {work:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
