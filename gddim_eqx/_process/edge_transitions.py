import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._linear import matmul


def edge_transitions(steps: np.ndarray) -> np.ndarray:
    """The transitions between any two panel edges, from those across single panels.

    Each is a product in one direction only: nothing underflows before it is inverted, and
    nothing cancels. Overflow saturates at the largest number.

    **Arguments:**

    - `steps`: the transitions across single panels, forward in time, `(panels, *spectrum,
        n, n)`.

    **Returns:** those from every second edge to every first, `(edges, edges, n, n,
    *spectrum)`.
    """
    edges, largest = len(steps) + 1, np.finfo(np.float64).max
    table = np.empty((edges, edges, *steps.shape[1:]))
    table[np.diag_indices(edges)] = np.eye(steps.shape[-1])
    for i, (step, back) in enumerate(zip(steps, np.linalg.inv(steps))):
        before = slice(i + 1)
        table[i + 1, before] = np.clip(step @ table[i, before], -largest, largest)
        table[before, i + 1] = np.clip(table[before, i] @ back, -largest, largest)
    return np.moveaxis(table, (-2, -1), (2, 3))


def saturated_product(a: Array, b: Array) -> Array:
    """The product of two blocks, with overflow saturated at the largest number: infinity
    times zero, or minus infinity, would be `nan`."""
    largest = float(jnp.finfo(a.dtype).max)
    value = jnp.clip(matmul(a, b), -largest, largest)
    small = 0.1 * largest**-0.5
    overflown = largest * jnp.sign(matmul(small * a, small * b))
    return jnp.where(jnp.isnan(value), overflown, value)
