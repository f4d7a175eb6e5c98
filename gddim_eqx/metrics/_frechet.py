import numpy as np
from jaxtyping import Float, Real

from ._moments import check_sizes, Moments


def frechet_distance(
    a: Moments | Real[np.ndarray, "number size"],
    b: Moments | Real[np.ndarray, "other_number size"],
) -> float:
    r"""The Frechet distance between normal distributions with the moments of two sets of
    vectors,

    $$|\mu_a - \mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b
        - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2}).$$

    With Inception features it is the FID.

    **Arguments:**

    - `a`, `b`: vectors, at least two each, or their [`gddim_eqx.metrics.Moments`][].

    **Returns:** a non-negative number. It grows as the number of vectors falls, so only
    compare distances for equal numbers of vectors.

    **Raises:** `ValueError` for too few vectors, or vectors of different sizes or not
    finite.

    ??? cite "Reference"

        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
        Nash Equilibrium", 2017.
    """
    a, b = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    check_sizes(a.mean.size, b.mean.size)
    for moments in (a, b):
        if moments.count < 2:
            raise ValueError(
                f"A covariance needs at least two vectors; got {moments.count}."
            )
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise ValueError("The moments are not finite.")
    # The trace of the square root is the sum of these singular values. They are accurate
    # for rank-deficient covariances, unlike square roots of the eigenvalues of a product.
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False)
    between_means = np.sum((a.mean - b.mean) ** 2)
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    distance = float(between_means + spread - 2 * overlap.sum())
    return max(distance, 0.0)


def _root(covariance: Float[np.ndarray, "size size"]) -> Float[np.ndarray, "size rank"]:
    """A matrix whose product with its transpose is the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    # As in `numpy.linalg.matrix_rank`: roots of rounding errors would add up.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
