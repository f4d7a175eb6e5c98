from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Real
from numpy.polynomial import legendre

from .._linear import append_axes, BlockLinearOperator, matmul, transposed
from .._process import AbstractProcess, log_norm


NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def integrals_from_the_end(
    nodes: Float[np.ndarray, " nodes"],
) -> Float[np.ndarray, "nodes nodes"]:
    """The matrix from values at nodes in [0, 1] to the integrals from 1 back to each."""
    number, x = len(nodes), 2 * nodes - 1
    columns = np.linalg.inv(legendre.legvander(x, number - 1)).T
    integrals = np.stack([legendre.legint(column, lbnd=1) for column in columns])
    return legendre.legvander(x, number) @ integrals.T / 2


def collocate(
    integrals: Float[Array, "nodes nodes"],
    generators: Inexact[Array, "nodes n n *spectrum"],
) -> Inexact[Array, "nodes n n *spectrum"]:
    r"""The solution operators $\Omega(1, x_i)$, $\partial_x \Omega(1, x) = -\Omega(1, x)
    A_x$, by collocation.

    **Arguments:**

    - `integrals`: the matrix from values at the nodes to the integrals from each to 1.
    - `generators`: $A$ at the nodes.
    """
    m, n = generators.shape[:2]
    # (*spectrum, m, n, n)
    generators = jnp.moveaxis(generators, (0, 1, 2), (-3, -2, -1))
    spectrum, eye = generators.shape[:-3], jnp.eye(n, dtype=generators.dtype)
    # Maps component a of the row at node k to component b of the row at node j.
    system = jnp.einsum("jk,...kab->...jbka", integrals, generators, precision="highest")
    system = system.reshape(*spectrum, m * n, m * n)
    right = jnp.broadcast_to(jnp.tile(eye, (m, 1)), (*spectrum, m * n, n))
    identity = jnp.broadcast_to(jnp.eye(m * n, dtype=eye.dtype), system.shape)
    rows = jnp.linalg.solve(identity - system, right)
    return jnp.moveaxis(rows.reshape(*spectrum, m, n, n), (-3, -1, -2), (0, 1, 2))


class StepNodes(NamedTuple):
    """A process over a step from `s` to `t`, evaluated for quadrature: at the start of the
    step, at the quadrature nodes, and at its end. The ends have weight zero."""

    process: AbstractProcess
    times: Real[Array, " times"]
    # (tau - s) / (t - s), and the quadrature weights of integrals over it.
    fractions: Real[Array, " times"]
    weights: Real[Array, " times"]
    # R_tau and Psi(tau, 0).
    roots: Inexact[Array, "times n n *spectrum"]
    signals: Inexact[Array, "times n n *spectrum"]
    # R_tau^-1; at the end, the identity if there is no noise.
    inverses: Inexact[Array, "times n n *spectrum"]
    # R_tau^-1 G_tau; meaningless at the ends.
    whitened: Inexact[Array, "times n n *spectrum"]
    # Whether there is no noise in the data at the end of the step.
    noiseless: Bool[Array, ""]

    def log_snr(self) -> tuple[Inexact[Array, " times"], Inexact[Array, " times"]]:
        """`process.log_snr`, and its derivative at the nodes."""

        def whitened_data(inverse, signal):
            inverse, signal = (
                BlockLinearOperator(x, self.process.shape) for x in (inverse, signal)
            )
            return log_norm((inverse @ signal).blocks[:, 0])

        logs, units = jax.vmap(whitened_data)(self.inverses, self.signals)
        values = logs.mean(tuple(range(1, logs.ndim)))
        # Infinite without noise; use a large number instead.
        last = np.arange(len(values)) == len(values) - 1
        values = jnp.where(last & self.noiseless, 1e4, values)
        # The derivative of a^T Sigma^-1 a is -|G^T Sigma^-1 a|^2.
        along = jax.vmap(lambda w, unit: matmul(transposed(w), unit[:, None])[:, 0])
        rates = (along(self.whitened, units) ** 2).sum(1)
        return values, -0.5 * rates.mean(tuple(range(1, rates.ndim)))


