import functools as ft
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact, Int
from numpy.polynomial import chebyshev


class PiecewisePolynomial:
    """A tabulated function of one real variable: a polynomial on each panel.

    Built once on the host in float64, and evaluated in the dtype of its argument. It is a
    compile-time constant rather than a pytree with leaves for an optimiser to update, and
    compares and hashes by identity.
    """

    def __init__(self, edges: np.ndarray, node_values: np.ndarray):
        """**Arguments:**

        - `edges`: the panels' edges, increasing, `(panels + 1,)`.
        - `node_values`: the function at `panel_nodes(degree)` of each panel, `(panels,
            degree + 1, *value)`.
        """
        self.edges = np.asarray(edges, np.float64)
        # Of Chebyshev polynomials.
        degree = node_values.shape[1] - 1
        self.coefficients = np.einsum("dn,pn...->pd...", to_chebyshev(degree), node_values)

    def panel(self, x: Inexact[Array, ""]) -> Int[Array, ""]:
        """The index of the panel that contains the argument; outside all panels, that of
        the nearest."""
        coarse, rest = _two_parts(self.edges[1:-1], x.dtype)
        return (_distance(x, jnp.asarray(coarse), jnp.asarray(rest)) >= 0).sum()

    def __call__(self, x: Inexact[Array, ""]) -> Inexact[Array, "*value"]:
        # Overflow gives a huge number rather than `nan`.
        largest = float(jnp.finfo(x.dtype).max) / 256
        coefficients = np.clip(self.coefficients, -largest, largest)
        # In one table, so that there is one lookup.
        edges = np.stack(_two_parts(self.edges, x.dtype), axis=-1)
        width = np.diff(self.edges)[:, None]
        columns = edges[:-1], edges[1:], width, coefficients.reshape(len(width), -1)
        table = jnp.asarray(np.concatenate(columns, axis=1), x.dtype)
        row = lax.dynamic_index_in_dim(table, self.panel(x), keepdims=False)
        u = (_distance(x, row[0], row[1]) + _distance(x, row[2], row[3])) / row[4]
        # The end time may round up, perhaps by more than the width of the last panel.
        u = u - lax.stop_gradient(u - jnp.clip(u, -1, 1))
        coefficients = row[5:].reshape(coefficients.shape[1:])
        # Clenshaw's recurrence.
        one, two = jnp.zeros_like(coefficients[0]), jnp.zeros_like(coefficients[0])
        for coefficient in coefficients[:0:-1]:
            one, two = 2 * u * one - two + coefficient, one
        return u * one - two + coefficients[0]


def _two_parts(edges: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Numbers rounded to a dtype, and the rounding errors."""
    rounded = edges.astype(dtype)
    return rounded, (edges - rounded.astype(np.float64)).astype(dtype)


def _distance(x, rounded, rest):
    """The signed distance from an edge to the argument, to the full precision of its
    dtype, as panels may be that narrow."""
    return (x - rounded) - rest


def panel_nodes(degree: int) -> np.ndarray:
    """Chebyshev nodes of the first kind on [-1, 1], increasing."""
    return -np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))


def nodes_of_panels(edges: np.ndarray, degree: int) -> np.ndarray:
    """The nodes of each panel, `(panels, degree + 1)`."""
    left, right = edges[:-1, None], edges[1:, None]
    return left + (right - left) * (1 + panel_nodes(degree)) / 2


@ft.cache
def integration_matrix(degree: int) -> np.ndarray:
    """The matrix from values at `panel_nodes(degree)` to the integrals from -1 to each
    of those nodes and, in its last row, to 1."""
    integrals = chebyshev.chebint(to_chebyshev(degree), lbnd=-1)
    ends = np.append(panel_nodes(degree), 1.0)
    return chebyshev.chebvander(ends, degree + 1) @ integrals


@ft.cache
def differentiation_matrix(degree: int) -> np.ndarray:
    """The matrix from values at `panel_nodes(degree)` to the derivatives there."""
    derivatives = chebyshev.chebder(to_chebyshev(degree))
    return chebyshev.chebvander(panel_nodes(degree), degree - 1) @ derivatives


@ft.cache
def to_chebyshev(degree: int) -> np.ndarray:
    """The matrix from values at `panel_nodes(degree)` to Chebyshev coefficients."""
    return np.linalg.inv(chebyshev.chebvander(panel_nodes(degree), degree))


def coarse_and_rest(value: float | np.ndarray) -> tuple[Any, Any]:
    """Split numbers into their leading twelve bits, whose pairwise products are exact in
    float32, and the rest."""
    mantissa, exponent = np.frexp(value)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    return coarse, value - coarse
