import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from gddim_eqx._custom_types import (
    Args,
    BoolScalarLike,
    RealScalarLike,
    State,
    Stochasticity,
)
from gddim_eqx._exponential import (
    AbstractCoordinate,
    AbstractSplitting,
    Exponential,
    integral,
    interpolation,
    lagrange,
    next_residual,
    Residual,
    scaled,
    StepCoefficients,
    weights,
)
from gddim_eqx._linear import (
    add,
    append_axes,
    BlockLinearOperator,
    check_state,
    coefficient_dtype,
    combine,
    subtract,
)
from gddim_eqx._misc import error_if_any, show
from gddim_eqx._term import (
    ProbabilityFlow,
    real_time,
    ReverseSDE,
    StartedModel,
    unwrap_reverse,
)

from ._corrector import AbstractCorrector
from ._history import History, LastStep, Nodes, Places
from ._predictor import AbstractPredictor


class Problem(NamedTuple):
    """The problem that a solver solves."""

    term: Any
    """The term whose evaluations are interpolated."""
    equation: Any
    """The linear part: a process, or the `LinearPart` of a semilinear equation."""
    lam: Stochasticity | None
    """The stochasticity; `None` for an ordinary differential equation."""
    direction: RealScalarLike
    """1 or -1, which maps the solver's times to those of the term when multiplied."""


