from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Real

from .._linear import append_axes, BlockLinearOperator
from .._process import AbstractProcess, log_norm


NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


class StepNodes(NamedTuple):
    """Everything that integrals over a step from `s` to `t` need of a process, at the
    start, at the quadrature nodes, and at the end."""

    process: AbstractProcess
    # Start, nodes, end.
    times: Real[Array, " times"]
    # Of the nodes: (tau - s) / (t - s), and the quadrature weights of integrals over it.
    fractions: Real[Array, " nodes"]
    weights: Real[Array, " nodes"]
    # R_tau and Psi(tau, 0).
    roots: Inexact[Array, "times n n *spectrum"]
    signals: Inexact[Array, "times n n *spectrum"]
    # R_tau^-1, except at the end, where there may be none.
    inverses: Inexact[Array, "times-1 n n *spectrum"]
    # R_tau^-1 G_tau at the nodes.
    whitened: Inexact[Array, "nodes n n *spectrum"]

    def log_snr(self) -> tuple[Inexact[Array, " times"], Inexact[Array, " nodes"]]:
        """`process.log_snr` at all times, and its derivative at the nodes."""
        end = self.roots[-1]
        # Without noise at the end it is infinite there; a large number serves.
        noiseless = (end[0] == 0).all()
        eye = append_axes(jnp.eye(len(end), dtype=end.dtype), end.ndim)
        last = self._operator(jnp.where(noiseless, eye, end)).inverse().blocks
        inverses = jnp.concatenate([self.inverses, last[None]])

        def whitened_data(inverse, signal):
            return (self._operator(inverse) @ self._operator(signal)).blocks[:, 0]

        logs, units = jax.vmap(log_norm)(jax.vmap(whitened_data)(inverses, self.signals))
        values = logs.mean(tuple(range(1, logs.ndim)))
        values = values.at[-1].set(jnp.where(noiseless, 1e4, values[-1]))
        # The derivative of a^T Sigma^-1 a is -|G^T Sigma^-1 a|^2.
        along = jax.vmap(lambda w, unit: (w * unit[:, None]).sum(0))
        rates = (along(self.whitened, units[1:-1]) ** 2).sum(1)
        return values, -0.5 * rates.mean(tuple(range(1, rates.ndim)))

    def _operator(self, blocks) -> BlockLinearOperator:
        return BlockLinearOperator(blocks, self.process.shape)


def step_nodes(process: AbstractProcess, s: Array, t: Array) -> StepNodes:
    """Evaluate a process at the quadrature nodes of a step, and at its ends."""
    fractions, weights = _step_quadrature(process, s, t)
    tau = s + (t - s) * fractions
    # Rounding may take a node to time 0, where without noise there is no inverse.
    tau = jnp.where(tau > 0, tau, 1e-6 * process.t_min)
    return _nodes_at(process, jnp.concatenate([s[None], tau, t[None]]), fractions, weights)


def step_ends(process: AbstractProcess, s: Array, t: Array) -> StepNodes:
    """The same without nodes between the ends."""
    none = jnp.zeros(0, s.dtype)
    return _nodes_at(process, jnp.stack([s, t]), none, none)


def _nodes_at(process, times, fractions, weights):
    def values(tau):
        signal = process.transition(tau, jnp.zeros_like(tau))
        return process.factor(tau).blocks, signal.blocks

    def whiten(tau, inverse):
        return (BlockLinearOperator(inverse, process.shape) @ process.diffusion(tau)).blocks

    roots, signals = jax.vmap(values)(times)
    inverse = lambda root: BlockLinearOperator(root, process.shape).inverse().blocks
    inverses = jax.vmap(inverse)(roots[:-1])
    whitened = jax.vmap(whiten)(times[1:-1], inverses[1:])
    return StepNodes(process, times, fractions, weights, roots, signals, inverses, whitened)


def _step_quadrature(process, s, t):
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
