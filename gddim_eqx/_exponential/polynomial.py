import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact

from .._custom_types import State
from .._linear import append_axes, combine


def lagrange(
    nodes: Inexact[Array, "*cases nodes"], valid: Bool[Array, "*cases nodes"]
) -> Inexact[Array, "*cases nodes nodes"]:
    """The Lagrange basis polynomials on the valid nodes.

    **Arguments:**

    - `nodes`: abscissae; the valid ones must be distinct.
    - `valid`: which of them to use.

    **Returns:** in row `j` the coefficients, lowest power first, of the polynomial of
    node `j`; zero if the node is not valid.
    """
    number = nodes.shape[-1]
    others = valid[..., :, None] & valid[..., None, :]
    others &= ~np.broadcast_to(np.eye(number, dtype=bool), others.shape)
    gaps = jnp.where(others, nodes[..., :, None] - nodes[..., None, :], 1)
    # A single division. Products of gaps could overflow.
    slopes = jnp.where(others, 1 / gaps, 0)
    intercepts = jnp.where(others, -slopes * nodes[..., None, :], 1)
    # Vectors over the nodes, one per power: XLA compiles this faster than matrices.
    coefficients = [valid.astype(nodes.dtype)]
    for k in range(number):
        slope, intercept = slopes[..., k], intercepts[..., k]
        lower = [slope * c for c in coefficients]
        same = [intercept * c for c in coefficients]
        sums = [a + b for a, b in zip(lower, same[1:])]
        coefficients = [same[0], *sums, lower[-1]]
    # The degree is lower than `number`, as a node's own factor is one.
    return jnp.stack(coefficients[:number], axis=-1)


def weights(
    polynomials: Inexact[Array, "nodes number"],
    moments: Inexact[Array, "number n n *spectrum"],
) -> Inexact[Array, "nodes n n *spectrum"]:
    """The integrals of polynomials, from their coefficients and the moments."""
    return (append_axes(polynomials, moments.ndim + 1) * moments[None]).sum(1)


def integral(
    shape: tuple[int, ...],
    polynomials: Inexact[Array, "nodes number"],
    moments: Inexact[Array, "number n n *spectrum"],
    values: list[State],
) -> State:
    """The integral of the interpolation polynomial of the values."""
    return weighted_sum(shape, weights(polynomials, moments), values)


def weighted_sum(
    shape: tuple[int, ...], blocks: Inexact[Array, "nodes n n *_"], values: list[State]
) -> State:
    """The sum over the nodes of operators, given by their blocks, applied to values."""
    # Not one array of values: XLA's CPU compiler does not parallelise sums over short axes.
    return combine(shape, list(zip(blocks, values, strict=True)))
