import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._misc import check_count, check_instance, write_whole
from ._features import AbstractFeatures, Images
from ._moments import Moments


class Reference(NamedTuple):
    """What samples are compared with; see [`gddim_eqx.metrics.reference`][]."""

    moments: Moments
    """The moments of the features of all images."""
    vectors: Float[np.ndarray, "some size"]
    """The features of some images, in random order, for metrics that need individual
    vectors."""


def reference(
    images: Images,
    features: AbstractFeatures,
    directory: str | Path | None = None,
    number: int = 10_000,
) -> Reference:
    """The features of a data set.

    **Arguments:**

    - `images`: the data, or a part of it; at least one.
    - `features`: for example [`gddim_eqx.metrics.Inception`][].
    - `directory`: where to cache the result. The file name depends on the images, the
        features and `number`, so that no other result is read by mistake.
    - `number`: the maximum number of individual vectors to keep.

    **Returns:** [`gddim_eqx.metrics.Reference`][].

    **Raises:** `ValueError` if there are no images.
    """
    check_count("number", number)
    wanted = "features of images, such as `Pixels()`"
    check_instance("features", features, AbstractFeatures, wanted)
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            "`images` must have dtype uint8 and shape (number, height, width, channels); "
            f"got {images.dtype} of shape {images.shape}. See `gddim_eqx.to_uint8`."
        )
    if not len(images):
        raise ValueError("There must be images to compare with; got none.")
    if directory is None:
        return _compute(images, features, number)
    # The precision is that in which networks compute.
    depends_on = (features.key, images.shape, str(jnp.result_type(float)), number)
    digest = hashlib.sha256(repr(depends_on).encode())
    digest.update(np.ascontiguousarray(images).data)
    path = Path(directory) / f"reference-{digest.hexdigest()[:32]}.npz"
    if path.exists():
        try:
            with path.open("rb") as whole, np.load(whole) as file:
                moments = (file["count"].item(), file["mean"], file["covariance"])
                return Reference(Moments(*moments), file["vectors"])
        except Exception as error:  # NumPy raises many exceptions for damaged files.
            warnings.warn(f"{path} is damaged, and is computed again: {error}")
    found = _compute(images, features, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: Any = {"vectors": found.vectors, **vars(found.moments)}
    write_whole(path, lambda file: np.savez(file, **arrays))
    return found


def _compute(images: Images, features: AbstractFeatures, number: int) -> Reference:
    order = np.random.default_rng(0).permutation(len(images))
    moments, kept = None, []
    for n in range(0, len(images), 1000):
        part = features(images[order[n : n + 1000]])
        moments = Moments.of(part) if moments is None else moments + Moments.of(part)
        kept.append(part[: max(number - n, 0)])
    assert moments is not None
    return Reference(moments, np.concatenate(kept))
