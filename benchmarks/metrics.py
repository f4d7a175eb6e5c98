"""Time and memory of `gddim_eqx.metrics`, on synthetic features.

    python benchmarks/metrics.py           # 50,000 of size 2048: minutes on 2 cores
    python benchmarks/metrics.py --number 10000 --size 512
    python benchmarks/metrics.py --quick   # only to see that it runs

Each metric runs in its own process. For comparison, straightforward implementations of two
of them: NumPy's covariance of all features at once, and SciPy's matrix square root.
"""

import argparse
import functools
import multiprocessing
import operator
import resource
import time
from typing import Any

import numpy as np
import scipy.linalg

from gddim_eqx import metrics


def features(seed: int, number: int, size: int) -> np.ndarray:
    """Features like Inception's: correlated and nonnegative."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    mixing = mixing.astype(np.float32)
    vectors = np.empty((number, size), np.float32)
    for n in range(0, number, 1000):
        normal = random.normal(size=(min(1000, number - n), size)).astype(np.float32)
        vectors[n : n + 1000] = np.maximum(normal @ mixing + 0.01 * seed, 0)
    return vectors


def streamed(a, b):
    return [
        functools.reduce(
            operator.add,
            (metrics.Moments.of(x[n : n + 1000]) for n in range(0, len(x), 1000)),
        )
        for x in (a, b)
    ]


def at_once(a, b):
    return [metrics.Moments(len(x), x.mean(axis=0), np.cov(x.T)) for x in (a, b)]


def rooted(a: metrics.Moments, b: metrics.Moments) -> float:
    root = np.real(scipy.linalg.sqrtm(a.covariance @ b.covariance))
    spread = np.trace(a.covariance + b.covariance - 2 * root)
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def some(a, b):
    return a[:10_000], b[:10_000]


MEASURES = {
    "moments of both, in batches of 1000": (lambda a, b: (a, b), streamed),
    "the same with numpy.cov": (lambda a, b: (a, b), at_once),
    "Frechet distance of the moments": (streamed, metrics.frechet_distance),
    "the same with scipy.linalg.sqrtm": (streamed, rooted),
    "kernel distance, 100 subsets of 1000": (
        lambda a, b: (a, b),
        lambda a, b: metrics.kernel_distance(a, b, 100, min(1000, len(a))),
    ),
    "sliced Wasserstein, 256 directions": (
        lambda a, b: (a, b),
        metrics.sliced_wasserstein,
    ),
    "precision and recall of 10,000": (some, metrics.precision_recall),
    "precision and recall of all": (lambda a, b: (a, b), metrics.precision_recall),
}


def text(value) -> str:
    if isinstance(value, list):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"{x:.3g}" for x in value)
    return f"{value:.9g}"


def run(name: str, number: int, size: int, queue: Any) -> None:
    prepare, measure = MEASURES[name]
    prepared = prepare(features(0, number, size), features(1, number, size))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before, start = peak(), time.perf_counter()
    value = measure(*prepared)
    queue.put((time.perf_counter() - start, before, peak(), text(value)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--number", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    number, size = arguments.number, arguments.size
    if arguments.quick:
        number, size = 50, 16
    print(f"Two sets of {number} features of size {size}, float32:", end=" ")
    print(f"{2 * 4 * number * size / 2**30:.2f} GiB.\n")
    print("| | seconds | GiB before | peak GiB | value |")
    print("| --- | --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for name in MEASURES:
        queue = context.SimpleQueue()
        process = context.Process(target=run, args=(name, number, size, queue))
        # With `--quick`, only the first runs in its own process.
        if arguments.quick and name != next(iter(MEASURES)):
            run(name, number, size, queue)
        else:
            process.start()
            process.join()
            if process.exitcode:
                print(f"| {name} | failed with {process.exitcode} | | | |", flush=True)
                continue
        seconds, before, peak, value = queue.get()
        print(
            f"| {name} | {seconds:.1f} | {before:.2f} | {peak:.2f} | {value} |", flush=True
        )


if __name__ == "__main__":
    main()
