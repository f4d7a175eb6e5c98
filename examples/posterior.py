"""Simulation-based inference: the posterior of a simulator's parameters, "two moons".

A simulator turns two parameters, uniform in a square, into two measurements. A conditional
diffusion model is trained on 10,000 simulations: its data are the parameters, its condition
the measurements. The process is `VE`, whose noise levels are uniform in their logarithm, as
the posterior has structure at all scales down to a hundredth. Given a measurement, `sample`
draws from the posterior, two crescents, in 20 evaluations, and `log_likelihood` gives the
posterior density of any parameters.

The posterior of this simulator can also be sampled exactly, so a classifier is trained to
tell both sets of samples apart (C2ST: .5 if it cannot, 1 if it always can). The table
compares `GDDIM()` with `diffrax.Tsit5()` on the same network. Draws `docs/posterior.png`.
Takes less than two minutes on two CPU cores, half of them training.

    python examples/posterior.py
    python examples/posterior.py --quick  # only to see that it runs
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Float
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gddim_eqx as gd
from gddim_eqx.training import Batches, DenoisingLoss, fit, Trainer


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


Points = Float[np.ndarray, "number 2"]


def crescent(random: np.random.Generator, number: int) -> Points:
    angle = random.uniform(-np.pi / 2, np.pi / 2, number)
    radius = random.normal(0.1, 0.01, number)
    return np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], -1)


def simulate(random: np.random.Generator, parameters: Points) -> Points:
    total, difference = parameters.sum(-1), parameters[:, 1] - parameters[:, 0]
    shift = np.stack([-np.abs(total), difference], -1) / np.sqrt(2)
    return crescent(random, len(parameters)) + shift


def exact_posterior(random: np.random.Generator, measured, number: int) -> Points:
    """The parameters that would have given the measurement, for draws of the noise. (The
    prior is uniform, and the map between them has a constant Jacobian.)"""
    noise = crescent(random, 2 * number)
    size, difference = noise[:, 0] - measured[0], measured[1] - noise[:, 1]
    total = size * random.choice([-1, 1], len(size))
    parameters = np.stack([total - difference, total + difference], -1) / np.sqrt(2)
    possible = (np.abs(parameters) < 1).all(-1) & (size > 0)
    return parameters[possible][:number]


def train(
    process: gd.AbstractProcess, parameters: Points, measurements: Points, num_steps: int
) -> Callable:
    """A model of the parameters given the measurements."""
    network = gd.nn.TimeMLP(2, width=128, depth=4, key=jr.key(0), context_size=2)
    model = gd.nn.NetworkModel(process, network, data_std=float(parameters.std()))
    warmup = num_steps // 40 + 1
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup, num_steps)
    loss = DenoisingLoss(process, "data", weighting="noise")
    trainer = Trainer(loss, optax.adam(learning_rate), ema_decay=0.999)
    batches = Batches((parameters, measurements), 256)
    return fit(trainer, trainer.init(model, jr.key(1)), batches, num_steps).averaged


def c2st(one: Points, other: Points) -> float:
    """The accuracy of a classifier, as in the benchmark of Lueckmann et al. 2021."""
    classifier = MLPClassifier((20, 20), max_iter=1000, random_state=0)
    x, y = np.concatenate([one, other]), np.repeat([0, 1], [len(one), len(other)])
    scores = cross_val_score(make_pipeline(StandardScaler(), classifier), x, y, cv=5)
    return float(scores.mean())


def draw(path: Path, flow, exact: Points, samples: Points, context) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
    for axis, points in zip(axes, (exact, samples)):
        axis.scatter(*points.T, s=1)
    grid = np.linspace(-0.6, 0.6, 60)
    points = jnp.asarray(np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2))
    args = jnp.broadcast_to(context, (len(points), 2))
    density = gd.log_likelihood(flow, points, args=args).value.reshape(60, 60)
    axes[2].pcolormesh(grid, grid, np.exp(density), shading="nearest")
    for axis, title in zip(axes, ("exact posterior", "samples", "density")):
        axis.set(title=title, aspect="equal", xlim=(-0.6, 0.6), ylim=(-0.6, 0.6))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The posterior of a simulator.")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    number, num_steps = (200, 20) if arguments.quick else (10_000, 8000)
    process = gd.VE((2,), sigma_min=0.005, sigma_max=5.0)

    parameters = random.uniform(-1, 1, (number, 2)).astype(np.float32)
    measurements = simulate(random, parameters).astype(np.float32)
    start = time.perf_counter()
    model = train(process, parameters, measurements, num_steps)
    print(f"Trained on {number} simulations in {time.perf_counter() - start:.0f} s.\n")

    measured = jnp.zeros(2)
    number = 100 if arguments.quick else 2000
    exact = exact_posterior(random, np.zeros(2), number)
    args = jnp.broadcast_to(measured, (len(exact), 2))
    flow = gd.ProbabilityFlow(process, model, "data")
    prior = process.prior(jr.key(2), (len(exact),))
    by_gddim, evaluations = gd.sample(flow, jr.key(2), len(exact), 20, args=args)
    controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
    solved = dfx.diffeqsolve(
        flow,
        dfx.Tsit5(),
        process.t_max,
        process.t_min,
        None,
        prior,
        args,
        stepsize_controller=controller,
    )
    assert solved.ys is not None
    # Six evaluations a step, and two to find the first step size.
    table = {
        "GDDIM()": (by_gddim, evaluations),
        "Tsit5(), tolerance 1e-5": (solved.ys[-1], 6 * int(solved.stats["num_steps"]) + 2),
    }
    print("| sampler | evaluations | C2ST |\n| --- | --- | --- |")
    for name, (samples, evaluations) in table.items():
        score = c2st(exact, np.asarray(samples))
        print(f"| {name} | {evaluations} | {score:.3f} |")
    values = gd.log_likelihood(flow, jnp.asarray(exact), args=args).value
    print(
        f"\nMean log-density of the exact posterior's samples: {float(values.mean()):.2f}"
    )

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "posterior.png"
    draw(path, flow, exact, np.asarray(by_gddim), measured)
    print(f"Drew {path}.")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
