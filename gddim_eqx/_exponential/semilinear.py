r"""The coefficients of exponential integrators for $\dot u = A_t u + N(t, u)$.

Over a step from $s$ to $t$ of length $h$ the exact solution is

$$u_t = \Psi(t, s)\,u_s + \int_s^t \Psi(t, \tau)\,N(\tau)\,\mathrm{d}\tau.$$

If $N$ is replaced by a polynomial in $x = (\tau - s) / h$, the integral is a linear
combination of the moments

$$M_i = \int_s^t x^i\,\Psi(t, \tau)\,\mathrm{d}\tau = h\,i!\,\varphi_{i + 1}(h A)$$

where the second equality holds for constant $A$ (Hochbruck & Ostermann 2010).
"""

import functools as ft
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.scipy.linalg import expm
from jaxtyping import Array
from numpy.polynomial import legendre

from .._linear import append_axes
from .._term import LinearPart
from .coordinate import AbstractCoordinate, Time
from .quadrature import collocate, integrals_from_the_end
from .splitting import AbstractSplitting, StepCoefficients, zero_if_still


class SemilinearSplitting(AbstractSplitting):
    """Interpolates the nonlinear part of a [`gddim_eqx.Semilinear`][] equation, in time."""

    error_coordinate: ClassVar[AbstractCoordinate] = Time()

    def evaluate(self, term, t, y, args, root=None):
        return term.force(t, y, args)

    def is_too_long(self, c, span):
        # Past values cannot tell what changes long after them. Growth by a factor of 6 must
        # be allowed: a rejected step is retried at a fifth of its size, so with a lower
        # limit controllers could propose and reject the same step again and again.
        most = 6 * span / (len(c.error_moments) - 1)
        return (span > 0) & (jnp.abs(c.t - c.start) > most)

    def first_change(self, shape, c, y, value):
        return jtu.tree_map(jnp.abs, value)

    def faults(self, equation, c, s, stochastic):
        return []

    @eqx.filter_jit
    def integrate(
        self,
        equation: LinearPart,
        s: Array,
        t: Array,
        number: int,
        coordinate: AbstractCoordinate = Time(),
        number_for_error: int = 1,
        lam=None,
    ) -> StepCoefficients:
        most = max(number, number_for_error)
        if not equation.is_constant:
            linear, moments = _by_collocation(equation, s, t, most)
        elif equation.is_diagonal:
            linear, moments = _of_diagonal(equation(s).blocks, t - s, most)
        else:
            linear, moments = _of_blocks(equation(s).blocks, t - s, most)
        moments = zero_if_still(s, t, moments)
        moments, error_moments = moments[:number], moments[:number_for_error]
        return StepCoefficients(linear, moments, error_moments, None, t, s, t, s, t)


@ft.cache
def _gauss(number):
    nodes, weights = legendre.leggauss(number)
    return (nodes + 1) / 2, weights / 2


def _of_diagonal(blocks, h, number):
    """The transition and moments for a constant diagonal operator: by Gauss quadrature
    where it is not stiff, and by integration by parts elsewhere."""
    rows = np.eye(len(blocks), dtype=bool)
    diagonal = append_axes(jnp.asarray(rows), blocks.ndim)
    z = h * blocks[0, 0]
    mild = jnp.abs(z) < 4
    near, far = jnp.where(mild, z, 0), jnp.where(mild, 4, z)
    # Exact to rounding error on this interval.
    nodes, weights = (jnp.asarray(x, z.dtype) for x in _gauss(16))
    growth = jnp.exp(append_axes(1 - nodes, z.ndim + 1) * near[None])
    by_parts, moments = jnp.expm1(far) / far, []
    for i in range(number):
        by_quadrature = jnp.tensordot(weights * nodes**i, growth, 1, precision="highest")
        moments.append(h * jnp.where(mild, by_quadrature, by_parts))
        by_parts = ((i + 1) * by_parts - 1) / far
    spread = lambda x: jnp.where(diagonal, x[None, None], 0)
    return spread(jnp.exp(z)), jnp.stack([spread(x) for x in moments])


def _of_blocks(blocks, h, number):
    """The transition and moments for constant blocks, from the exponential of an augmented
    matrix (Sidje 1998)."""
    n = len(blocks)
    a = jnp.moveaxis(blocks, (0, 1), (-2, -1)) * h
    size = n * (1 + number)
    above = jnp.asarray(np.eye(size, k=n), a.dtype)
    matrix = jnp.broadcast_to(above, (*a.shape[:-2], size, size))
    matrix = matrix.at[..., :n, :n].set(a)
    top = expm(matrix, max_squarings=32)[..., :n, :]
    top = jnp.moveaxis(top.reshape(*a.shape[:-1], 1 + number, n), -2, 0)
    top = jnp.moveaxis(top, (-2, -1), (1, 2))
    factorials = np.array([math.factorial(i) for i in range(number)])
    scale = append_axes(jnp.asarray(factorials, a.dtype), top.ndim)
    return top[0], h * scale * top[1:]


@ft.cache
def _radau(number):
    """The nodes and weights of the left Radau rule on [0, 1], with a node at 0, and the
    matrix that maps values at the nodes to the integrals from each node to 1."""
    basis = np.eye(number + 1)
    # Complex since NumPy 2.5, though all are real.
    nodes = np.sort(legendre.legroots(basis[-1] + basis[-2]).real)
    nodes[0] = -1
    nodes = (nodes + 1) / 2
    matrix = -integrals_from_the_end(nodes)
    return nodes, matrix[0], matrix


def _by_collocation(equation, s, t, number):
    r"""The transition and moments for a time-dependent $A_t$: $\Psi(t, \tau)$ by Radau
    collocation from $t$ back to $s$. This is stable for any decay. For constant $A$, the
    error of the transition is the only error of the moments."""
    nodes, weights, integrals = _radau(16)
    h = t - s
    generators = jax.vmap(equation)(s + h * jnp.asarray(nodes, h.dtype)).blocks
    psi = collocate(h * jnp.asarray(integrals, h.dtype), generators)
    rules = jnp.stack([jnp.asarray(weights * nodes**i, h.dtype) for i in range(number)])
    return psi[0], h * jnp.tensordot(rules, psi, 1, precision="highest")
