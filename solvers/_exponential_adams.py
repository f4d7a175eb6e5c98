from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array

from gddim_eqx._custom_types import State
from gddim_eqx._exponential import (
    AbstractCoordinate,
    AbstractSplitting,
    integral,
    lagrange,
    SemilinearSplitting,
    Time,
)
from gddim_eqx._linear import add, coefficient_dtype, combine
from gddim_eqx._misc import renamed
from gddim_eqx._term import real_time, Semilinear, unwrap

from ._corrector import AbstractCorrector, NoCorrector
from ._history import Places, unstacked
from ._multistep import AbstractExponentialMultistep, Problem
from ._predictor import AbstractPredictor, AdamsBashforth


class ExponentialAdams(AbstractExponentialMultistep):
    r"""An exponential Adams-Bashforth method for stiff semilinear equations,
    $\dot u = A_t u + N(t, u)$.

    The linear part is solved exactly, however stiff it is, and the nonlinear part is
    extrapolated by a polynomial in time through its most recent values. Each step takes
    one evaluation of the nonlinear part, and is explicit: no equation is solved for the
    state. If $N$ is constant, a step of any size is exact.

    It solves [`gddim_eqx.Semilinear`][] equations in either direction of time, with fixed
    or adaptive step sizes: the coefficients are computed from the times of the step and of
    its history. The error estimate is the difference from the method of the next lower
    order (for order 1, from order 2). Adaptive steps that are much longer than the time
    which the stored values span are rejected.

    For orders above 1, the history is initialised with values at nodes within the first
    step, from a fixed-point iteration for the polynomial through them. This takes 3, 5 or
    10 evaluations for order 2, 3 or 4. If the iteration does not contract, because the
    first step is too long, the values are discarded, and the first steps are a warm-up of
    lower order.

    Constant operators are integrated with $\varphi$ functions. Time-dependent operators are
    integrated by Radau collocation with 16 nodes: for n x n blocks, one linear system of
    size 16 n per step and block. It is exact to rounding error as long as eigenvalues times
    the step size are at most about 10, and stable for any decay.

    ??? cite "Reference"

        M. Hochbruck, A. Ostermann, *Exponential integrators*, Acta Numerica, 2010.
    """

    splitting: AbstractSplitting
    coordinate: AbstractCoordinate
    predictor: AbstractPredictor
    corrector: AbstractCorrector

    term_structure: ClassVar = Semilinear

    @renamed(num_nodes="order")
    def __init__(self, order: int | AbstractPredictor = 4):
        """**Arguments:**

        - `order`: the number of evaluations that a step combines, 1 to 4; or a predictor.

        **Raises:** `ValueError` for any other order.
        """
        predictor = order if isinstance(order, AbstractPredictor) else AdamsBashforth(order)
        self.splitting, self.coordinate = SemilinearSplitting(), Time()
        self.predictor, self.corrector = predictor, NoCorrector()

    def unwrap(self, terms, y):
        term, direction = unwrap(terms)
        assert isinstance(term, Semilinear)
        return Problem(term, term.linear_part(y), direction)

    def init(self, terms, t0, t1, y0, args):
        history = super().init(terms, t0, t1, y0, args)
        if self.predictor.num_nodes == 1:
            return history
        y0 = jtu.tree_map(jnp.asarray, y0)
        times, values, contracts = self._start(self.unwrap(terms, y0), t0, t1, y0, args)
        older = jtu.tree_map(lambda x: x[1:], values)
        stored = jnp.broadcast_to(contracts, history.stored.shape)
        fields = lambda h: (h.places, h.values, h.stored)
        later = times[1:]
        places = Places(later, later, later, jnp.zeros_like(later))
        return eqx.tree_at(fields, history, (places, older, stored))

    def _start(self, problem, t0, t1, y0, args):
        """Nodes within the first step, beginning at its start; the nonlinear part at the
        nodes; and whether the fixed-point iteration contracts."""
        term, equation, direction, *_ = problem
        q, shape, dtype = self.predictor.num_nodes, equation.shape, coefficient_dtype(y0)
        s, t = (real_time(equation.t_end, x, direction, dtype) for x in (t0, t1))
        fractions = jnp.arange(q, dtype=dtype) / q
        times = s + (t - s) * fractions
        polynomials = lagrange(fractions, jnp.ones(q, bool))
        # Coefficients in the variable that runs from 0 to 1 on the way to each node.
        powers = jnp.stack([fractions**i for i in range(q)], axis=-1)
        polynomials = polynomials[None] * powers[:, None]
        integrate = lambda tau: self.splitting.integrate(equation, s, tau, q)
        steps = jax.vmap(lambda tau: integrate(tau)[:2])(times[1:])

        def evaluate(tau, y):
            return self.splitting.evaluate(term, tau, y, args)

        def sweep(values, _):
            def at(node):
                tau, polynomials, linear, moments = node
                force = integral(shape, polynomials, moments, unstacked(values))
                return evaluate(tau, add(combine(shape, [(linear, y0)]), force))

            later = lax.map(at, (times[1:], polynomials[1:], *steps))
            new = jtu.tree_map(lambda x, y: x.at[1:].set(y), values, later)
            return new, _distance(new, values)

        first = jtu.tree_map(lambda x: jnp.stack([x] * q), evaluate(s, y0))
        values, changes = lax.scan(sweep, first, length=max(q - 1, 2))
        return times, values, changes[-1] <= 0.5 * changes[0]


def _distance(a: State, b: State) -> Array:
    change = jtu.tree_map(lambda x, y: jnp.abs(x - y).max(initial=0), a, b)
    return jnp.stack(jtu.tree_leaves(change)).max()