class AbstractExponentialMultistep(
    dfx.AbstractAdaptiveSolver[History], dfx.AbstractItoSolver[History]
):
    """An exponential multistep method for semilinear equations, such as probability flows
    and reverse diffusions.

    A step solves the linear part of the equation exactly, and replaces the remainder by a
    polynomial through past evaluations of the model. Subclasses specify the linear part
    and the interpolated quantity (`splitting`), the coordinate of the polynomials
    (`coordinate`), the polynomials (`predictor`), and how the end of a step is corrected
    (`correction`).
    """

    splitting: eqx.AbstractVar[AbstractSplitting]
    coordinate: eqx.AbstractVar[AbstractCoordinate]
    predictor: eqx.AbstractVar[AbstractPredictor]
    correction: eqx.AbstractVar[AbstractCorrector]

    @abc.abstractmethod
    def unwrap(self, terms: dfx.AbstractTerm, y: State) -> Problem:
        """The problem that the terms define, for states like `y`.

        **Raises:** `ValueError` for terms that the solver does not support.
        """

    interpolation_cls: ClassVar[Callable[..., dfx.AbstractLocalInterpolation]] = (
        staticmethod(interpolation)
    )

    def order(self, terms):
        # The corrected state replaces the predicted one.
        older = self.correction.num_older
        return older + 1 if older else self.predictor.num_nodes

    def strong_order(self, terms):
        return 1

    def error_order(self, terms):
        stochastic = isinstance(terms, ReverseSDE) and unwrap_reverse(terms)[1] is not None
        return 1.5 if stochastic else max(self.predictor.num_nodes, 2)

    @property
    def stages(self) -> tuple[float, ...]:
        """Where in a step the model is evaluated: 0 is its start, and 1 its end."""
        return (0.0, 1.0) if self.correction.reevaluates else (0.0,)

    @property
    def _slots(self) -> int:
        # Order 1 stores one evaluation for its error estimate.
        return max(self.predictor.num_nodes - 1, self.correction.num_older, 1)

    @property
    def _num_moments(self) -> int:
        """The number of moments that the predictor and the corrector need."""
        corrects = self.correction.num_older > 0
        return self._slots + 1 if corrects else self.predictor.num_nodes

    @property
    def _num_for_error(self) -> int:
        """The number of moments that the error estimate needs."""
        return max(self.predictor.num_nodes, 2)

    def init(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
    ) -> History:
        del t1, args
        _, equation, lam, _ = self.unwrap(terms, y0)
        y0 = check_state(y0, equation.num_components, equation.shape, "The state `y0`")
        last = residual = None
        zeros = jtu.tree_map(jnp.zeros_like, y0)
        corrects = self.correction.num_older > 0 and not self.correction.reevaluates
        has_residual = lam is not None and self.splitting.has_residual
        if corrects or has_residual:
            time = jax.ShapeDtypeStruct((), coefficient_dtype(y0))
            c = eqx.filter_eval_shape(self._integrate, equation, time, time, lam)
            if corrects:
                moments = jnp.zeros(c.moments.shape, c.moments.dtype)
                last = LastStep(zeros, moments, jnp.zeros((), moments.dtype))
            if has_residual:
                omega = c.noise_transition.mean_omega
                gain = jnp.zeros(omega.shape, omega.dtype)
                residual = Residual(BlockLinearOperator(gain, equation.shape), zeros)
        return History.empty(self._slots, t0, y0, last, residual)

    def step(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
        solver_state: History,
        made_jump: BoolScalarLike,
    ) -> tuple[State, State, dict, History, dfx.RESULTS]:
        term, equation, lam, direction = self.unwrap(terms, y0)
        shape, history = equation.shape, solver_state
        dtype = coefficient_dtype(y0)
        s, t = (real_time(equation.t_end, x, direction, dtype) for x in (t0, t1))
        c = self._integrate(equation, s, t, lam)
        faults = self.faults(equation, c, s, lam is not None)
        linear = error_if_any(c.linear, faults, term.raises)
        value = self.splitting.evaluate(term, s, y0, args, c.root)
        known, forcing, residual = history.known(t0, made_jump), [], None
        if isinstance(model := getattr(term, "model", None), StartedModel):
            evaluate = lambda flow: self.splitting.evaluate(flow, s, y0, args, c.root)
            history, known = _continued(history, known, model, evaluate, c, s, y0, value)
        if lam is not None:
            assert isinstance(terms, ReverseSDE)
            normal = terms.normal(t0, t1, y0)
            value, forcing, residual = _forcing(shape, history, known, c, value, normal)
        nodes = history.nodes(value, s, c, known)
        rank, corrector, predictor, error = self._polynomials(
            nodes, history.last, c, equation
        )
        start = before = y0
        if history.last is not None:
            before, change, moved = _corrected(
                shape, linear, history.last, corrector, nodes, y0
            )
            start, forcing = add(before, change), [*forcing, *moved]
        base = combine(shape, [(linear, before), *forcing])

        # Order 1 stores a value only for its error estimate.
        used = 1 if self.predictor.num_nodes == 1 else len(nodes.values)
        values, polynomials = nodes.values[:used], predictor[:used]
        y1 = add(base, integral(shape, polynomials, c.moments, values))
        if self.correction.reevaluates:
            again = self.splitting.evaluate(term, t, y1, args)
            values, polynomials = [again, *nodes.values], self._reevaluated(nodes, c)
            predicted = y1
            y1 = add(base, integral(shape, polynomials, c.moments, values))
            y_error = subtract(y1, predicted)
        else:
            y_error = self._error(shape, c, predictor, error, y0, nodes.values)
        too_long = self.splitting.is_too_long(c, nodes.span())
        y_error = jtu.tree_map(lambda x: jnp.where(too_long, jnp.inf, x), y_error)

        dense_info = dict(y0=y0, y1=y1)
        if lam is None:
            direction = jnp.asarray(direction, s.dtype)
            method = equation, self.splitting, self.coordinate
            dense_info["exponential"] = Exponential(
                start, values, polynomials, c.end, direction, *method
            )
        nodes = eqx.tree_at(lambda n: n.values[0], nodes, _after(y1, nodes.values[0]))
        last = history.last and LastStep(base, c.moments, c.start)
        history = history.push(nodes, rank, t, t1, last, residual)
        return y1, y_error, dense_info, history, dfx.RESULTS.successful

    def faults(self, equation, c: StepCoefficients, s: Array, stochastic: bool):
        """What can be wrong with a step from `s`, for `error_if_any`."""
        return self.splitting.faults(equation, c, s, stochastic)

    def coordinates(self, nodes: Nodes) -> tuple[Array, Array]:
        """The nodes in the coordinate of the step, and in that of the previous step."""
        return nodes.places.coordinate, nodes.places.coordinate

    def _integrate(self, equation, s, t, lam) -> StepCoefficients:
        return self.splitting.integrate(
            equation,
            s,
            t,
            self._num_moments,
            self.coordinate,
            self._num_for_error,
            lam,
        )

    def _polynomials(
        self, nodes: Nodes, last: LastStep | None, c: StepCoefficients, equation
    ):
        """The ranks of the nodes in this step; and for each node, the polynomials of the
        previous step's corrector, of the predictor, and of the error estimate."""
        number, closest = self._num_for_error, self.correction.closest
        if c.noise is not None:
            # Noise makes values rough: their differences grow as the root of the distance.
            closest = 0.2
        coordinate, last_coordinate = self.coordinates(nodes)
        x = scaled(coordinate, c.start, c.end)
        rank = nodes.rank(x, c.start != c.end, closest)
        usable = rank < len(rank)
        if self.coordinate.is_logarithm:
            usable &= (np.arange(len(rank)) == 0) | (c.t >= equation.t_min)
        cases = [(x, usable & (rank < self.predictor.num_nodes))]

        y = scaled(nodes.places.error_coordinate, c.error_start, c.error_end)
        # The error estimate may use no other nodes.
        for_error = Nodes(nodes.values, nodes.places, usable)
        for_error = for_error.rank(y, c.error_start != c.error_end, 0.0)
        found = (for_error < len(rank)).sum(dtype=jnp.int32)
        # Order 1 is compared with order 2, and the others with the next lower.
        few = jnp.minimum(found, number) - int(self.predictor.num_nodes > 1)
        fewer = for_error < jnp.where(found > 1, few, 0)
        cases.append((y, fewer))
        last_rank = rank
        if last is not None:
            end = last_coordinate[0]
            z = scaled(last_coordinate, last.start, end)
            last_rank = nodes.rank(z, last.start != end, closest)
            cases.append((z, last_rank <= self.correction.num_older))
        # Batched, so that they are compiled once.
        every = lagrange(*(jnp.stack(x) for x in zip(*cases)))
        corrector = None if last is None else self.correction(every[2], last_rank)
        predictor = self.predictor(every[0], rank)[:, : self._num_moments]
        return rank, corrector, predictor, every[1][:, :number]

    def _error(self, shape, c: StepCoefficients, predictor, lower, y0: State, values):
        """The error estimate: the difference from polynomials of lower degree in another
        coordinate; or an a priori bound if there is only one value."""
        change = self.splitting.first_change(shape, c, y0, values[0])
        bound = combine(shape, [(jnp.abs(c.error_moments[0]), change)])
        blocks = weights(predictor, c.moments) - weights(lower, c.error_moments)
        estimate = combine(shape, list(zip(blocks, values, strict=True)))
        alone = (lower == 0).all()
        return jtu.tree_map(lambda x, y: jnp.where(alone, x, y), bound, estimate)

    def _reevaluated(self, nodes: Nodes, c: StepCoefficients):
        """The corrector's polynomials, for the evaluation at the end of the step and for
        each node."""
        x = scaled(nodes.places.coordinate, c.start, c.end)
        end = Places(c.t, c.end, c.error_end, jnp.zeros_like(c.error_end))
        # The end is at 1 even if the step has size zero.
        x = jnp.append(jnp.ones(1, x.dtype), x)
        places = jtu.tree_map(lambda a, b: jnp.append(a, b), end, nodes.places)
        nodes = Nodes([], places, jnp.append(True, nodes.stored))
        rank = nodes.rank(x, c.start != c.end, self.correction.closest)
        polynomials = lagrange(x, rank <= self.correction.num_older)
        return self.correction(polynomials, rank)[:, : self._num_moments]

    def func(
        self, terms: dfx.AbstractTerm, t0: RealScalarLike, y0: State, args: Args
    ) -> PyTree:
        return terms.vf(t0, y0, args)


