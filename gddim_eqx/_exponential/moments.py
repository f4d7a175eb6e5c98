r"""The coefficients of the exponential integrators, computed from the times of the step.

Over a step from $s$ to $t$ the probability flow is, exactly,

$$u_t = \Psi(t, s)\,u_s + \int_s^t \mathrm{d}_\tau \left[\Psi(t, \tau) R_\tau\right]
\epsilon(\tau) = R_t R_s^{-1} u_s + \int_s^t \mathrm{d}_\tau
\left[R_t R_\tau^{-1} \Psi(\tau, 0)\right] U(\tau)$$

with the prediction of noise $\epsilon$, or that of the initial state $U = \Psi(0, \tau)
(u - R_\tau \epsilon)$. With either replaced by a polynomial in a coordinate $x$ that runs
from 0 to 1, all that is needed of the process are the moments of the bracket,

$$M_i = \int_s^t x^i\,\mathrm{d}[\cdot]
= [\cdot]_t - [i = 0]\,[\cdot]_s - \int_0^1 i\,x^{i-1}\,[\cdot]\,\mathrm{d}x,$$

in which $G$ does not occur and the integrand is bounded and smooth. (The paper's equations
18 and 19 have the integrand $\frac{1}{2} \Psi G G^\top R^{-\top}$, which is the
derivative of the first bracket.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from .coordinate import AbstractCoordinate, Time
from .quadrature import StepNodes


class Position(NamedTuple):
    """The coordinate over a step: at its ends, and scaled to 0 at the start and 1 at the
    end at the quadrature nodes, with the weights of integrals over it and over time."""

    start: Inexact[Array, ""]
    end: Inexact[Array, ""]
    scaled: Inexact[Array, " nodes"]
    weights: Inexact[Array, " nodes"]
    weights_in_time: Inexact[Array, " nodes"]


def position(nodes: StepNodes, coordinate: AbstractCoordinate) -> Position:
    """The position of the quadrature nodes of a step in a coordinate."""
    times, process = nodes.times, nodes.process
    s, t = times[0], times[-1]
    in_time = (t - s) * nodes.weights
    if isinstance(coordinate, Time):
        return Position(s, t, nodes.fractions, nodes.weights, in_time)
    log_snr = slopes = None
    if coordinate.uses_log_snr:
        log_snr, slopes = nodes.log_snr()
        slopes = jnp.pad((t - s) * slopes, 1)
    forward = t > s
    # The derivative with respect to the fraction of time, needed at the nodes only.
    values, slopes = jax.jvp(
        lambda t, log_snr: coordinate(process, t, log_snr, forward),
        (times, log_snr),
        (jnp.full_like(times, t - s), slopes),
    )
    start, end = values[0], values[-1]
    # A step too short to be resolved by the coordinate leaves it at 0.
    still = start == end
    rate = jnp.where(still, 0, 1 / jnp.where(still, 1, end - start))
    at_nodes, slopes = rate * (values[1:-1] - start), rate * slopes[1:-1]
    return Position(start, end, at_nodes, nodes.weights * slopes, in_time)


def moments_of_bracket(
    bracket: Inexact[Array, "times n n *spectrum"], position: Position, number: int
) -> Inexact[Array, "number n n *spectrum"]:
    """The first moments, given the bracket at the start of a step, at the quadrature
    nodes, and at the end."""
    whole = bracket[-1:] - bracket[:1]
    if number == 1:
        return whole
    x, weights = position.scaled, position.weights
    powers = [weights * i * x ** (i - 1) for i in range(1, number)]
    # The weights of all powers add up to one.
    return jnp.concatenate([whole, _sum(powers, bracket[-1:] - bracket[1:-1])])


def moments_of_density(
    density: Inexact[Array, "nodes n n *spectrum"], position: Position, number: int
) -> Inexact[Array, "number n n *spectrum"]:
    """The first moments, given the derivative of the bracket at the quadrature nodes."""
    x, weights = position.scaled, position.weights_in_time
    return _sum([weights * x**i for i in range(number)], density)


def _sum(weights, values):
    return jnp.tensordot(jnp.stack(weights), values, 1, precision=lax.Precision.HIGHEST)
