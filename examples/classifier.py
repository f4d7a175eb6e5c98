"""Train the classifier whose features define the Fashion-MNIST FID.

    python examples/classifier.py

Takes five minutes on two CPU cores. Writes `gddim_eqx/metrics/fashion_mnist.npz`, which
`gddim_eqx.metrics.Classifier` reads.
"""

import argparse
import os
from pathlib import Path

import data as data_sets
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

import gddim_eqx as gd


Images = UInt8[Array, "batch 28 28 1"]
Labels = Int[Array, " batch"]


def logits(classifier: gd.nn.ImageClassifier, images: Images) -> Float[Array, "batch 10"]:
    return jax.vmap(classifier)(images.astype(jnp.float32) / 127.5 - 1)


def train(images: np.ndarray, labels: np.ndarray, num_steps: int, batch_size: int = 128):
    network_key, key = jr.split(jr.key(0))
    classifier = gd.nn.ImageClassifier((28, 28, 1), 10, key=network_key)
    optimiser = optax.adamw(optax.cosine_decay_schedule(2e-3, num_steps))

    @eqx.filter_jit
    def make_step(classifier, state, images, labels, key):
        # Data augmentation: the labels are invariant to small translations.
        shift = jr.randint(key, (2,), -2, 3)
        images = jnp.roll(images, shift, axis=(1, 2))

        def loss(classifier):
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits(classifier, images), labels).mean()

        value, gradient = eqx.filter_value_and_grad(loss)(classifier)
        parameters = eqx.filter(classifier, eqx.is_inexact_array)
        updates, state = optimiser.update(gradient, state, parameters)
        return eqx.apply_updates(classifier, updates), state, value

    state = optimiser.init(eqx.filter(classifier, eqx.is_inexact_array))
    random = np.random.default_rng(0)
    progress = tqdm(range(num_steps), desc="Training", unit=" steps", mininterval=1)
    for step in progress:
        batch = random.integers(len(images), size=batch_size)
        x, y = images[batch], labels[batch].astype(np.int32)
        classifier, state, value = make_step(classifier, state, x, y, jr.fold_in(key, step))
        if step % 100 == 0:
            progress.set_postfix(loss=f"{value:.3f}", refresh=False)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    package = Path(gd.metrics.__file__).parent
    parser.add_argument("--output", type=Path, default=package / "fashion_mnist.npz")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    classifier = train(
        data_sets.fashion_mnist(),
        data_sets.fashion_mnist_labels(),
        arguments.steps,
    )
    gd.checkpoints.save(arguments.output, classifier)
    found = [
        np.asarray(
            jnp.argmax(eqx.filter_jit(logits)(classifier, jnp.asarray(part)), axis=1)
        )
        for part in np.array_split(data_sets.fashion_mnist(train=False), 20)
    ]
    right = np.concatenate(found) == data_sets.fashion_mnist_labels(train=False)
    print(f"Test accuracy: {right.mean():.2%}. Classifier: {arguments.output}")


if __name__ == "__main__":
    # Programs that were compiled before are read from a file.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
    main()
