r"""One step of stochastic gDDIM.

Let $U$ be the initial state that the noise prediction $\epsilon$ amounts to: $u_\tau =
\Psi(\tau, 0) U_\tau + R_\tau \epsilon_\tau$. Along the reverse diffusion (paper, equation
6), exactly,

$$\mathrm{d}\epsilon = \tfrac{\lambda^2}{2} R^{-1} G G^\top R^{-\top} \epsilon\,
\mathrm{d}\tau + \lambda R^{-1} G\,\mathrm{d}w + \mathrm{d}\eta, \qquad
R\,\mathrm{d}\eta = -\Psi(\tau, 0)\,\mathrm{d}U.$$

All but $\eta$ is linear, and for one data point $\eta$ does not change. With $\Omega$ the
solution operator of the linear part and $\xi$ its noise, a step from $s$ to $t$ is

$$u_t = \Psi(t, s) u_s + [R_t \Omega(t, s) - \Psi(t, s) R_s] \epsilon_s + R_t \xi
+ \int_s^t [R_t \Omega(t, \tau) - \Psi(t, \tau) R_\tau]\,\mathrm{d}\eta_\tau.$$

Without the integral this is the paper's proposition 6. For higher orders
$\mathrm{d}\eta / \mathrm{d}\tau$ is extrapolated by the polynomial that explains what was
seen over past steps, $\epsilon_t - \Omega(t, s) \epsilon_s - \xi = \int_s^t \Omega(t, \tau)
\,\mathrm{d}\eta_\tau$. As $\lambda$ goes to 0 this becomes the deterministic method.
"""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import Args, BoolScalarLike, RealScalarLike, State
from gddim_eqx._exponential import contraction
from gddim_eqx._linear import append_axes, apply, BlockLinearOperator, coefficient_dtype
from gddim_eqx._term import backward, real_times, ReverseSDE, unwrap_reverse

from ._step import combine, continued, pick


class StochasticHistory(eqx.Module):
    """What was seen over the most recent steps, in a ring."""

    starts: Real[Array, " slots"]
    ends: Real[Array, " slots"]
    # The change of the noise prediction that the linear part does not explain, over the
    # length of the step. That of the last step is filled in by the next, which knows it.
    changes: PyTree[Inexact[Array, "slots ..."]]
    # Omega's moments: int_0^1 Omega(t, tau) x^i dx over the step.
    moments: Inexact[Array, "slots powers n n *spectrum"]
    # What the linear part makes of the noise prediction at the end of the last step.
    expected: State
    # How many of the slots hold steps of the current solution.
    count: Int[Array, ""]
    # The slot that is overwritten next.
    slot: Int[Array, ""]
    # Where, in the time of `diffeqsolve`, the last step ended.
    end: Real[Array, ""]


