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
    zero, one = jnp.zeros_like(nodes), jnp.ones_like(nodes)
    # Vectors over the nodes, one per power, and a single division: XLA compiles this faster
    # than matrices and separate divisions.
    numerators, denominator = [one, *[zero] * (number - 1)], one
    index = np.arange(number).reshape(*[1] * (nodes.ndim - 1), number)
    for k in range(number):
        node = nodes[..., k, None]
        use = valid & valid[..., k, None] & (index != k)
        denominator = jnp.where(use, denominator * (nodes - node), denominator)
        lower = [zero, *numerators[:-1]]
        numerators = [
            jnp.where(use, below - node * c, c) for below, c in zip(lower, numerators)
        ]
    scale = jnp.where(valid, 1 / denominator, 0)
    return scale[..., None] * jnp.stack(numerators, axis=-1)


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
    return combine(shape, list(zip(weights(polynomials, moments), values, strict=True)))
