import jax.numpy as jnp
import numpy as np


NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def times_at(process, s, t, fraction):
    """The times at fractions of a step; but none at time 0, to which rounding may take a
    node, where without noise there is no inverse."""
    tau = s + (t - s) * fraction
    return jnp.where(tau > 0, tau, 1e-6 * process.t_min)


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
