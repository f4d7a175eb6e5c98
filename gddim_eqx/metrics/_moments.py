import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real


class Moments(eqx.Module):
    """The number, mean and covariance of vectors, in double precision.

    The moments of parts can be added: `Moments.of(first) + Moments.of(second)`. The vectors
    themselves are not kept.
    """

    count: int
    mean: Float[np.ndarray, " size"]
    covariance: Float[np.ndarray, "size size"]
    """Normalised by one less than the number of vectors."""

    @classmethod
    def of(cls, vectors: Real[np.ndarray, "number size"]) -> "Moments":
        """**Arguments:**

        - `vectors`: any number of them, possibly none.

        **Raises:** `ValueError` for an array that does not have two axes, or values that
        are not finite.
        """
        vectors = as_vectors("vectors", vectors).astype(np.float64)
        count, size = vectors.shape
        if count == 0:
            return cls(0, np.zeros(size), np.zeros((size, size)))
        mean = vectors.mean(axis=0)
        vectors -= mean
        return cls(count, mean, vectors.T @ vectors / max(count - 1, 1))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both together (Chan, Golub and LeVeque 1979).

        **Raises:** `ValueError` for vectors of another size.
        """
        check_sizes(self.mean.size, other.mean.size)
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        share = other.count / count
        mean = self.mean + share * difference
        scatter = max(self.count - 1, 0) * self.covariance
        scatter += max(other.count - 1, 0) * other.covariance
        scatter += self.count * share * np.outer(difference, difference)
        return Moments(count, mean, scatter / max(count - 1, 1))


def as_vectors(name: str, vectors: Real[np.ndarray, "..."]) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.dtype.kind not in "fiub":
        # Dtypes that NumPy lacks, such as bfloat16.
        if not jnp.issubdtype(vectors.dtype, jnp.floating):
            raise ValueError(f"`{name}` must be real numbers; got {vectors.dtype}.")
        vectors = vectors.astype(np.float32)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(
            f"`{name}` must have shape (number, size); got {vectors.shape}. Reshape "
            "images to `(len(images), -1)`."
        )
    if not np.isfinite(vectors).all():
        number = int((~np.isfinite(vectors).all(axis=1)).sum())
        raise ValueError(f"{number} of {len(vectors)} `{name}` are not finite.")
    return vectors


def check_sizes(one: int, other: int) -> None:
    if one != other:
        raise ValueError(f"Vectors of size {one} cannot be compared with ones of {other}.")
