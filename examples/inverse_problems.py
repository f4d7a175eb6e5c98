"""Inpainting and deblurring of clothes, by models that were trained for neither.

The included Fashion-MNIST models, under VP, CLD and BDM, are conditioned on measurements
of test images by `posterior_guidance`, without training or a special sampler. The same code
serves critically-damped Langevin diffusion, whose states have a velocity, and blurring
diffusion, whose states are cosine coefficients.

Prints the error of single samples and of their means, and draws
`docs/inverse_problems.png`. Takes five minutes on two CPU cores, and needs Debian's package
`dataset-fashion-mnist`; without it, `--drawn` takes images drawn by the VP model.
"""

import argparse
import os
from pathlib import Path

import data as data_sets
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
from jaxtyping import Array, Float

import gddim_eqx as gd


matplotlib.use("agg")  # Draws to files, without a display.

import matplotlib.pyplot as plt


Images = Float[Array, "*batch 28 28 1"]

# A Gaussian blur along one axis, with a standard deviation of 1.5 pixels.
_distance = np.subtract.outer(np.arange(28), np.arange(28))
_blur = np.exp(-0.5 * (_distance / 1.5) ** 2)
_blur = jnp.asarray(_blur / _blur.sum(1, keepdims=True), jnp.float32)


def left_half(x: Images) -> Float[Array, "*batch 28 14 1"]:
    return x[..., :14, :]


def blurred(x: Images) -> Images:
    return jnp.einsum("ik,jl,...klc->...ijc", _blur, _blur, x)


problems = {"inpainting": left_half, "deblurring": blurred}
noise = 0.05  # The standard deviation of the measurement noise.


def restore(flow, measurement, y, number: int, num_steps: int) -> Float[Array, "..."]:
    """For each measurement, so many samples: `(number, images, 28, 28, 1)`."""
    repeated = jnp.tile(y, (number, 1, 1, 1))
    guided = gd.posterior_guidance(flow, repeated, measurement, noise)
    x, _ = gd.sample(guided, jr.key(1), len(repeated), num_steps, denoise="exact")
    return x.reshape(number, len(y), *x.shape[1:])


def test_images(number: int, drawn: bool) -> Float[Array, "number 28 28 1"]:
    if drawn:
        flow = gd.checkpoints.pretrained("fashion-mnist-vp")
        return gd.sample(flow, jr.key(2), number, 20).x
    images = data_sets.fashion_mnist(train=False)[:number]
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def show(known: Float[Array, "..."]) -> np.ndarray:
    """Pad a measurement to the size of images."""
    missing = 28 - known.shape[-2]
    return np.pad(known, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--drawn", action="store_true", help="images drawn by a model")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parents[1] / "docs",
        help="the directory to save the picture in",
    )
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments = parser.parse_args()
    count, number, num_steps = (2, 1, 5) if arguments.quick else (16, 8, 50)
    truth = test_images(count, arguments.drawn or arguments.quick)
    chosen, flows = (
        problems,
        {
            "VP": gd.checkpoints.pretrained("fashion-mnist-vp"),
            "CLD": gd.checkpoints.pretrained("fashion-mnist-cld"),
            "BDM": gd.checkpoints.pretrained("fashion-mnist-bdm"),
        },
    )
    if arguments.quick:
        chosen, flows = {"inpainting": left_half}, {"CLD": flows["CLD"]}

    def error(x) -> float:
        """In grey levels, from 0 to 255."""
        return 127.5 * float(jnp.sqrt(jnp.mean((x - truth) ** 2)))

    def report(name: str, problem: str, x) -> None:
        print(f"{name:4} {problem:19} {error(x):6.1f} {error(x.mean(0)):6.1f}", flush=True)

    print(f"RMS error in grey levels: of a sample, and of the mean of {number}")
    for name, flow in flows.items():
        x = gd.sample(flow, jr.key(1), number * count, num_steps, denoise="exact").x
        report(name, "without measurement", x.reshape(number, *truth.shape))
    rows = {"image": np.asarray(truth)}
    for problem, measurement in chosen.items():
        exact = measurement(truth)
        y = exact + noise * jr.normal(jr.key(0), exact.shape)
        rows[f"for {problem}"] = show(y)
        for name, flow in flows.items():
            x = restore(flow, measurement, y, number, num_steps)
            report(name, problem, x)
            rows[f"{name}, {problem}"] = np.asarray(x[0])

    shown = min(count, 8)
    figure, axes = plt.subplots(
        len(rows), shown, figsize=(2 + shown, len(rows)), layout="constrained"
    )
    for (name, row), line in zip(rows.items(), axes):
        for image, axis in zip(row, line):
            axis.imshow(image[..., 0], cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[], facecolor="tab:red")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "inverse_problems.png"
    figure.savefig(path, dpi=70)
    print(f"Samples: {path}")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
