import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact

from gddim_eqx._linear import append_axes


def lagrange(
    nodes: Inexact[Array, " nodes"], valid: Bool[Array, " nodes"]
) -> Inexact[Array, "nodes nodes"]:
    """The Lagrange basis polynomials through the valid ones of some nodes.

    **Arguments:**

    - `nodes`: distinct abscissae, as far as they are valid.
    - `valid`: which of them to use.

    **Returns:** in row `j` the coefficients, lowest power first, of the polynomial of
    node `j`; zero if that is not valid.
    """
    number = nodes.shape[0]
    coefficients = jnp.zeros((number, number), nodes.dtype)
    coefficients = coefficients.at[:, 0].set(jnp.where(valid, 1, 0))
    for k in range(number):
        use = valid & valid[k] & (np.arange(number) != k)
        distance = jnp.where(use, nodes - nodes[k], 1)[:, None]
        shifted = jnp.pad(coefficients[:, :-1], ((0, 0), (1, 0)))
        product = (shifted - nodes[k] * coefficients) / distance
        coefficients = jnp.where(use[:, None], product, coefficients)
    return coefficients


def weights(
    polynomials: Inexact[Array, "nodes number"],
    moments: Inexact[Array, "number n n *spectrum"],
) -> Inexact[Array, "nodes n n *spectrum"]:
    """The integrals of polynomials given by their coefficients, from the moments."""
    return (append_axes(polynomials, moments.ndim + 1) * moments[None]).sum(1)
