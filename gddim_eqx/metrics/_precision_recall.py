from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Real

from .._misc import check_count
from ._moments import as_vectors, check_sizes


class PrecisionRecall(NamedTuple):
    """What [`gddim_eqx.metrics.precision_recall`][] returns."""

    precision: float
    """The fraction of samples that lie among the data."""
    recall: float
    """The fraction of data that lie among the samples."""


def precision_recall(
    samples: Real[np.ndarray, "number size"],
    data: Real[np.ndarray, "other_number size"],
    neighbours: int = 3,
) -> PrecisionRecall:
    """The fraction of samples that resemble data, and of data that samples cover.

    A vector lies among others if its distance from one of them is at most that one's
    distance from its k-th nearest neighbour among them.

    **Arguments:**

    - `samples`, `data`: vectors. The cost is proportional to the product of their numbers;
        10,000 of each are usual.
    - `neighbours`: k.

    **Raises:** `ValueError` unless there are more vectors than `neighbours`, or for vectors
    of different sizes or not finite.

    ??? cite "Reference"

        Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
        Models", 2019.
    """
    samples, data = as_vectors("samples", samples), as_vectors("data", data)
    check_sizes(samples.shape[1], data.shape[1])
    check_count("neighbours", neighbours)
    if neighbours >= min(len(samples), len(data)):
        raise ValueError(
            f"There must be more vectors than `neighbours={neighbours}`; got "
            f"{len(samples)} samples and {len(data)} data."
        )
    # Centred, as differences of large squares would lose digits.
    centre = data.mean(axis=0)
    dtype = np.result_type(samples, data, np.float32)
    samples, data = ((x - centre).astype(dtype) for x in (samples, data))
    precision = _among(samples, data, neighbours).mean()
    recall = _among(data, samples, neighbours).mean()
    return PrecisionRecall(float(precision), float(recall))


def _among(
    vectors: Real[np.ndarray, "number size"],
    others: Real[np.ndarray, "other_number size"],
    neighbours: int,
) -> Bool[np.ndarray, " number"]:
    # Each is its own nearest neighbour. Copies, as views would keep all distances alive.
    radius = lambda d: np.partition(d, neighbours)[:, neighbours].copy()
    radii = np.concatenate([radius(d) for d in _squares(others, others)])
    return np.concatenate([(d <= radii).any(axis=1) for d in _squares(vectors, others)])


def _squares(a, b):
    """Squared distances from some of `a` to all of `b`, part by part."""
    squares = (b**2).sum(axis=1)
    for part in np.array_split(a, -(-len(a) // 1000)):
        yield (part**2).sum(axis=1)[:, None] + squares - 2 * part @ b.T
