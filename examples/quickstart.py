"""Quickstart: one trained network, five solvers, and one with a start in closed form.

Trains a small network on scikit-learn's handwritten digits (1,797 scans of 8x8 pixels,
which come with the package) under critically-damped Langevin diffusion. Then draws
samples with 5 to 50 evaluations of the network. All solvers get the same network,
the same noise and the same `gddim_eqx.ProbabilityFlow`: to go from Diffrax's `Heun` to
`GDDIM`, change the solver and nothing else.

Prints a table, and draws the samples in `docs/quickstart.png`. Takes about three minutes on
two CPU cores. `--quick` is a smoke test: too short to give good samples.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_digits
from tqdm import tqdm

import gddim_eqx as gd


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


Images = Float[Array, "batch 8 8 1"]


def load_images(key: PRNGKeyArray) -> Images:
    pixels, _ = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1) / 8 - 1  # From [0, 16] to [-1, 1].
    return jr.permutation(key, jnp.asarray(images, jnp.float32))


#
# The network, and its training
#


class NoisePredictor(eqx.Module):
    """Predicts the noise in one noisy image and its velocity.

    The prediction is the exact one for a Gaussian with the mean and standard deviation of
    the images, plus a learned correction. This speeds up training, and gives sensible
    predictions far from all images, where there is nothing to learn from.
    """

    gaussian: Callable
    correction: eqx.nn.MLP
    frequencies: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, process: gd.CLD, images: Images, key: PRNGKeyArray):
        mean = images.mean(axis=0)
        spread = float(jnp.std(images - mean))
        self.gaussian = gd.GaussianMixture(mean[None], spread).model(process)
        self.frequencies = tuple(np.linspace(0.25, 4, 8).tolist())
        size = 2 * math.prod(process.shape)
        self.correction = eqx.nn.MLP(
            in_size=size + 2 * len(self.frequencies),
            out_size=size,
            width_size=512,
            depth=3,
            activation=jax.nn.silu,
            key=key,
        )

    def __call__(self, t: Float[Array, ""], u: gd.Phase) -> gd.Phase:
        gaussian = jax.lax.stop_gradient(self.gaussian)(t, u, None)
        # Most changes happen at small times, so embed the logarithm of time.
        phase = jnp.log(t) * jnp.asarray(self.frequencies)
        # The velocity has half the standard deviation of the position.
        features = [u.x.ravel(), 2 * u.v.ravel(), jnp.sin(phase), jnp.cos(phase)]
        x, v = jnp.split(self.correction(jnp.concatenate(features)), 2)
        shape = u.x.shape
        return gd.Phase(gaussian.x + x.reshape(shape), gaussian.v + v.reshape(shape))


def loss(
    network: NoisePredictor, process: gd.CLD, images: Images, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Hybrid score matching: noise the images, and predict the noise."""
    time_key, noise_key = jr.split(key)
    batch = images.shape[0]
    # Stratified: one time in each of `batch` equal intervals, to reduce the variance.
    fraction = (jnp.arange(batch) + jr.uniform(time_key)) / batch
    t = 1e-5 + (process.t_end - 1e-5) * fraction
    u, noise = jax.vmap(process.perturb)(jr.split(noise_key, batch), images, t)
    predicted = jax.vmap(network)(t, u)
    return (
        jnp.mean((predicted.x - noise.x) ** 2) + jnp.mean((predicted.v - noise.v) ** 2)
    ) / 2


