r"""The coefficients of the exponential integrators, computed from the times of the step.

Over a step from $s$ to $t$ the exact solution of the probability flow is

$$u_t = \Psi(t, s)\,u_s + \int_s^t \mathrm{d}_\tau \left[\Psi(t, \tau) R_\tau\right]
\epsilon(\tau) = R_t R_s^{-1} u_s + \int_s^t \mathrm{d}_\tau
\left[R_t R_\tau^{-1} \Psi(\tau, 0)\right] U(\tau)$$

with the noise prediction $\epsilon$, or the prediction of the initial state $U =
\Psi(0, \tau) (u - R_\tau \epsilon)$. If either is replaced by a polynomial in a coordinate
$x$ that runs from 0 to 1, only the moments of the bracket are needed,

$$M_i = \int_s^t x^i\,\mathrm{d}[\cdot]
= [\cdot]_t - [i = 0]\,[\cdot]_s - \int_0^1 i\,x^{i-1}\,[\cdot]\,\mathrm{d}x,$$

in which $G$ does not appear and the integrand is bounded and smooth. (The integrand of the
paper's equations 18 and 19, $\frac{1}{2} \Psi G G^\top R^{-\top}$, is the derivative of the
first bracket.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .coordinate import AbstractCoordinate, Time
from .quadrature import StepNodes


class StepCoordinate(NamedTuple):
    """The coordinate over a step: its values at the ends; its values at all times, scaled
    to 0 at the start and 1 at the end; and quadrature weights for integrals over it and
    over time."""

    start: Inexact[Array, ""]
    end: Inexact[Array, ""]
    scaled: Inexact[Array, " times"]
    weights: Inexact[Array, " times"]
    weights_in_time: Inexact[Array, " times"]


def step_coordinate(nodes: StepNodes, coordinate: AbstractCoordinate) -> StepCoordinate:
    """A coordinate over a step."""
    times, process = nodes.times, nodes.process
    s, t = times[0], times[-1]
    in_time = (t - s) * nodes.weights
    if isinstance(coordinate, Time):
        # Exact, without a difference of times.
        return StepCoordinate(s, t, nodes.fractions, nodes.weights, in_time)
    log_snr = slopes = None
    if coordinate.uses_log_snr:
        log_snr, slopes = nodes.log_snr()
        slopes = (t - s) * slopes
    # Derivatives are with respect to the fraction of the step.
    values, slopes = jax.jvp(
        lambda tau, ratio: coordinate(process, tau, ratio),
        (times, log_snr),
        (jnp.full_like(times, t - s), slopes),
    )
    start, end = values[0], values[-1]
    x, slopes = jax.jvp(
        lambda values: coordinate.rescale(values, start, end), (values,), (slopes,)
    )
    # Zero over a step too small for the coordinate to resolve.
    inside = (nodes.weights > 0) & (start != end)
    weights = nodes.weights * jnp.where(inside, slopes, 0)
    return StepCoordinate(start, end, jnp.where(start == end, 0, x), weights, in_time)


def moments_of_bracket(
    bracket: Inexact[Array, "times n n *spectrum"], at: StepCoordinate, number: int
) -> Inexact[Array, "number n n *spectrum"]:
    """The first `number` moments of a bracket."""
    x, weights = at.scaled, at.weights
    rules = [(np.arange(len(x)) == 0).astype(x.dtype)]
    rules += [weights * i * x ** (i - 1) for i in range(1, number)]
    # For every power the weights sum to one.
    return _contract(rules, bracket[-1:] - bracket)


def moments_of_density(
    density: Inexact[Array, "times n n *spectrum"], at: StepCoordinate, number: int
) -> Inexact[Array, "number n n *spectrum"]:
    """The first `number` moments of a bracket, given its derivative."""
    x, weights = at.scaled, at.weights_in_time
    return _contract([weights * x**i for i in range(number)], density)


def _contract(rules, values):
    return jnp.tensordot(jnp.stack(rules), values, 1, precision=lax.Precision.HIGHEST)