def init_stochastic(
    slots: int, terms: ReverseSDE, t0: RealScalarLike, y0: State
) -> StochasticHistory:
    flow, lam, _ = unwrap_reverse(terms)
    dtype = coefficient_dtype(y0)
    time = jax.ShapeDtypeStruct((), dtype)
    omega = jax.eval_shape(lambda t: contraction(flow.process, t, t, lam).omega, time)
    return StochasticHistory(
        starts=jnp.zeros(slots, dtype),
        ends=jnp.zeros(slots, dtype),
        changes=jtu.tree_map(lambda y: jnp.zeros((slots, *y.shape), y.dtype), y0),
        moments=jnp.zeros((slots, slots, *omega.shape), dtype),
        expected=jtu.tree_map(jnp.zeros_like, y0),
        count=jnp.zeros((), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
        end=jnp.asarray(t0),
    )


def stochastic_step(
    order: int,
    terms: ReverseSDE,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: State,
    args: Args,
    history: StochasticHistory,
    made_jump: BoolScalarLike,
) -> tuple[State, State, dict, StochasticHistory, dfx.RESULTS]:
    flow, lam, direction = unwrap_reverse(terms)
    process, slots = flow.process, history.starts.shape[0]
    s, t = real_times(process, t0, t1, direction, coefficient_dtype(y0))
    s, t = backward(s, t)
    noise = flow.noise(s, y0, args)

    count = continued(history.count, history.end, t0, made_jump)
    # By age, the slots; by slot, the ages.
    order_of_age = (history.slot - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots
    last = order_of_age[0]
    length = jnp.where(count > 0, history.ends[last] - history.starts[last], 1)

    def fill(changes, noise, expected):
        change = (noise - expected) / length.astype(noise.dtype)
        return changes.at[last].set(jnp.where(count > 0, change, 0))

    changes = jtu.tree_map(fill, history.changes, noise, history.expected)

    step = contraction(process, s, t, lam)
    normal = terms.normal(t0, t1, y0)
    omega, spread, factor = (
        BlockLinearOperator(step.omega, process.shape),
        BlockLinearOperator(step.spread, process.shape),
        process.factor(t),
    )
    linear = (factor @ omega - process.transition(t, s) @ process.factor(s)).blocks
    pairs = [
        (process.transition(t, s).blocks, y0),
        (linear, noise),
        ((factor @ spread).blocks, normal),
    ]
    responses, own_moments = _integrals(process, s, t, step, slots)
    system = _past(history, s, t)[order_of_age]
    by_slot = [
        ((t - s) * _explain(system, responses, number))[order_of_age]
        for number in (count, count - 1)
    ]
    past = [pick(changes, k) for k in range(slots)]
    if order > 1:
        pairs += list(zip(by_slot[0], past))
    y1 = combine(process, pairs)

    # The estimate is what the oldest step changes; before there is one, all of the model's
    # contribution.
    first = jnp.where(count == 0, linear, 0)
    y_error = combine(process, [(first, noise), *zip(by_slot[0] - by_slot[1], past)])

    expected = jtu.tree_map(lambda a, b: a + b, apply(omega, noise), apply(spread, normal))
    slot = history.slot
    new = StochasticHistory(
        starts=history.starts.at[slot].set(s),
        ends=history.ends.at[slot].set(t),
        changes=changes,
        moments=history.moments.at[slot].set(own_moments),
        expected=expected,
        count=jnp.minimum(count + 1, slots),
        slot=(slot + 1) % slots,
        end=jnp.asarray(t1),
    )
    # A step of no length teaches nothing.
    new = jtu.tree_map(lambda a, b: jnp.where(s == t, a, b), history, new)
    return y1, y_error, dict(y0=y0, y1=y1), new, dfx.RESULTS.successful


def _integrals(process, s, t, step, number):
    """The integrals over x in [0, 1] of powers of x times R_t Omega(t, tau) - Psi(t, tau)
    R_tau, and times Omega(t, tau)."""
    factor = process.factor(t)

    @jax.vmap
    def response(tau, omega):
        carried = process.transition(t, tau) @ process.factor(tau)
        return (factor @ BlockLinearOperator(omega, process.shape) - carried).blocks

    responses = response(s + (t - s) * step.nodes, step.omegas)
    powers = jnp.stack([step.weights * step.nodes**i for i in range(number)])

    def integrate(values):
        return (append_axes(powers, values.ndim + 1) * values[None]).sum(1)

    return integrate(responses), integrate(step.omegas)


def _past(history, s, t):
    """The moments of past steps for powers of this step's x = (tau - s) / (t - s) in place
    of their own."""
    slots = history.starts.shape[0]
    length = jnp.where(s == t, 1, t - s)
    shift, scale = (history.starts - s) / length, (history.ends - history.starts) / length
    rows = []
    for i in range(slots):
        terms = [
            math.comb(i, m)
            * append_axes(shift ** (i - m) * scale**m, history.moments[:, m].ndim)
            * history.moments[:, m]
            for m in range(i + 1)
        ]
        rows.append(sum(terms))
    return jnp.stack(rows, axis=1)


def _explain(system, responses, number):
    """The blocks that take the changes seen over the `number` newest steps to the
    response to the polynomial that explains them."""
    slots, n = system.shape[0], system.shape[2]
    used = jnp.arange(slots, dtype=number.dtype) < number
    eye = jnp.eye(slots * n, dtype=system.dtype).reshape(slots, n, slots, n)
    eye = eye.transpose(0, 2, 1, 3)
    both = used[:, None] & used[None]
    system = jnp.where(
        append_axes(both, system.ndim), system, append_axes(eye, system.ndim)
    )
    # Matrices last: (*spectrum, n x slots, n x slots), transposed.
    system = jnp.moveaxis(system, (1, 3, 0, 2), (-4, -3, -2, -1))
    system = system.reshape(*system.shape[:-4], slots * n, slots * n)
    right = jnp.moveaxis(responses, (0, 2, 1), (-3, -2, -1))
    right = right.reshape(*right.shape[:-3], slots * n, n)
    blocks = jnp.linalg.solve(system, right)
    blocks = blocks.reshape(*blocks.shape[:-2], slots, n, n)
    blocks = jnp.moveaxis(blocks, (-3, -2, -1), (0, 2, 1))
    return jnp.where(append_axes(used, blocks.ndim), blocks, 0)
