import abc
import hashlib
import importlib.resources
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float, UInt8

from ..checkpoints import load
from ..nn import ImageClassifier


Images = UInt8[np.ndarray, "number height width channels"]


class AbstractFeatures(eqx.Module):
    """Feature vectors for comparing images: `features(images)`."""

    name: eqx.AbstractVar[str]
    """The name of the Frechet distance of these features."""
    key: eqx.AbstractVar[str]
    """Identifies the features: those that give other vectors have another key."""

    @abc.abstractmethod
    def __call__(self, images: Images) -> Float[np.ndarray, "number size"]:
        """**Arguments:**

        - `images`: any number of them, possibly none.
        """


class Pixels(AbstractFeatures):
    """The pixels themselves, in [-1, 1]. For images of up to about 32x32, as the size of
    covariances is quadratic in that of images."""

    name: str = eqx.field(default="Frechet distance of pixels", init=False)
    key: str = eqx.field(default="pixels", init=False)

    def __call__(self, images: Images) -> Float[np.ndarray, "number size"]:
        vectors = images.reshape(len(images), math.prod(images.shape[1:]))
        return vectors.astype(np.float32) / 127.5 - 1


class Classifier(AbstractFeatures):
    """The input of the last layer of a classifier.

    The included classifier was trained on Fashion-MNIST, with `examples/classifier.py`. Its
    distances are not comparable with FIDs from Inception.
    """

    name: str
    key: str
    classifier: ImageClassifier

    def __init__(
        self,
        classifier: ImageClassifier | None = None,
        name: str = "Fashion-MNIST FID",
    ):
        """**Arguments:**

        - `classifier`: by default the included one, for greyscale images of 28x28.
        - `name`: the name of the Frechet distance of its features.
        """
        if classifier is None:
            files = importlib.resources.files("gddim_eqx.metrics")
            with importlib.resources.as_file(files / "fashion_mnist.npz") as path:
                classifier = load(path)
        assert classifier is not None
        made = (classifier.shape, classifier.num_classes, classifier.features)
        digest = hashlib.sha256(repr(made).encode())
        for leaf in jtu.tree_leaves(eqx.filter(classifier, eqx.is_array)):
            digest.update(np.asarray(leaf).tobytes())
        self.classifier, self.name = classifier, name
        self.key = f"classifier {digest.hexdigest()}"

    def __call__(self, images: Images) -> Float[np.ndarray, "number size"]:
        parts = [np.zeros((0, self.classifier.features[-1]), np.float32)]
        size = 500
        for n in range(0, len(images), size):
            part = images[n : n + size]
            # Padded to one size, to compile once.
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
            parts.append(np.asarray(_embed(self.classifier, padded))[: len(part)])
        return np.concatenate(parts)


@eqx.filter_jit
def _embed(classifier, images):
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    # Distances must not depend on the device: GPUs and TPUs round factors by default.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(classifier.embed)(x)


class Inception(AbstractFeatures):
    """The 2048 features of InceptionV3 that define the FID in the literature, computed by
    torch-fidelity from a file of weights. Needs `pip install "gddim_eqx[fid]"`.

    With weights other than the published ones, the distance is not called FID.

    Images are resized to 299x299 as in TensorFlow 1, which is part of the definition; pass
    them at their original size.
    """

    name: str
    key: str
    network: Any = eqx.field(static=True)

    def __init__(self, weights: str | Path):
        """**Arguments:**

        - `weights`: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or
            `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, from the
            releases of github.com/mseitzer/pytorch-fid or github.com/toshas/torch-fidelity.

        **Raises:** `ValueError` for a file that is missing or holds something else.
        """
        weights = Path(weights)
        if not weights.is_file():
            raise ValueError(
                f"There are no weights in {weights}. Fetch "
                "pt_inception-2015-12-05-6726825d.pth from the releases of "
                "github.com/mseitzer/pytorch-fid."
            )
        try:
            import torch  # pyright: ignore[reportMissingImports]
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ImportError(
                'Inception features need `pip install "gddim_eqx[fid]"`.'
            ) from error
        try:
            # Refuses files with code, which torch-fidelity would execute.
            torch.load(weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
        except Exception as error:
            raise ValueError(
                f"{weights} does not hold the weights of InceptionV3: {error}"
            ) from error
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        # The names of the published files end with the beginning of their checksum.
        published = digest.startswith("6726825d")
        self.name = "FID" if published else "Frechet distance by Inception"
        self.key = f"inception {digest}"
        self.network = network.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, images: Images) -> Float[np.ndarray, "number size"]:
        import torch  # pyright: ignore[reportMissingImports]

        if images.shape[-1] != 3:
            raise ValueError(
                f"Inception is for images with three channels; got {images.shape}."
            )
        device = next(self.network.parameters()).device
        parts = [np.zeros((0, 2048), np.float32)]
        for n in range(0, len(images), 50):
            part = np.ascontiguousarray(images[n : n + 50].transpose(0, 3, 1, 2))
            (features,) = self.network(torch.from_numpy(part).to(device))
            parts.append(features.cpu().numpy())
        return np.concatenate(parts)