def train(
    process: gd.CLD,
    images: Images,
    key: PRNGKeyArray,
    num_steps: int,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.999,
) -> NoisePredictor:
    """Returns the network with the EMA of its parameters."""
    network_key, key = jr.split(key)
    network = NoisePredictor(process, images, network_key)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(100, num_steps // 10),
        decay_steps=num_steps,
        end_value=learning_rate / 20,
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @eqx.filter_jit
    def make_step(network, average, optimiser_state, step, key):
        choice_key, loss_key = jr.split(key)
        batch = jr.choice(choice_key, images, (batch_size,))
        value, gradient = eqx.filter_value_and_grad(loss)(network, process, batch, loss_key)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        network = eqx.apply_updates(network, updates)
        # A shorter EMA at first, to forget the initial parameters.
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        parameters = eqx.filter(network, eqx.is_inexact_array)
        average = jtu.tree_map(
            lambda old, new: decay * old + (1 - decay) * new, average, parameters
        )
        return network, average, optimiser_state, value

    average = eqx.filter(network, eqx.is_inexact_array)
    optimiser_state = optimiser.init(average)
    progress = tqdm(range(num_steps), desc="Training", unit=" steps", mininterval=1)
    for step in progress:
        network, average, optimiser_state, value = make_step(
            network, average, optimiser_state, jnp.asarray(step), jr.fold_in(key, step)
        )
        if step % 100 == 0 or step == num_steps - 1:
            progress.set_postfix(loss=f"{value:.4f}", refresh=False)
    return eqx.combine(average, network)


#
# Sampling
#


class CountedModel:
    """Calls the network on a batch, and counts the calls at run time."""

    def __init__(self):
        self.evaluations = 0

    def _increment(self):
        self.evaluations += 1

    def __call__(self, t, u: gd.Phase, network: NoisePredictor) -> gd.Phase:
        jax.debug.callback(self._increment)
        return jax.vmap(network, in_axes=(None, 0))(t, u)


@eqx.filter_jit
def sample(
    term: gd.ProbabilityFlow,
    solver: dfx.AbstractSolver,
    ts: Float[Array, " times"],
    noise: gd.Phase,
    network: NoisePredictor,
) -> Images:
    solution = dfx.diffeqsolve(
        term,
        solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=None,
        y0=noise,
        args=network,
        stepsize_controller=dfx.StepTo(ts),
        max_steps=len(ts) - 1,
    )
    # Diffrax prepends an axis for the saved times; here only the last is saved.
    return term.process.decode(solution.ys)[0]


Grid = Literal["clock", "quadratic", "uniform"]


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    solver: dfx.AbstractSolver
    evaluations_per_step: int = 1
    evaluations_at_start: int = 0
    # To be fair, Diffrax's solvers are given the better of two grids at each budget.
    grids: tuple[Grid, ...] = ("quadratic", "uniform")
    # Whether high noise levels are sampled in closed form, for few evaluations.
    starts: bool = False

    def is_for(self, budget: int) -> bool:
        if self.starts and budget > 10:
            return False
        return budget >= self.evaluations_at_start + self.evaluations_per_step


METHODS = [
    Method("GDDIM with a start", gd.GDDIM(), grids=("clock",), starts=True),
    Method("GDDIM", gd.GDDIM(), grids=("clock",)),
    Method("GDDIM as in the paper", gd.GDDIM(3, "noise"), grids=("quadratic",)),
    Method("Diffrax Heun", dfx.Heun(), 2),
    Method("Diffrax Tsit5", dfx.Tsit5(), 6, evaluations_at_start=1),
    Method("Diffrax Euler", dfx.Euler()),
]


@dataclasses.dataclass(frozen=True)
class Result:
    name: str
    images: np.ndarray
    frechet: float
    wasserstein: float
    evaluations: int = 0
    grid: str = ""
    diverged: bool = False


def compare(
    network: NoisePredictor,
    process: gd.CLD,
    real: np.ndarray,
    noise: gd.Phase,
    budgets: list[int],
    start: gd.GaussianStart,
) -> dict[int, list[Result]]:
    """Compare the samples of every method at every budget with real images."""
    model = CountedModel()
    term = gd.ProbabilityFlow(process, model)
    distance_of_noise, _ = distances(np.asarray(noise.x), real)

    def run(method: Method, budget: int, grid: Grid) -> Result:
        steps = (budget - method.evaluations_at_start) // method.evaluations_per_step
        ts, solved = gd.time_grid(process, steps, grid), term
        if method.starts:
            ts, solved = start.time_grid(process, steps), start.flow(term, steps)
        model.evaluations = 0
        images = np.asarray(sample(solved, method.solver, ts, noise, network))
        jax.effects_barrier()  # Wait for the counts to arrive.
        assert 0 < model.evaluations <= budget
        frechet, wasserstein = distances(images, real)
        return Result(
            name=method.name,
            images=images,
            frechet=frechet,
            wasserstein=wasserstein,
            evaluations=model.evaluations,
            grid=grid,
            # Farther from the images than the noise it started from, or not finite.
            diverged=not frechet < distance_of_noise,
        )

    def best(method: Method, budget: int) -> Result:
        results = [run(method, budget, grid) for grid in method.grids]
        return min(results, key=lambda r: (math.isnan(r.frechet), r.frechet))

    results = {budget: [] for budget in budgets}
    # Most of the time is spent on compilation.
    for budget, method in tqdm([*product(budgets, METHODS)], desc="Sampling"):
        if method.is_for(budget):
            results[budget].append(best(method, budget))
    return results


#
# How good are the samples?
#


def distances(images: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Frechet and sliced Wasserstein distances of pixels; NaN if not finite."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (images, real))
    if not np.isfinite(a).all():
        return math.nan, math.nan
    return gd.metrics.frechet_distance(a, b), gd.metrics.sliced_wasserstein(a, b)


def print_table(results: dict[int, list[Result]], references: list[Result]) -> None:
    print(f"\n{'':30}  evaluations  time grid    Frechet  sliced Wasserstein")
    for group in [*results.values(), references]:
        print("-" * 83)
        for result in group:
            print(
                f"{result.name:30}  {result.evaluations or '':>11}  {result.grid:9}"
                f"  {result.frechet:9.3g}  {result.wasserstein:18.3g}"
                f"{'  diverged' if result.diverged else ''}"
            )
    print("\nDistances to real digits: lower is better. Diverged: no closer than noise.")


def draw(results: dict[int, list[Result]], real: np.ndarray, path: Path) -> None:
    """A row of samples for each method and budget, all from the same noise."""
    rows, columns = len(METHODS) + 1, len(results)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.3 + 2.6 * columns, 0.4 + 0.66 * rows),
        squeeze=False,
        layout="constrained",
    )

    def show(axis, images, caption):
        # Pixels of diverged samples may be arbitrarily large, or not finite.
        images = np.nan_to_num(images[:6, ..., 0]).clip(-1, 1)
        images = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=images.min())
        axis.imshow(np.concatenate(images, axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(caption, fontsize=8)

    for column, (budget, group) in enumerate(results.items()):
        title = f"At most {budget} evaluations"
        axes[0, column].set_title(title, fontsize=10)
        own = {result.name: result for result in group}
        for axis, method in zip(axes[:, column], METHODS):
            if (result := own.get(method.name)) is None:
                show(axis, np.ones((6, 8, 8, 1)), " ")
                axis.set_frame_on(False)
                continue
            distance = f"Frechet distance {result.frechet:.2f}"
            outcome = "diverged" if result.diverged else distance
            show(axis, result.images, f"{result.evaluations} evaluations: {outcome}")
        show(axes[-1, column], real[6 * column :], "")
    names = [*(method.name for method in METHODS), "Real digits"]
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parents[1] / "docs",
        help="the directory to save the picture in",
    )
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    budgets = [20] if arguments.quick else [5, 8, 10, 20, 50]
    image_key, train_key, noise_key = jr.split(jr.key(0), 3)

    process = gd.CLD(shape=(8, 8, 1))
    images = load_images(image_key)
    network = train(process, images, train_key, 300 if arguments.quick else 4000)

    # Samples are compared with one half of the digits, and so is the other half.
    number = 128 if arguments.quick else len(images) // 2
    real, others = np.asarray(images[:number]), np.asarray(images[number : 2 * number])
    noise = process.prior(noise_key, (number,))
    # The closed form: that of normal data with the mean and the covariance of the images.
    start = gd.GaussianStart(gd.NormalData.from_samples(images))
    results = compare(network, process, real, noise, budgets, start)

    # The worst and the best to expect. (But the network was trained on both halves.)
    starting_points = np.asarray(noise.x)
    references = [
        Result("Noise", starting_points, *distances(starting_points, real)),
        Result("Real digits, the other half", others, *distances(others, real)),
    ]
    print_table(results, references)
    path = arguments.output / "quickstart.png"
    draw(results, real, path)
    print(f"Samples: {path}")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