def _continued(
    history: History,
    known,
    model: StartedModel,
    evaluate: Callable[[ProbabilityFlow], State],
    c: StepCoefficients,
    s: Array,
    y0: State,
    value: State,
):
    """The history and which of its slots to use. At the first evaluation of a model that
    was known in closed form before, the stored values are shifted, so that the difference
    from the closed form is extrapolated linearly; and the last step, which was that of the
    closed form, is not corrected."""
    first = model.starts(s, jnp.where(known, history.places.time, jnp.inf).min())
    if history.residual is not None:
        return history, known & ~first

    def shifted():
        difference = subtract(value, evaluate(model.closed_form))
        x = scaled(history.places.coordinate, c.start, c.end)
        share = 1 + model.slope.astype(x.dtype) * x

        def shift(stored, d):
            return stored + append_axes(share, stored.ndim).astype(d.dtype) * d[None]

        values = jtu.tree_map(shift, history.values, difference)
        last = history.last
        last = last and LastStep(y0, jnp.zeros_like(last.moments), last.start)
        return values, last

    values, last = lax.cond(first, shifted, lambda: (history.values, history.last))
    return dataclasses.replace(history, values=values, last=last), known


def _forcing(shape, history: History, known, c: StepCoefficients, value, normal):
    """For a step of a reverse diffusion: the value to interpolate; the terms added to the
    linear part, as pairs of blocks and states; and the next residual, if any."""
    forcing = [(c.noise, normal)]
    if history.residual is None:
        return value, forcing, None
    residual = history.residual(value, known.any())
    # The zeroth moment multiplies the prediction; only the residual's change is
    # interpolated.
    forcing.append((c.moments[0], subtract(value, residual)))
    later = next_residual(shape, c.noise_transition, value, residual, normal)
    return residual, forcing, later


