r"""The coefficients of the exponential integrators, computed from the times of the step.

Over a step from $s$ to $t$ the probability flow is, exactly,

$$u_t = \Psi(t, s)\,u_s + \int_s^t \mathrm{d}_\tau \left[\Psi(t, \tau) R_\tau\right]
\epsilon(\tau) = R_t R_s^{-1} u_s + \int_s^t \mathrm{d}_\tau
\left[R_t R_\tau^{-1} \Psi(\tau, 0)\right] U(\tau)$$

with the prediction of noise $\epsilon$, or that of the initial state $U = \Psi(0, \tau)
(u - R_\tau \epsilon)$. With either replaced by a polynomial in a variable $x$ that runs
from 0 to 1, all that is needed of the process are the moments of what is in brackets,

$$M_i = \int_s^t x^i\,\mathrm{d}[\cdot]
= [\cdot]_t - [i = 0]\,[\cdot]_s - \int_0^1 i\,x^{i-1}\,[\cdot]\,\mathrm{d}x,$$

in which $G$ does not occur and the integrand is bounded and smooth. (The paper's equations
18 and 19 have the integrand $\frac{1}{2} \Psi G G^\top R^{-\top}$, which is the
derivative of the first bracket.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._linear import append_axes, BlockLinearOperator
from .._process import AbstractProcess
from .coordinate import progress, Variable
from .quadrature import step_quadrature, times_at


def moments(
    process: AbstractProcess,
    s: Array,
    t: Array,
    number: int,
    factor: str = "R",
    variable: Variable = "time",
) -> Inexact[Array, "number n n *spectrum"]:
    r"""The blocks of the first moments of a step, for predictions of noise.

    **Arguments:**

    - `process`: the forward process.
    - `s`, `t`: where the step starts and ends. They may be equal.
    - `number`: how many moments.
    - `factor`: `"R"`; or `"cholesky"` for predictions of noise with respect to $L_t$. Then
        the integral is not of a total derivative, and is computed as it stands.
    - `variable`: the variable x.

    **Returns:** the blocks of M_0, ..., M_{number - 1}.
    """
    if factor == "cholesky" and process.num_components > 1:
        return _cholesky_moments(process, s, t, number, variable)

    def carried(tau):
        return (process.transition(t, tau) @ process.factor(tau)).blocks

    if number == 1:
        first, last = jax.vmap(carried)(jnp.stack([s, t]))
        return (last - first)[None]
    tau, x, weight = _quadrature(process, s, t, variable)
    return _by_parts(jax.vmap(carried)(tau), x, weight, number)


def data_step(
    process: AbstractProcess,
    s: Array,
    t: Array,
    number: int,
    variable: Variable = "time",
    omegas: Inexact[Array, "times n n *spectrum"] | None = None,
) -> tuple[Inexact[Array, "n n *factors"], Inexact[Array, "number n n *spectrum"]]:
    r"""What a step does with the state, and the same moments, for predictions of the
    initial state.

    **Arguments:**

    - `process`, `s`, `t`, `number`, `variable`: as in `moments`.
    - `omegas`: for the reverse diffusions, $\Omega(t, \tau)$ at `s`, at the nodes of
        `step_quadrature`, and at `t`. The bracket is $R_t \Omega(t, \tau) R_\tau^{-1}
        \Psi(\tau, 0)$ then.

    **Returns:** the blocks of $R_t \Omega(t, s) R_s^{-1}$, and of M_0, ..., M_{number - 1}.
    """
    tau, x, weight = _quadrature(process, s, t, variable)
    after = process.factor(t)

    def carried(tau, omega=None):
        back = process.factor(tau).inverse()
        if omega is not None:
            back = BlockLinearOperator(omega, process.shape) @ back
        back = after @ back
        return back.blocks, (back @ process.transition(tau, jnp.zeros_like(tau))).blocks

    # At the end this is known, also if there is no noise and R has no inverse.
    at = slice(0, 1 if number == 1 else -1)
    if omegas is None:
        back, values = jax.vmap(carried)(tau[at])
    else:
        back, values = jax.vmap(carried)(tau[at], omegas[at])
    last = append_axes(process.transition(t, jnp.zeros_like(t)).blocks, values.ndim - 1)
    values = jnp.concatenate([values, last[None]])
    return back[0], _by_parts(values, x, weight, number)


def regular_ends(process: AbstractProcess, s: Array, t: Array) -> tuple[Array, Array]:
    """Where a step starts and ends; but `t_min` for a step of no length where there is no
    noise, so that the factor has no inverse: at time 0."""
    inverse = process.factor(s).inverse().blocks
    singular = (s == t) & ~jnp.isfinite(inverse).all()
    return jnp.where(singular, process.t_min, s), jnp.where(singular, process.t_min, t)


def _quadrature(process, s, t, variable):
    """Times: the start, nodes, and the end; and at the nodes the variable and the weights
    of integrals over it."""
    fraction, weight = step_quadrature(process, s, t)
    tau = times_at(process, s, t, fraction)
    if variable == "time":
        x = fraction
    else:
        x, slope = progress(process, variable, s, t, tau)
        weight = weight * slope
    return jnp.concatenate([s[None], tau, t[None]]), x, weight


def _by_parts(values, x, weight, number):
    """Moments, from what is in brackets at the times of `_quadrature`."""
    whole = values[-1:] - values[:1]
    if number == 1:
        return whole
    powers = jnp.stack([weight * i * x ** (i - 1) for i in range(1, number)])
    powers = append_axes(powers, values.ndim + 1)
    # The weights of all powers add up to one.
    higher = (powers * (values[-1:] - values[1:-1])[None]).sum(1)
    return jnp.concatenate([whole, higher])


def _cholesky_moments(process, s, t, number, variable):
    @jax.vmap
    def integrand(tau):
        diffusion, inverse = process.diffusion(tau), process.cholesky(tau).inverse()
        return (
            0.5 * (process.transition(t, tau) @ diffusion @ diffusion.T @ inverse.T).blocks
        )

    fraction, weight = step_quadrature(process, s, t)
    tau = times_at(process, s, t, fraction)
    values = integrand(tau)
    x = fraction if variable == "time" else progress(process, variable, s, t, tau)[0]
    powers = (t - s) * jnp.stack([weight * x**i for i in range(number)])
    return (append_axes(powers, values.ndim + 1) * values[None]).sum(1)
