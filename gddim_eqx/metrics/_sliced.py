import numpy as np
from jaxtyping import Real

from .._misc import check_count
from ._moments import as_vectors, check_sizes


def sliced_wasserstein(
    a: Real[np.ndarray, "number size"],
    b: Real[np.ndarray, "other_number size"],
    num_directions: int = 256,
    seed: int = 0,
) -> float:
    """The sliced Wasserstein-2 distance between two sets of vectors: the root mean square
    over random directions of the distance along each, which is exact, for sets of different
    sizes too.

    **Arguments:**

    - `a`, `b`: vectors, at least one each.
    - `num_directions`: the number of random directions.
    - `seed`: the seed for the directions.

    **Raises:** `ValueError` for no vectors, or vectors of different sizes or not finite.

    ??? cite "Reference"

        Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015.
    """
    a, b = as_vectors("a", a), as_vectors("b", b)
    size = a.shape[1]
    check_sizes(size, b.shape[1])
    check_count("num_directions", num_directions)
    if not (len(a) and len(b)):
        raise ValueError(f"There must be vectors in both sets; got {len(a)} and {len(b)}.")
    directions = np.random.default_rng(seed).normal(size=(size, num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    # Both quantile functions are constant between these levels.
    levels = np.union1d(np.arange(len(a) + 1) * len(b), np.arange(len(b) + 1) * len(a))
    share = np.diff(levels) / (len(a) * len(b))
    total = 0.0
    # In parts, as all projections of many vectors may not fit in memory.
    for part in np.array_split(directions, -(-num_directions // 64), axis=1):
        sorted_a, sorted_b = (np.sort(x.astype(np.float64) @ part, axis=0) for x in (a, b))
        difference = sorted_a[levels[:-1] // len(b)] - sorted_b[levels[:-1] // len(a)]
        total += float((share @ difference**2).sum())
    return (total / num_directions) ** 0.5
