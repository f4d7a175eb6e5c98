from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact

from .._custom_types import Key
from .._misc import check_count, show
from ._layers import as_image_shape


class ImageClassifier(eqx.Module):
    """A small convolutional classifier, called as `classifier(x)` on one image.

    Each stage halves the resolution by a strided convolution, and convolves once more. The
    last layer acts on the means over the image, which are good features for comparing sets
    of images.
    """

    convolutions: tuple[eqx.nn.Conv2d, ...]
    normalisations: tuple[eqx.nn.GroupNorm, ...]
    last: eqx.nn.Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    features: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        key: Key,
        features: Sequence[int] = (32, 64, 64),
    ):
        """**Arguments:**

        - `shape`: the shape of one image, `(height, width, channels)`.
        - `num_classes`: the number of classes.
        - `features`: the number of channels after each halving, multiples of 8.
        - `key`: a random key, for the initial parameters.

        **Raises:** `ValueError` for invalid numbers.
        """
        self.shape, self.num_classes = as_image_shape(shape), num_classes
        self.features = tuple(features)
        check_count("num_classes", num_classes)
        if not self.features or any(n < 8 or n % 8 for n in self.features):
            raise ValueError(
                f"`features` must be multiples of 8; got {show(self.features)}."
            )
        *keys, last = jr.split(key, 2 * len(self.features) + 1)
        sizes = [self.shape[-1], *(n for n in self.features for _ in range(2))]
        self.convolutions = tuple(
            eqx.nn.Conv2d(size, out_size, 3, stride, padding=1, key=key)
            for size, out_size, stride, key in zip(
                sizes, sizes[1:], (2, 1) * len(keys), keys
            )
        )
        self.normalisations = tuple(eqx.nn.GroupNorm(8, n) for n in sizes[1:])
        self.last = eqx.nn.Linear(self.features[-1], num_classes, key=last)

    def embed(
        self, x: Inexact[Array, "height width channels"]
    ) -> Float[Array, " features"]:
        """The input of the last layer.

        **Arguments:**

        - `x`: an image in [-1, 1].

        **Raises:** `ValueError` for an image of another shape.
        """
        if x.shape != self.shape:
            hint = " For a batch, use `jax.vmap`." if x.ndim > len(self.shape) else ""
            raise ValueError(
                f"This classifier is for images of shape {self.shape}; got {x.shape}.{hint}"
            )
        h = jnp.moveaxis(x, -1, 0)
        for convolve, normalise in zip(self.convolutions, self.normalisations):
            h = jax.nn.relu(normalise(convolve(h)))
        return h.mean(axis=(1, 2))

    def __call__(
        self, x: Inexact[Array, "height width channels"]
    ) -> Float[Array, " num_classes"]:
        """The logits of the classes; see `embed` for the arguments."""
        return self.last(self.embed(x))