def _corrected(shape, linear, last: LastStep, polynomials, nodes: Nodes, y0: State):
    """The corrected state at the end of the previous step, as a sum: what the linear part
    and the noise made of its start, and the integral over it. And the product of this
    step's linear part with that integral, as pairs of blocks and states: multiplying
    blocks takes less time than multiplying states."""
    known = nodes.stored[1:].any()
    polynomials = jnp.where(known, polynomials, 0)
    before = jtu.tree_map(lambda a, y: jnp.where(known, a, y), last.base, y0)
    change = integral(shape, polynomials, last.moments, nodes.values)
    operator = BlockLinearOperator(linear, shape)
    moved = jax.vmap(lambda m: (operator @ BlockLinearOperator(m, shape)).blocks)
    blocks = weights(polynomials, moved(last.moments))
    return before, change, list(zip(blocks, nodes.values, strict=True))


def _after(y1: State, value: State) -> State:
    """The value, made to depend on the state after the step. XLA then overwrites the oldest
    evaluation in place; otherwise it copies the history, as others may still read it."""
    never = ft.reduce(jnp.logical_or, [x > jnp.inf for x in jtu.tree_leaves(y1)])
    return jtu.tree_map(lambda x: jnp.where(never, jnp.inf, x), value)


def check_order(order: Any, num_nodes: Any) -> int:
    """The order as an integer, taken from `num_nodes` if `order` is not given.

    **Raises:** `ValueError` unless it is an integer from 1 to 4.
    """
    if order is None:
        order = 4 if num_nodes is None else num_nodes
    if not is_integer(order, 1, 4):
        raise ValueError(
            f"`order` must be 1, 2, 3 or 4; got {show(order)}. It is the number of "
            "evaluations that a step combines. Where the gDDIM paper's tables and code "
            "count from 0, by the degree of the polynomial (`deis_order`), it is one more."
        )
    return int(order)


def is_integer(value: Any, least: int, most: int) -> bool:
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return integer and bool(least <= value <= most)