def step_nodes(process: AbstractProcess, s: Array, t: Array) -> StepNodes:
    """Evaluate a process at the quadrature nodes and ends of a step."""
    nodes, weights = np.pad(NODES, 1, constant_values=(0, 1)), np.pad(WEIGHTS, 1)
    return _nodes_at(process, s, t, nodes, weights)


def step_ends(process: AbstractProcess, s: Array, t: Array) -> StepNodes:
    """As `step_nodes`, at the ends only."""
    return _nodes_at(process, s, t, np.array([0.0, 1.0]), np.zeros(2))


def _nodes_at(process, s, t, nodes, weights):
    def values(tau):
        signal = process.transition(tau, jnp.zeros_like(tau))
        return process.factor(tau).blocks, signal.blocks

    def whiten(tau, inverse):
        return (BlockLinearOperator(inverse, process.shape) @ process.diffusion(tau)).blocks

    fractions, weights = _fractions(process, s, t, nodes, weights)
    first, last = nodes == 0, nodes == 1
    tau = s + (t - s) * fractions
    # Rounding may move a node to an end of the time axis: to time 0, where without noise
    # there is no inverse, or to where there is no signal and the diffusion is infinite.
    last_time = np.asarray(min(process.t_zero_signal, process.t_end), s.dtype)
    inside = np.nextafter(last_time, np.zeros_like(last_time))
    tau = jnp.minimum(jnp.where(tau > 0, tau, 1e-6 * process.t_min), inside)
    times = jnp.where(first, s, jnp.where(last, t, tau))
    roots, signals = jax.vmap(values)(times)
    noiseless = (roots[-1, 0] == 0).all()
    eye = append_axes(jnp.eye(roots.shape[1], dtype=roots.dtype), roots.ndim - 1)
    regular = jnp.where(append_axes(last & noiseless, roots.ndim), eye[None], roots)
    inverse = lambda root: BlockLinearOperator(root, process.shape).inverse().blocks
    inverses = jax.vmap(inverse)(regular)
    # The diffusion may be infinite at the ends of the time axis, so not there.
    whitened = jax.vmap(whiten)(tau, inverses)
    rule = times, fractions, weights
    return StepNodes(process, *rule, roots, signals, inverses, whitened, noiseless)


def _fractions(process, s, t, nodes, weights):
    """Nodes and weights on [0, 1], from the Gauss-Legendre rule in a variable z.

    The noise level first grows like the square root of time, and later changes with the
    logarithm of time; both are linear in z. So is the logarithm of the signal where the
    signal vanishes.
    """
    nodes, weights = jnp.asarray(nodes, s.dtype), jnp.asarray(weights, s.dtype)
    # Finite where the signal is zero.
    t_zero = max(process.t_zero_signal, 1.001 * process.t_end)

    # t = odds / (1 + odds / t_zero), odds = t_min * root^2, and root = exp(z) - 1.
    def root_of_t(t):
        return jnp.sqrt(t / (1 - t / t_zero) / process.t_min)

    root_s, root_t = root_of_t(jnp.stack([s, t]))
    z = jnp.log1p((root_t - root_s) / (1 + root_s))  # from s to t
    growth = jnp.expm1(z * nodes)
    root = root_s + (1 + root_s) * growth
    # Fractions of the way from s to t in the odds, and their derivatives: as differences of
    # squares, without cancellation.
    still = (z == 0) | (root_t + root_s == 0)
    length = jnp.where(still, 1, growth[-1] * (root_t + root_s))
    odds = growth * (root + root_s) / length
    d_odds = 2 * z * (1 + growth) * root / length
    # In time.
    at_s, at, at_t = (1 + process.t_min / t_zero * r**2 for r in (root_s, root, root_t))
    fractions, slopes = odds * at_t / at, d_odds * at_t * at_s / at**2
    # Rounding must not move a node past the end, as the process is undefined before time 0.
    fractions = jnp.clip(fractions, 0, 1)
    return jnp.where(still, nodes, fractions), jnp.where(still, weights, weights * slopes)
