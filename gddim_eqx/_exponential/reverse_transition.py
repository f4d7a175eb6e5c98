r"""The exact transition of the reverse diffusion for a single data point.

For a single data point, or normal data, the reverse diffusion (paper, equation 6) is
linear, and in the frame $R_t$ the noise prediction follows

$$\mathrm{d}\epsilon = \tfrac{\lambda^2}{2} K_t\,\epsilon\,\mathrm{d}t
+ \lambda\,R_t^{-1} G_t\,\mathrm{d}w, \qquad K = R^{-1} G G^\top R^{-\top}.$$

Its solution operator $\Omega$ contracts backward in time, and gives both the transition
$\hat\Psi(t, s) = R_t\,\Omega(t, s)\,R_s^{-1}$ of the paper's proposition 6 and its
covariance (equation 23), which is $R_t (I - \Omega \Omega^\top) R_t^\top$. The integral

$$I - \Omega \Omega^\top = \lambda^2 \int_t^s \Omega(t, \tau)\,K_\tau\,
\Omega(t, \tau)^\top\,\mathrm{d}\tau$$

is free of cancellation, however small the step.
"""

import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact

from .._custom_types import RealScalarLike, Stochasticity
from .._linear import (
    align,
    append_axes,
    BlockLinearOperator,
    matmul,
    square_root_of_sum,
    transposed,
)
from .._misc import pin
from .._process import AbstractProcess, as_times, require_process
from .._term import as_lam, lam_at
from .quadrature import (
    collocate,
    integrals_from_the_end,
    NODES,
    step_nodes,
    StepNodes,
    WEIGHTS,
)


class NoiseTransition(NamedTuple):
    r"""$\Omega$ over a step from `s` to `t`, and related quantities for the solver."""

    # Omega(t, s).
    omega: Inexact[Array, "n n *spectrum"]
    # A square root of I - Omega Omega^T, chosen so that its product with the normalised
    # Brownian increments is close to the noise that these add to the noise prediction.
    noise_root: Inexact[Array, "n n *spectrum"]
    # Omega(t, tau) at the start, the quadrature nodes and the end.
    omegas: Inexact[Array, "times n n *spectrum"]


def noise_transition(nodes: StepNodes, lam: Stochasticity) -> NoiseTransition:
    """The transition of the noise prediction over a step backward in time.

    **Arguments:**

    - `nodes`: the quadrature nodes of a step from `s` to `t <= s`.
    - `lam`: the stochasticity, or a function of time.
    """
    weights = (nodes.times[0] - nodes.times[-1]) * nodes.weights[1:-1]
    weights = append_axes(weights, nodes.whitened.ndim)
    level, relative = _levels(lam, nodes.times[1:])
    relative = append_axes(relative, nodes.whitened.ndim)
    solve = _scalar if nodes.process.num_components == 1 else _matrix
    omegas, omega, increments, root = solve(nodes, weights, level, relative)
    # Proportional to the covariance of the noise with the Brownian increment.
    target = (_root(weights) * increments).sum(0)
    eye = append_axes(jnp.eye(len(omega), dtype=omega.dtype), omega.ndim)
    ends = omega[None], jnp.broadcast_to(eye, omega.shape)[None]
    omegas = jnp.concatenate([ends[0], omegas, ends[1]])
    return NoiseTransition(omega, level * align(root, target), omegas)


# Both return Omega(t, tau) at the nodes and Omega(t, s); and, divided by `level` so that
# derivatives with respect to it exist even where it is zero, the weighted increments
# sqrt(dtau) lam Omega R^-1 G, and a square root of I - Omega Omega^T.


def _scalar(nodes, weights, level, relative):
    whitened = nodes.whitened[1:-1]
    rate = 0.5 * weights * whitened**2
    logs, log = _log_omegas(nodes, rate, relative)
    omegas = jnp.exp(level**2 * logs)
    increments = _root(weights) * relative[:-1] * omegas * whitened
    root = _root(-2 * log * _expm1_over(2 * level**2 * log))
    return omegas, jnp.exp(level**2 * log), increments, root


def _matrix(nodes, weights, level, relative):
    whitened = relative[:-1] * nodes.whitened[1:-1]
    omegas, omega = _collocate(whitened, weights, level)
    increments = _root(weights) * jax.vmap(matmul)(omegas, whitened)
    return omegas, omega, increments, square_root_of_sum(increments)


def _levels(lam: Stochasticity, times):
    """The mean stochasticity over the nodes and the end of a step, and its values there
    relative to the mean."""
    if not callable(lam):
        return lam_at(lam, times[-1]), jnp.ones_like(times)
    levels = jax.vmap(ft.partial(lam_at, lam))(times)
    mean = levels.mean()
    return mean, jnp.where(mean == 0, 1, levels / jnp.where(mean == 0, 1, mean))


