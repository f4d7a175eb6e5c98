"""Latent codes: encode handwritten digits, interpolate between codes, and optimise one.

Solved forward in time, the probability flow maps data to noise; solved backward, it
recovers the data. The model is exact, for a mixture of Gaussians around scikit-learn's
1,797 digits; a network could take its place.

1. Encodes digits, decodes them again, and prints the round-trip error.
2. Interpolates between the codes of two digits, and decodes.
3. Differentiates through the sampler with respect to the noise, to find by gradient
    descent noise whose sample has given pixels in its left half.

Draws `docs/latent_space.png`. Takes one minute on two CPU cores.
"""

import argparse
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_digits

import gddim_eqx as gd


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


Images = Float[Array, "number 8 8 1"]


def arc(first: Images, last: Images, number: int) -> Images:
    """Spherical interpolation between two codes: linear interpolation would pass through
    codes of smaller norm than noise has."""
    cosine = (first * last).sum() / jnp.linalg.norm(first) / jnp.linalg.norm(last)
    angle = jnp.arccos(cosine)
    fraction = jnp.linspace(0, 1, number)[:, None, None, None]
    weights = jnp.sin((1 - fraction) * angle), jnp.sin(fraction * angle)
    return (weights[0] * first[None] + weights[1] * last[None]) / jnp.sin(angle)


@eqx.filter_jit
def search(
    flow: gd.ProbabilityFlow,
    noise: Images,
    target: Float[Array, "8 4 1"],
    num_iterations: int,
    num_steps: int = 10,
) -> tuple[Images, Float[Array, " iterations"]]:
    """Optimise noise so that the left half of its samples matches the target."""

    def loss(noise):
        x = gd.generate(flow, noise, num_steps)
        misfit = ((x[:, :, :4] - target) ** 2).mean()
        # Keep the norm that noise has.
        return misfit + 0.1 * ((noise**2).mean((1, 2, 3)) - 1).mean() ** 2

    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, num_iterations))

    def improve(carry, _):
        noise, state = carry
        value, gradient = jax.value_and_grad(loss)(noise)
        updates, state = optimiser.update(gradient, state)
        noise = jnp.asarray(optax.apply_updates(noise, updates))
        return (noise, state), value

    start = (noise, optimiser.init(noise))
    (noise, _), losses = jax.lax.scan(improve, start, length=num_iterations)
    return noise, losses


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

    pixels, _ = load_digits(return_X_y=True)
    images = jnp.asarray(pixels.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    process = gd.VP((8, 8, 1))
    mixture = gd.GaussianMixture(images, 0.2)
    flow = gd.ProbabilityFlow(process, mixture.model(process))

    digits = images[:8]
    codes, errors = eqx.filter_jit(gd.invert)(flow, digits, 100)
    assert errors is not None
    print(f"Round trip, 100 steps each way: relative errors up to {errors.max():.1e}")
    decode = eqx.filter_jit(gd.generate)
    rows = {"Digits": digits, "Decoded from codes": decode(flow, codes, 100)}
    for first, last in ((0, 1), (2, 3), (4, 5)):
        walk = decode(flow, arc(codes[first], codes[last], 8), 100)
        rows[f"From {first} to {last}"] = walk

    noise = process.prior(jax.random.key(0), (8,))
    target = digits[3, :, :4]
    found, losses = search(flow, noise, target, 5 if arguments.quick else 100)
    print(f"Left half of a 3: loss reduced from {losses[0]:.2f} to {losses[-1]:.4f}")
    rows["Samples"] = decode(flow, noise, 100)
    rows["... of optimised noise"] = decode(flow, found, 100)

    figure, axes = plt.subplots(
        len(rows), 8, figsize=(8.5, 0.8 * len(rows)), layout="constrained"
    )
    for (name, row), line in zip(rows.items(), axes):
        for image, axis in zip(np.asarray(row), line):
            axis.imshow(image[..., 0], cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "latent_space.png"
    figure.savefig(path, dpi=100)
    print(f"Picture: {path}")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
