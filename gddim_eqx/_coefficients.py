r"""The coefficients of the exponential integrator, computed from the times of the step.

Over a step from $s$ to $t$ the probability flow is, exactly,

$$u_t = \Psi(t, s)\,u_s + \int_s^t \epsilon(\tau)\,\mathrm{d}_\tau
\left[\Psi(t, \tau) R_\tau\right].$$

With the noise prediction $\epsilon$ replaced by a polynomial in
$x = (\tau - s) / (t - s)$ through stored evaluations, all that is needed of the process
are the moments

$$M_i = \int_s^t x^i\,\mathrm{d}_\tau \left[\Psi(t, \tau) R_\tau\right]
= R_t - [i = 0]\,\Psi(t, s) R_s - \int_0^1 i\,x^{i-1}\,\Psi(t, \tau) R_\tau\,
\mathrm{d}x,$$

in which neither $G$ nor an inverse occurs and the integrand is bounded and smooth. (The
paper's equations 18 and 19 have the integrand $\frac{1}{2} \Psi G G^\top R^{-\top}$,
which is the same derivative.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact

from ._operator import append_axes
from ._process import AbstractProcess


NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def moments(
    process: AbstractProcess, s: Array, t: Array, number: int, factor: str = "R"
) -> Inexact[Array, "number n n *spectrum"]:
    r"""The blocks of the first moments of a step.

    **Arguments:**

    - `process`: the forward process.
    - `s`, `t`: where the step starts and ends. They may be equal.
    - `number`: how many moments.
    - `factor`: `"R"`; or `"cholesky"` for predictions of noise with respect to $L_t$. Then
        the integral is not of a total derivative, and is computed as it stands.

    **Returns:** the blocks of M_0, ..., M_{number - 1}.
    """
    if factor == "cholesky" and process.num_components > 1:
        return _cholesky_moments(process, s, t, number)

    @jax.vmap
    def carried(tau):
        return (process.transition(t, tau) @ process.factor(tau)).blocks

    if number == 1:
        first, last = carried(jnp.stack([s, t]))
        return (last - first)[None]
    x, weight = step_quadrature(process, s, t)
    values = carried(jnp.concatenate([s[None], s + (t - s) * x, t[None]]))
    powers = jnp.stack([weight * i * x ** (i - 1) for i in range(1, number)])
    powers = append_axes(powers, values.ndim + 1)
    higher = values[-1:] - (powers * values[None, 1:-1]).sum(1)
    return jnp.concatenate([values[-1:] - values[:1], higher])


def _cholesky_moments(process, s, t, number):
    @jax.vmap
    def integrand(tau):
        diffusion, inverse = process.diffusion(tau), process.cholesky(tau).inverse()
        return (
            0.5 * (process.transition(t, tau) @ diffusion @ diffusion.T @ inverse.T).blocks
        )

    x, weight = step_quadrature(process, s, t)
    values = integrand(jnp.where(s == t, process.t_min, s + (t - s) * x))
    powers = (t - s) * jnp.stack([weight * x**i for i in range(number)])
    return (append_axes(powers, values.ndim + 1) * values[None]).sum(1)


def step_quadrature(process, s, t):
    """Gauss-Legendre nodes and weights on x in [0, 1].

    They are uniform in z, where t / (1 - t / t_vanish) = t_min * (exp(z) - 1)^2. Noise
    grows like the square root of time at first, which is linear in z, and later changes
    with the logarithm of time, which is linear in z too; so does the signal's logarithm
    where the signal vanishes.
    """
    nodes, weights = jnp.asarray(NODES, s.dtype), jnp.asarray(WEIGHTS, s.dtype)

    def root(t):
        """exp(z) - 1"""
        return jnp.sqrt(t / (1 - t / process.t_vanish) / process.t_min)

    root_s, root_t = root(s), root(t)
    width = jnp.log1p((root_t - root_s) / (1 + root_s))
    still = (width == 0) | (root_t + root_s == 0)
    length = jnp.where(still, 1, jnp.expm1(width) * (root_t + root_s))
    growth = jnp.expm1(width * nodes)
    root_x = root_s + (1 + root_s) * growth
    # Differences of squares, in a form that does not cancel.
    y = growth * (root_x + root_s) / length
    dy = 2 * width * (1 + growth) * root_x / length
    # From fractions of t / (1 - t / t_vanish) to fractions of t.
    closeness = process.t_min / process.t_vanish
    at_s, at_x, at_t = (1 + closeness * r**2 for r in (root_s, root_x, root_t))
    # Rounding must not take a node past the end: there may be no process before time 0.
    x, dx = jnp.clip(y * at_t / at_x, 0, 1), dy * at_t * at_s / at_x**2
    return jnp.where(still, nodes, x), jnp.where(still, weights, weights * dx)


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
        distance = nodes - nodes[k]
        # Not by the distance alone: XLA may compute both sides differently.
        use = valid[k] & (np.arange(number) != k) & (distance != 0)
        distance = jnp.where(use, distance, 1)[:, None]
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