def _root(x):
    """The square root, with derivative 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _expm1_over(x):
    """(exp(x) - 1) / x."""
    small = jnp.abs(x) < jnp.finfo(x.dtype).eps
    return jnp.where(small, 1 + x / 2, jnp.expm1(x) / jnp.where(small, 1, x))


def _log_omegas(nodes, rate, relative):
    """The logarithms of Omega(t, tau) and Omega(t, s) for a mean stochasticity of one. For
    constant stochasticity, Omega is R_t / (Psi R_s) to the power lam^2. If it varies, its
    deviation from the value at the end is integrated by quadrature; that integrand is
    regular at the end."""
    root, signal, end = nodes.roots[-1], nodes.signals[-1], nodes.times[-1]

    def log_ratio(tau, before, signal_before):
        ndim = max(before.ndim, signal.ndim)
        before, after = append_axes(before, ndim), append_axes(root, ndim)
        after = after * append_axes(signal_before / signal, ndim)
        regular = (before > 0) & (after > 0)
        ratio = jnp.where(regular, after / jnp.where(before > 0, before, 1), 1)
        # Without noise at time 0 the ratio is zero. Its logarithm must be finite, as it is
        # multiplied by lam^2, which may be 0.
        logarithm = jnp.where(regular, jnp.log(ratio), -1e9)
        return pin((tau == end) | (logarithm > 0), 0, logarithm)

    ratios = jax.vmap(log_ratio)(nodes.times[:-1], nodes.roots[:-1], nodes.signals[:-1])
    # The logarithm of a ratio near 1 suffers from cancellation; the integral does not.
    over_step = jnp.where(ratios[0] < -0.1, ratios[0], -rate.sum(0))
    at_end, deviation = relative[-1] ** 2, rate * (relative[:-1] ** 2 - relative[-1:] ** 2)
    over_step = at_end * over_step - deviation.sum(0)
    logs = at_end[None] * ratios[1:] + _integrals_to_end(deviation)
    return logs, jnp.where(over_step < 0, over_step, 0)


def _integrals_to_end(weighted):
    """Integrals from the end of the step back to each node, of values at the nodes that
    are multiplied by the quadrature weights."""
    weights = append_axes(jnp.asarray(WEIGHTS, weighted.dtype), weighted.ndim)
    backward = jnp.asarray(_BACKWARD, weighted.dtype)
    return jnp.tensordot(backward, weighted / weights, 1, precision="highest")


def _collocate(whitened, step_weights, level):
    """Omega(t, tau) at the nodes and Omega(t, s), by Gauss collocation from t to s.

    It preserves quadratic invariants, so I - Omega Omega^T equals its quadrature at the
    nodes.
    """
    squares = jax.vmap(lambda x: matmul(x, transposed(x)))(whitened)
    # The generator times the quadrature weights, then in the quadrature's own variable.
    change = 0.5 * level**2 * step_weights * squares
    generator = change / append_axes(jnp.asarray(WEIGHTS, change.dtype), change.ndim)
    omegas = collocate(jnp.asarray(_BACKWARD, change.dtype), generator)
    decrease = jax.vmap(matmul)(omegas, change).sum(0)
    eye = jnp.eye(change.shape[1], dtype=change.dtype)
    return omegas, append_axes(eye, decrease.ndim) - decrease


_BACKWARD = integrals_from_the_end(NODES)


def reverse_transition(
    process: AbstractProcess,
    t: RealScalarLike,
    s: RealScalarLike,
    lam: Stochasticity = 1.0,
) -> tuple[BlockLinearOperator, BlockLinearOperator]:
    r"""The transition of the reverse diffusion for a single data point at the origin.

    Given $u_s$, the state at $t \le s$ is normal with mean $\hat\Psi u_s$ and covariance
    $P$. With data at the origin, states have covariance $\Sigma_t$ for every `lam`:
    $\hat\Psi \Sigma_s \hat\Psi^\top + P = \Sigma_t$. For `lam = 1` this is the posterior
    of $u_t$ given $u_s$. Paper, proposition 6.

    **Arguments:**

    - `process`: the forward process.
    - `t`, `s`: times in [0, T] with `t <= s`, and `s > 0`.
    - `lam`: the stochasticity, or a function of time; 0 for the probability flow.

    **Returns:** the transition $\hat\Psi(t, s)$, and its covariance $P$.

    **Raises:** `ValueError` for a negative `lam`, and at run time an error if `t > s`.
    """
    require_process(process)
    lam = as_lam(lam)
    after, before = as_times(t, s)
    after = eqx.error_if(
        after,
        after > before,
        "The reverse diffusion runs backward in time: `t` must not exceed `s`.",
    )
    nodes = step_nodes(process, before, after)
    noise = noise_transition(nodes, lam)
    factor, inverse, omega, noise_root = (
        BlockLinearOperator(x, process.shape)
        for x in (nodes.roots[-1], nodes.inverses[0], noise.omega, noise.noise_root)
    )
    root = factor @ noise_root
    covariance = BlockLinearOperator(
        (root @ root.T).blocks, process.shape, lx.positive_semidefinite_tag
    )
    return factor @ omega @ inverse, covariance
