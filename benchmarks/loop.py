"""An evaluation of a network in a loop, as solvers have it, and outside of one.

With the convolutions of this library, and with Equinox's own, which have channels first
and are slow in loops on CPUs.

    python benchmarks/loop.py
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp

import gddim_eqx as gd
from gddim_eqx.nn import _layers, _ncsnpp


_batch, _steps = 64, 20


def milliseconds(run, *args, evaluations: int) -> float:
    """For one image and evaluation, the least of three."""
    jax.block_until_ready(run(*args))
    spent = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        spent.append(time.perf_counter() - begin)
    return 1e3 * min(spent) / evaluations / _batch


def measure() -> tuple[float, float]:
    model = gd.checkpoints.pretrained("fashion-mnist-vp").model

    # Anew each time, so that nothing compiled before is used.
    def one(model, t, x):
        return model(t, x)

    def loop(model, x):
        step = lambda i, x: x - 1e-3 * one(model, (i + 1) / _steps, x)
        return jax.lax.fori_loop(0, _steps, step, x)

    x = jax.random.normal(jax.random.key(0), (_batch, 28, 28, 1))
    alone = milliseconds(eqx.filter_jit(one), model, jnp.array(0.5), x, evaluations=1)
    return alone, milliseconds(eqx.filter_jit(loop), model, x, evaluations=_steps)


def main() -> None:
    print("| convolutions | ms an image, alone | in a loop | ratio |")
    print("| --- | --- | --- | --- |")
    alone, loop = measure()
    print(f"| channels last | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |", flush=True)
    for module in (_layers, _ncsnpp):
        setattr(module, "convolve", lambda layer, x: layer(x))
    alone, loop = measure()
    print(f"| channels first | {alone:.2f} | {loop:.2f} | {loop / alone:.2f} |")


if __name__ == "__main__":
    main()
