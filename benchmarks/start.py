"""Few evaluations with a start in closed form, `GaussianStart`, and without.

First the cases of `few_steps.py` (with `--others` its held-out ones) with the moments of
their data: the distance from the endpoint of the exact flow, in geometric mean over
samples, divided by that of the same solver without a start. Then the included networks for
Fashion-MNIST, where there are images: distances, and the Frechet distance, precision and
recall of 1,000 samples. With `--colour`, a known law of the size of CIFAR10 instead: a
mixture around 500 images of 32 x 32 x 3, each of three of Fashion-MNIST as mixed channels.

    python benchmarks/start.py
    python benchmarks/start.py --colour
    python benchmarks/start.py --quick  # two cases, only to see that it runs
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from few_steps import (
    cases,
    data_sets,
    exact_flow,
    fashion_mnist,
    mixtures,
    step_through,
)
from tqdm import tqdm

import gddim_eqx as gd


def moments(process: gd.AbstractProcess, x: np.ndarray, scale: float) -> gd.NormalData:
    """Those of a mixture with these means, for a start under a process."""
    mean, centred = x.mean(0), x - x.mean(0)
    if isinstance(process, gd.BDM):
        square = np.asarray(process.basis.forward(jnp.asarray(centred))) ** 2
        return gd.NormalData(mean, square.mean(0) + scale**2, basis=process.basis)
    flat = centred.reshape(len(x), -1)
    covariance = flat.T @ flat / len(x) + scale**2 * np.eye(flat.shape[1])
    return gd.NormalData(mean, covariance)


def distance(x, exact) -> float:
    square = np.asarray((x - exact) ** 2, np.float64).reshape(len(x), -1).mean(1)
    return float(np.exp(0.5 * np.log(np.maximum(square, 1e-30)).mean()))


def distances(flow, u, exact, number: int, starts: dict) -> list[float]:
    """Without a start, and with each."""
    dtype = jtu.tree_leaves(u)[0].dtype
    runs = [(flow, gd.time_grid(flow.process, number, dtype=dtype))]
    for start in starts.values():
        ts = start.time_grid(flow.process, number, dtype=dtype)
        runs.append((start.flow(flow, number), ts))
    return [distance(step_through(run, gd.GDDIM(), u, ts), exact) for run, ts in runs]


def regimes(data: gd.NormalData, label: str = "") -> dict[str, gd.GaussianStart]:
    return {
        f"start{label}": gd.GaussianStart(data),
        f"sharpest{label}": gd.GaussianStart(data, None, "sharpest"),
    }


def exact_cases(path: Path, others: bool, quick: bool) -> None:
    numbers = (3, 5) if quick else (3, 5, 8, 12, 20)
    names, ratios = [], []
    mixed = mixtures(path, others, quick)
    for name, process, model, number in tqdm(list(cases(path, others, quick)), unit="case"):
        mixture = mixed[name.split(", ")[1]][0]
        data = moments(process, np.asarray(mixture.means), float(mixture.scale))
        u = process.prior(jax.random.key(0), (number,))
        exact = eqx.filter_jit(exact_flow)(process, model, u)
        flow = gd.ProbabilityFlow(process, model)
        rows = [distances(flow, u, exact, n, regimes(data)) for n in numbers]
        names.append(name)
        ratios.append([[row[i] / row[0] for row in rows] for i in (1, 2)])
    table = np.array(ratios)
    print(
        f"\n| ratio | {' | '.join(map(str, numbers))} |\n|{' --- |' * (len(numbers) + 1)}"
    )
    for i, regime in enumerate(("start", "sharpest")):
        for name, row in [
            ("geometric mean", np.exp(np.log(table[:, i]).mean(0))),
            ("worst case", table[:, i].max(0)),
            *zip(names, table[:, i]),
        ]:
            print(f"| {regime}, {name} | " + " | ".join(f"{r:.2f}" for r in row) + " |")


def colour_images(path: Path, number: int, seed: int) -> np.ndarray:
    """Images of 32 x 32 x 3 whose channels are correlated."""
    images = data_sets.fashion_mnist(path)[..., 0].astype(np.float64) / 127.5 - 1
    index = np.random.default_rng(seed).integers(0, len(images), (number, 3))
    padding = ((0, 0), (2, 2), (2, 2), (0, 0))
    channels = np.pad(np.moveaxis(images[index], 1, -1), padding, constant_values=-1.0)
    mixing = [[0.6, 0.25, 0.15], [0.25, 0.5, 0.25], [0.15, 0.25, 0.6]]
    return channels @ np.array(mixing).T


def colour(path: Path) -> None:
    means = colour_images(path, 500, 0)
    mixture = gd.GaussianMixture(means, 0.02)
    of_law = gd.NormalData.from_samples(mixture.sample(jax.random.key(5), 10_000))
    others = gd.NormalData.from_samples(colour_images(path, 4000, 1), rank=256)
    single = gd.NormalData(np.zeros(means.shape[1:]), float((means**2).mean()))
    starts = regimes(of_law) | regimes(others, ", other images")
    starts |= regimes(single, ", one variance")
    print(f"\n| process, evaluations | without | {' | '.join(starts)} |")
    print("|" + " --- |" * (2 + len(starts)))
    for process in (gd.VP((32, 32, 3)), gd.CLD((32, 32, 3)), gd.RectifiedFlow((32, 32, 3))):
        flow = gd.ProbabilityFlow(process, mixture.model(process, "data"), "data")
        u = process.prior(jax.random.key(1), (64,))
        exact = step_through(flow, gd.GDDIM(), u, gd.time_grid(process, 300))
        for n in (3, 5, 8):
            row = " | ".join(f"{x:.4f}" for x in distances(flow, u, exact, n, starts))
            print(f"| {type(process).__name__}, {n} | {row} |", flush=True)


def networks(path: Path) -> None:
    images = data_sets.fashion_mnist(path)
    features = gd.metrics.Classifier()
    reference = gd.metrics.reference(images, features)
    print("\n| network, evaluations, start | distance | Frechet | precision | recall |")
    print("|" + " --- |" * 5)
    for name in ("fashion-mnist-vp", "fashion-mnist-cld", "fashion-mnist-bdm"):
        flow, kind = gd.checkpoints.pretrained(name), name[-3:].strip("-")
        basis = flow.process.basis if kind == "bdm" else None
        data = gd.NormalData.from_samples(images[:20_000], basis=basis)
        data = jtu.tree_map(lambda x: x.astype(jnp.float32), data)
        single = gd.NormalData(
            jnp.zeros((28, 28, 1)), float(getattr(flow.model, "data_std")) ** 2
        )
        starts = regimes(data) | ({} if kind == "bdm" else regimes(single, ", data_std"))
        u = flow.process.prior(jax.random.key(1), (64,), jnp.float32)
        fine = gd.time_grid(flow.process, 200, dtype=jnp.float32)
        exact = step_through(flow, gd.GDDIM(), u, fine)
        for n in (2, 3, 4, 5, 8, 50):
            found = distances(flow, u, exact, n, starts if n < 50 else {})
            for (name, start), far in zip(({"none": None} | starts).items(), found):
                x, _ = gd.sample(
                    flow,
                    jax.random.key(0),
                    1000,
                    n,
                    start=start,
                    batch_size=500,
                    dtype=jnp.float32,
                )
                y = features(gd.to_uint8(jnp.asarray(x)))
                frechet = gd.metrics.frechet_distance(y, reference.moments)
                quality = gd.metrics.precision_recall(y, reference.vectors[:3000])
                row = f"{far:.3f} | {frechet:.2f} | {quality.precision:.3f} | "
                print(f"| {kind}, {n}, {name} | {row}{quality.recall:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Few evaluations with a start.")
    parser.add_argument("--fashion-mnist", type=Path, default=fashion_mnist)
    parser.add_argument("--others", action="store_true", help="use held-out data")
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    parser.add_argument("--colour", action="store_true", help="a law of colour images")
    arguments = parser.parse_args()
    if arguments.colour:
        return colour(arguments.fashion_mnist)
    exact_cases(arguments.fashion_mnist, arguments.others, arguments.quick)
    if arguments.fashion_mnist.exists() and not (arguments.quick or arguments.others):
        networks(arguments.fashion_mnist)


if __name__ == "__main__":
    main()
