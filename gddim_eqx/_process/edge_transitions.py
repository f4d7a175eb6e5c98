import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Int

from .._linear import matmul


_BITS = 3


class EdgeTransitions:
    """The transitions between any two panel edges, from those across single panels.

    The table has, for every edge and in both directions, those across 0 to 7 panels, 0 to
    7 times 8 panels, and so on. Any other is a product of a few of these, all in the same
    direction: nothing underflows before it is inverted, and nothing cancels.
    """

    # (2 directions, levels, edges, 8, n, n, *spectrum). Those back in time are transposed.
    table: np.ndarray

    def __init__(self, steps: np.ndarray):
        """**Arguments:**

        - `steps`: the transitions across single panels, forward in time, `(panels,
            *spectrum, n, n)`.
        """
        back = np.swapaxes(np.linalg.inv(steps), -1, -2)
        table = np.stack([_levels(steps), _levels(back)])
        self.table = np.moveaxis(table, (-2, -1), (4, 5))

    def __call__(
        self, i: Int[Array, ""], j: Int[Array, ""], dtype
    ) -> Inexact[Array, "n n *spectrum"]:
        """The blocks of the transition from edge `j` to edge `i`. Overflow saturates at
        the largest number of the dtype."""
        largest = float(jnp.finfo(dtype).max)
        table = jnp.asarray(np.clip(self.table, -largest, largest).astype(dtype))
        table = table[(i < j).astype(i.dtype)]
        edge, number = jnp.minimum(i, j), jnp.abs(i - j)
        result = None
        for level in range(len(table)):
            digit = (number >> (_BITS * level)) % 2**_BITS
            factor = table[level, edge, digit]
            result = factor if result is None else saturated_product(factor, result)
            edge = edge + (digit << (_BITS * level))
        assert result is not None
        return jnp.where(i < j, jnp.swapaxes(result, 0, 1), result)


def saturated_product(a: Array, b: Array) -> Array:
    """The product of two blocks, with overflow saturated at the largest number: infinity
    times zero, or minus infinity, would be `nan`."""
    largest = float(jnp.finfo(a.dtype).max)
    value = jnp.clip(matmul(a, b), -largest, largest)
    small = 0.1 * largest**-0.5
    overflown = largest * jnp.sign(matmul(small * a, small * b))
    return jnp.where(jnp.isnan(value), overflown, value)


def _levels(steps: np.ndarray) -> np.ndarray:
    """`(levels, edges, 8, *spectrum, n, n)`: the products of 0 to 7 steps, 0 to 7 times 8
    steps, and so on, starting from every edge."""
    eye = np.broadcast_to(np.eye(steps.shape[-1]), (1, *steps.shape[1:]))
    units, stride, levels = np.concatenate([steps, eye]), 1, []
    largest = np.finfo(np.float64).max

    def after(some, number):
        """Products, each followed by the unit `number` strides ahead."""
        skipped = min(number * stride, len(units))
        ahead = [units[skipped:], np.repeat(eye, skipped, 0)]
        return np.clip(np.concatenate(ahead) @ some, -largest, largest)

    while stride < len(units) or not levels:
        products = [np.repeat(eye, len(units), 0)]
        for number in range(2**_BITS):
            products.append(after(products[-1], number))
        levels.append(np.stack(products[:-1], 1))
        units, stride = products[-1], stride * 2**_BITS
    return np.stack(levels)
