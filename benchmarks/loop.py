"""A network evaluation inside a loop, as in a solver, and outside of one.

With the convolutions of this library, and with Equinox's own, which are channels-first and
slow in loops on CPUs.

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
    """Milliseconds per image or evaluation, of which there are `number`: best of three."""
    jax.block_until_ready(run(*args))
    spent = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        spent.append(time.perf_counter() - begin)
    return 1e3 * min(spent) / number


def measure(batch: int, steps: int) -> tuple[float, float]:
    model = gd.checkpoints.pretrained("fashion-mnist-vp").model

    # Defined anew each time, so that no earlier compilation is reused.
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
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    extent = (2, 2) if parser.parse_args().quick else (64, 20)
    print("| convolutions | ms per image, alone | in a loop | ratio |")
    print("| --- | --- | --- | --- |")
    alone, loop = measure(*extent)
    print(f"| channels last | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |", flush=True)
    for module in (_layers, _ncsnpp):
        setattr(module, "convolve", lambda layer, x: layer(x))
    alone, loop = measure(*extent)
    print(f"| channels first | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |")


if __name__ == "__main__":
    main()
