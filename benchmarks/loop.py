"""An evaluation of a network in a loop, as solvers have it, and outside of one.

With the convolutions of this library, and with Equinox's own, which have channels first
and are slow in loops on CPUs.

    python benchmarks/loop.py
    python benchmarks/loop.py --quick  # only to see that it runs
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp

import gddim_eqx as gd
from gddim_eqx.nn import _layers, _ncsnpp


def milliseconds(run, *args, number: int) -> float:
    """For one of so many images or evaluations, the least of three."""
    jax.block_until_ready(run(*args))
    spent = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        spent.append(time.perf_counter() - begin)
    return 1e3 * min(spent) / number


def measure(batch: int, steps: int) -> tuple[float, float]:
    model = gd.checkpoints.pretrained("fashion-mnist-vp").model

    # Anew each time, so that nothing compiled before is used.
    def one(model, t, x):
        return model(t, x)

    def loop(model, x):
        step = lambda i, x: x - 1e-3 * one(model, (i + 1) / steps, x)
        return jax.lax.fori_loop(0, steps, step, x)

    x = jax.random.normal(jax.random.key(0), (batch, 28, 28, 1))
    alone = milliseconds(eqx.filter_jit(one), model, jnp.array(0.5), x, number=batch)
    return alone, milliseconds(eqx.filter_jit(loop), model, x, number=batch * steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    extent = (2, 2) if parser.parse_args().quick else (64, 20)
    print("| convolutions | ms an image, alone | in a loop | ratio |")
    print("| --- | --- | --- | --- |")
    alone, loop = measure(*extent)
    print(f"| channels last | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |", flush=True)
    for module in (_layers, _ncsnpp):
        setattr(module, "convolve", lambda layer, x: layer(x))
    alone, loop = measure(*extent)
    print(f"| channels first | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |")


if __name__ == "__main__":
    main()
