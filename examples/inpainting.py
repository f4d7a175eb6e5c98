"""Inpainting: fill in the missing half of handwritten digits, by wrapping the model.

The model is exact, for a mixture of Gaussians around 1,500 of scikit-learn's digits; a
network could take its place. Two wrappers condition it on the known pixels, without
training or a special sampler: `DataGuidance` overwrites them in every data prediction, and
`ClassifierGuidance` steers the other pixels to where the model's own prediction agrees with
the known ones. The same code serves critically-damped Langevin diffusion, whose states have
a velocity, and blurring diffusion, whose states are cosine coefficients.

The digits to fill in are not among the 1,500. As the mixture's conditional distribution is
known, a table compares the samples with its exact mean. Draws `docs/inpainting.png`. Takes
one minute on two CPU cores.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from sklearn.datasets import load_digits

import gddim_eqx as gd
from gddim_eqx import AbstractProcess


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


Image = Float[Array, "8 8 1"]


def inpaint(
    process: AbstractProcess,
    mixture: gd.GaussianMixture,
    known: Image,
    mask: Bool[Array, "8 8 1"],
    key: PRNGKeyArray,
    number: int,
    num_steps: int,
    guidance: float,
) -> Float[Array, "number 8 8 1"]:
    """Samples that have the known pixels wherever the mask is true."""
    model = mixture.model(process)
    flow = gd.ProbabilityFlow(process, model)

    def log_likelihood(t, u, args):
        """An approximate log likelihood of the known pixels, given a noisy state."""
        x = process.decode(flow.denoised(t, process.from_data(u), args))
        # The variance of a pixel given the state: at first that of the data, and in the end
        # that of the remaining noise.
        variance = 1 / (1 / 0.5 + jnp.exp(2 * process.log_snr(t)))
        square = jnp.where(mask, (x - known) ** 2, 0).sum(axis=(-3, -2, -1))
        return -0.5 * square / variance

    guided = gd.ClassifierGuidance(process, model, log_likelihood, guidance)
    guided = gd.DataGuidance(process, guided, lambda t, x, args: jnp.where(mask, known, x))
    noise = process.prior(key, (number,))
    return gd.generate(gd.ProbabilityFlow(process, guided), noise, num_steps)


def conditional_mean(
    mixture: gd.GaussianMixture, known: Image, mask: Bool[Array, "8 8 1"]
) -> Image:
    """The exact mean of all pixels given the known ones."""
    square = jnp.where(mask, (mixture.means - known) ** 2, 0).sum(axis=(1, 2, 3))
    weights = jax.nn.softmax(-0.5 * square / mixture.scale**2)
    return jnp.einsum("k,kijc->ijc", weights, mixture.means)


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
    digits, number, num_steps = (2, 4, 10) if arguments.quick else (8, 64, 50)

    pixels, _ = load_digits(return_X_y=True)
    images = jnp.asarray(pixels.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    mixture, others = gd.GaussianMixture(images[:1500], 0.4), images[1500 : 1500 + digits]
    mask = jnp.zeros((8, 8, 1), bool).at[:, :4].set(True)  # The left half is known.

    processes = {"CLD": gd.CLD((8, 8, 1)), "BDM": gd.BDM((8, 8, 1), sigma_blur_max=3.0)}
    ways = {"with guidance": 1.0, "replacement only": 0.0}
    exact = jax.vmap(lambda x: conditional_mean(mixture, x, mask))(others)
    rows = {
        "Digit": others,
        "Known": jnp.where(mask, others, jnp.nan),
        "Exact mean": exact,
    }
    mean = jnp.broadcast_to(images[:1500].mean(axis=0), exact.shape)

    def distance(samples_mean):
        """The RMS distance to the exact mean, over the missing pixels."""
        square = jnp.where(mask, 0, (samples_mean - exact) ** 2)
        return float(jnp.sqrt(square.sum() / (~mask).sum() / len(exact)))

    print(f"Distance from the mean of {number} samples to the exact conditional mean")
    print(f"{'mean of all digits':30} {distance(mean):.3f}")
    for name, process in processes.items():
        for way, scale in ways.items():

            @eqx.filter_jit
            def run(known, process=process, scale=scale):
                key = jax.random.key(0)
                return inpaint(process, mixture, known, mask, key, number, num_steps, scale)

            samples = jnp.stack([run(known) for known in others])
            print(f"{name + ', ' + way:30} {distance(samples.mean(axis=1)):.3f}")
            if scale:
                for k in range(2):
                    rows[f"{name}, sample {k + 1}"] = samples[:, k]
                rows[f"{name}, mean"] = samples.mean(axis=1)

    figure, axes = plt.subplots(
        len(rows), digits, figsize=(2 + 0.8 * digits, 0.8 * len(rows)), layout="constrained"
    )
    for (name, row), line in zip(rows.items(), axes):
        for image, axis in zip(np.asarray(row), line):
            axis.imshow(image[..., 0], cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[], facecolor="tab:red")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "inpainting.png"
    figure.savefig(path, dpi=100)
    print(f"Samples: {path}")


if __name__ == "__main__":
    main()
