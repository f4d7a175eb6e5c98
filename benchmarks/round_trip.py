"""The round-trip error of encoding images and decoding them again, in single precision.

Takes 32 samples of a mixture of Gaussians around 500 real images under VP, CLD and BDM,
with exact models. Errors are relative, root mean square over pixels: the median and the
largest, with the same number of steps each way.

    python benchmarks/round_trip.py
    python benchmarks/round_trip.py --quick  # of digits, only to see that it runs
"""

import argparse
import sys
from pathlib import Path

import equinox as eqx
import few_steps
import jax
import jax.numpy as jnp
import numpy as np

import gddim_eqx as gd


jax.config.update("jax_enable_x64", False)


@eqx.filter_jit
def run(flow, x, ts, solver):
    return gd.invert(flow, x, solver=solver, ts=ts).error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fashion-mnist", type=Path, default=few_steps.fashion_mnist)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    quick = arguments.quick
    found = few_steps.mixtures(arguments.fashion_mnist, others=False, quick=quick)
    if "images" not in found:
        sys.exit("There is nothing to measure without images: give `--fashion-mnist`.")
    mixture, number = found["images"]
    x = mixture.sample(jax.random.key(3), number if quick else 32)
    numbers = (5,) if quick else (20, 50, 100)
    print("| | " + " | ".join(f"{n} steps" for n in numbers) + " |")
    print("| --- |" + " --- |" * len(numbers))
    for kind in (gd.BDM,) if quick else (gd.VP, gd.CLD, gd.BDM):
        process = kind(x.shape[1:])
        flow = gd.ProbabilityFlow(process, mixture.model(process))
        for order in (4,) if quick else (4, 3):
            cells = []
            for number in numbers:
                ends = dict(t0=process.t_min, t1=process.t_max)
                ts = gd.time_grid(process, number, **ends)
                error = np.asarray(run(flow, x, ts, gd.GDDIM(order)))
                assert error.dtype == jnp.float32
                cells.append(f"{np.median(error):.1e} ({error.max():.1e})")
            name = f"{kind.__name__}, order {order}"
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
