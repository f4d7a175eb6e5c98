"""Time and memory of the paper's network for CIFAR10 under CLD, on one image.

The forward pass, and the gradient of the mean squared output with respect to all
parameters, with and without gradient checkpointing, with activations in float32 and in
bfloat16. Each case runs in its own process, to measure its peak memory. The residuals are
what JAX stores from the forward pass for the backward pass, parameters included.

    python benchmarks/network.py
    python benchmarks/network.py --quick  # a small network, only to see that it runs
"""

import argparse
import functools
import resource
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import gddim_eqx as gd


_cases = [
    (mode, dtype, checkpoint)
    for mode, checkpoints in (("forward", ("",)), ("gradient", ("", "checkpoint")))
    for dtype in ("float32", "bfloat16")
    for checkpoint in checkpoints
]


def peak_bytes() -> int:
    """The peak memory of this process, or of the accelerator."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (device.memory_stats() or {})["peak_bytes_in_use"]


def count_flops(run, *args) -> float:
    """The floating-point operations of a function of arrays, before compiler
    optimisations."""
    shapes = eqx.filter_eval_shape(lambda: args)
    # Not all backends count them, but the CPU's does.
    with jax.default_device(jax.devices("cpu")[0]):
        cost = jax.jit(run).lower(*shapes).cost_analysis()
    return (cost or {}).get("flops", float("nan"))


def measure(mode: str, dtype: str, checkpoint: str, repeats: int, quick: bool) -> str:
    key = jax.random.key(0)
    make = gd.nn.presets.cifar10_cld
    if quick:
        make = functools.partial(gd.nn.presets.small, (8, 8, 2), features=4)
    network = make(key=key, dtype=jnp.dtype(dtype), checkpoint=bool(checkpoint))
    x = jax.random.normal(key, network.shape)

    def loss(network, t):
        return jnp.mean(network(t, x) ** 2)

    run = eqx.filter_jit(
        {"forward": loss, "gradient": eqx.filter_value_and_grad(loss)}[mode]
    )
    seconds = []
    for t in jnp.linspace(0.1, 0.9, repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run(network, t))
        seconds.append(time.perf_counter() - begin)
    call = min(seconds[1:])
    peak = peak_bytes()
    kept = f"{_kept(network, x) / 2**30:.2f} GiB" if mode == "gradient" else ""
    name = mode + (", checkpointed" if checkpoint else "")
    cells = [name, dtype, f"{seconds[0] - call:.0f} s", f"{call:.2f} s"]
    return f"| {' | '.join(cells)} | {peak / 2**30:.1f} GiB | {kept} |"


def _kept(network, x) -> int:
    parameters, static = eqx.partition(network, eqx.is_inexact_array)

    def pull_back(parameters):
        run = lambda parameters: eqx.combine(parameters, static)(jnp.asarray(0.5), x)
        return jax.vjp(run, parameters)[1]

    kept = jtu.tree_leaves(jax.eval_shape(pull_back, parameters))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        mode, dtype, checkpoint = options.case
        print(measure(mode, dtype, checkpoint, options.repeats, options.quick))
        sys.exit()
    print("| | activations | compilation | per call | peak memory | residuals |")
    print("| --- | --- | --- | --- | --- | --- |")
    quick = ["--quick"] if options.quick else []
    for case in _cases[-1:] if quick else _cases:
        command = [sys.executable, __file__, "--repeats", str(options.repeats), *quick]
        # Keep the output in order, even if it is redirected to a file.
        sys.stdout.flush()
        subprocess.run([*command, "--case", *case], check=True)
