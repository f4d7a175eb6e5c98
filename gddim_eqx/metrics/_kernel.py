from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real

from .._misc import check_count
from ._moments import as_vectors, check_sizes


class KernelDistance(NamedTuple):
    """What [`gddim_eqx.metrics.kernel_distance`][] returns."""

    mean: float
    std: float
    """The standard deviation over the subsets."""


def kernel_distance(
    a: Real[np.ndarray, "number size"],
    b: Real[np.ndarray, "other_number size"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """The unbiased estimator of the squared maximum mean discrepancy with the kernel (x y /
    size + 1)^3, averaged over random subsets of two sets of vectors.

    With Inception features it is the KID.

    **Arguments:**

    - `a`, `b`: vectors.
    - `num_subsets`, `subset_size`: the number of subsets, and of vectors in each, at least
        2.
    - `seed`: the seed for the choice of subsets.

    **Returns:** [`gddim_eqx.metrics.KernelDistance`][]. The mean may be negative, as the
    estimator is unbiased.

    **Raises:** `ValueError` for fewer vectors than `subset_size`, or vectors of different
    sizes or not finite.

    ??? cite "Reference"

        Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    a, b = as_vectors("a", a), as_vectors("b", b)
    check_sizes(a.shape[1], b.shape[1])
    check_count("num_subsets", num_subsets)
    check_count("subset_size", subset_size)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"`subset_size` must be from 2 to the number of vectors, which is "
            f"{min(len(a), len(b))}; got {subset_size}."
        )
    random = np.random.default_rng(seed)

    def subset(vectors):
        chosen = random.choice(len(vectors), subset_size, replace=False)
        return vectors[chosen].astype(np.float64)

    values = [_discrepancy(subset(a), subset(b)) for _ in range(num_subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _discrepancy(
    a: Float[np.ndarray, "number size"], b: Float[np.ndarray, "number size"]
) -> float:
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    number = len(a)
    pairs = number * (number - 1)
    within = sum((k := kernel(x, x)).sum() - np.trace(k) for x in (a, b))
    return within / pairs - 2 * kernel(a, b).mean()
