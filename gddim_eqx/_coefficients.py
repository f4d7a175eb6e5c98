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

from ._process import AbstractProcess


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def moments(
    process: AbstractProcess, s: Array, t: Array, number: int
) -> Inexact[Array, "number n n *spectrum"]:
    """The blocks of the first moments of a step.

    **Arguments:**

    - `process`: the forward process.
    - `s`, `t`: where the step starts and ends. They may be equal.
    - `number`: how many moments.

    **Returns:** the blocks of M_0, ..., M_{number - 1}.
    """
    at_start = (process.transition(t, s) @ process.factor(s)).blocks
    at_end, at_start = _same_rank(process.factor(t).blocks, at_start)
    first = at_end - at_start
    if number == 1:
        return first[None]

    x, weight = _step_quadrature(process, s, t)

    def integrand(x):
        tau = s + (t - s) * x
        return (process.transition(t, tau) @ process.factor(tau)).blocks

    values = jax.vmap(integrand)(x)
    rule = jnp.stack([weight * i * x ** (i - 1) for i in range(1, number)])
    rule = rule.reshape(*rule.shape, *[1] * (values.ndim - 1))
    higher = at_end[None] - (rule * values[None]).sum(1)
    return jnp.concatenate([first[None], higher])


def _same_rank(a, b):
    rank = max(a.ndim, b.ndim)
    a, b = (jnp.expand_dims(y, tuple(range(y.ndim, rank))) for y in (a, b))
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    return jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)


def _step_quadrature(process, s, t):
    """Gauss-Legendre nodes and weights on x in [0, 1].

    They are uniform in z, where t / (1 - t / t_vanish) = t_min * sinh(z)^2. Noise grows
    like the square root of time at first, which is linear in z, and later changes with
    the logarithm of time, which is linear in z too; so does the signal's logarithm where
    the signal vanishes.
    """
    dtype = s.dtype
    nodes, weights = jnp.asarray(_NODES, dtype), jnp.asarray(_WEIGHTS, dtype)
    closeness = process.t_min / process.t_vanish

    def to_z(t):
        ratio = t / (1 - t / process.t_vanish)
        return jnp.arcsinh(jnp.sqrt(ratio / process.t_min))

    z_s, z_t = to_z(s), to_z(t)
    width = z_t - z_s
    z = z_s + width * nodes
    # sinh(a)^2 - sinh(b)^2 = sinh(a - b) sinh(a + b), which does not cancel.
    length = jnp.sinh(width) * jnp.sinh(z_s + z_t)
    still = length == 0
    length = jnp.where(still, 1, length)
    y = jnp.sinh(width * nodes) * jnp.sinh(z_s + z) / length
    dy = width * jnp.sinh(2 * z) / length
    at_end, here, at_start = (
        1 + closeness * jnp.sinh(r) ** 2 for r in (z_t, z, z_s)
    )
    # From fractions of the ratio to fractions of the time.
    x, dx = y * at_end / here, dy * at_end * at_start / here**2
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
        use = valid[k] & (distance != 0)
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
    rank = moments.ndim - 1
    polynomials = polynomials.reshape(*polynomials.shape, *[1] * rank)
    return (polynomials * moments[None]).sum(1)

