import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int, PyTree

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
    StepCoefficients,
    weighted_sum,
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
from gddim_eqx._misc import error_if_any
from gddim_eqx._process import AbstractProcess
from gddim_eqx._term import (
    LinearPart,
    ProbabilityFlow,
    real_time,
    ReverseSDE,
    Semilinear,
    StartedModel,
    unwrap_reverse,
)

from ._corrector import AbstractCorrector
from ._history import History, LastStep, Nodes, Places, rank_by_distance
from ._predictor import AbstractPredictor


class Problem(NamedTuple):
    """A semilinear problem, as its parts."""

    term: ProbabilityFlow | Semilinear
    """The term whose evaluations are interpolated."""
    equation: AbstractProcess | LinearPart
    """The linear part: a process, or that of a semilinear equation."""
    direction: RealScalarLike = 1
    """1 or -1, which maps the solver's times to those of the term when multiplied."""
    lam: Stochasticity | None = None
    """The stochasticity; `None` for an ordinary differential equation."""
    normal: Callable[[RealScalarLike, RealScalarLike, State], State] | None = None
    """The standard normals of a step, a function of its ends and its state; `None` for an
    ordinary differential equation."""

    @staticmethod
    def of_diffusion(terms: dfx.AbstractTerm) -> "Problem":
        """The problem of [`gddim_eqx.ProbabilityFlow`][] or [`gddim_eqx.reverse_sde`][].

        **Raises:** `ValueError` for other terms.
        """
        flow, lam, direction = unwrap_reverse(terms)
        normal = None
        if lam is not None:
            assert isinstance(terms, ReverseSDE)
            normal = terms.normal
        return Problem(flow, flow.process, direction, lam, normal)


class _Polynomials(NamedTuple):
    """The polynomials of a step: for each node, the coefficients of the one that multiplies
    its value, lowest power first."""

    rank: Int[Array, " nodes"]
    """The ranks of the nodes in this step."""
    usable: Bool[Array, " nodes"]
    """Which of them may be interpolated."""
    predictor: Inexact[Array, "nodes number"]
    corrector: Inexact[Array, "nodes nodes"] | None
    """For the end of the previous step."""


class AbstractExponentialMultistep(
    dfx.AbstractAdaptiveSolver[History], dfx.AbstractItoSolver[History]
):
    """An exponential multistep method for semilinear equations, such as probability flows
    and reverse diffusions.

    A step solves the linear part of the equation exactly, and replaces the remainder by a
    polynomial through past evaluations of the model. Subclasses specify the linear part
    and the interpolated quantity (`splitting`), the coordinate of the polynomials
    (`coordinate`), the polynomials (`predictor`), and how the end of a step is corrected
    (`corrector`).
    """

    splitting: eqx.AbstractVar[AbstractSplitting]
    coordinate: eqx.AbstractVar[AbstractCoordinate]
    predictor: eqx.AbstractVar[AbstractPredictor]
    corrector: eqx.AbstractVar[AbstractCorrector]

    @abc.abstractmethod
    def unwrap(self, terms: dfx.AbstractTerm, y: State) -> Problem:
        """The problem that the terms define, for states like `y`.

        **Raises:** `ValueError` for terms that the solver does not support.
        """

    interpolation_cls: ClassVar[Callable[..., dfx.AbstractLocalInterpolation]] = (
        staticmethod(interpolation)
    )

    def order(self, terms):
        # A step returns the prediction, but the next one starts from its correction.
        older = self.corrector.num_older
        return older + 1 if older else self.predictor.num_nodes

    def strong_order(self, terms):
        return 1

    def error_order(self, terms):
        stochastic = isinstance(terms, ReverseSDE) and unwrap_reverse(terms)[1] is not None
        return 1.5 if stochastic else self._num_for_error

    @property
    def stages(self) -> tuple[float, ...]:
        """Where in a step the model is evaluated: 0 is its start, and 1 its end."""
        return (0.0, 1.0) if self.corrector.reevaluates else (0.0,)

    @property
    def _slots(self) -> int:
        # Order 1 stores one evaluation for its error estimate.
        return max(self.predictor.num_nodes - 1, self.corrector.num_older, 1)

    @property
    def _num_moments(self) -> int:
        """The number of moments that the predictor and the corrector need."""
        corrects = self.corrector.num_older > 0
        return self._slots + 1 if corrects else self.predictor.num_nodes

    @property
    def _num_for_error(self) -> int:
        """The number of moments that the error estimate needs."""
        return max(self.predictor.num_nodes, 2)

    @property
    def _numbers(self):
        return eqx.filter((self.coordinate, self.corrector), eqx.is_array_like)

    def init(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
    ) -> History:
        del t1, args
        problem = self.unwrap(terms, y0)
        equation = problem.equation
        y0 = check_state(y0, equation.num_components, equation.shape, "The state `y0`")
        last = None
        if self.corrector.num_older > 0 and not self.corrector.reevaluates:
            time = jax.ShapeDtypeStruct((), coefficient_dtype(y0))
            c = eqx.filter_eval_shape(self._coefficients, problem, time, time)
            zeros = jtu.tree_map(jnp.zeros_like, (y0, c.moments, c.start))
            base, moments, start = zeros
            last = LastStep(base, moments, start, self._numbers)
        return History.empty(self._slots, t0, y0, last)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        problem = self.unwrap(terms, y0)
        return self.advance(problem, t0, t1, y0, args, solver_state, made_jump)

    def advance(
        self,
        problem: Problem,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
        history: History,
        made_jump: BoolScalarLike,
    ) -> tuple[State, State, dict, History, dfx.RESULTS]:
        """A step, given the problem. Otherwise as `step`."""
        term, equation, direction, lam, normal = problem
        shape, dtype = equation.shape, coefficient_dtype(y0)
        s, t = (real_time(equation.t_end, x, direction, dtype) for x in (t0, t1))
        c = self._coefficients(problem, s, t)
        faults = self.splitting.faults(equation, c, s, lam is not None)
        linear = error_if_any(c.linear, faults, term.raises)

        # The history, and the new evaluation.
        evaluate = ft.partial(self.splitting.evaluate, y=y0, args=args, root=c.root)
        value, known = evaluate(term, s), history.known(t0, made_jump)
        if isinstance(term, ProbabilityFlow) and isinstance(term.model, StartedModel):
            closed_form = ft.partial(evaluate, term.model.closed_form, s)
            history = self._started(
                history, known, term.model, closed_form, c, s, y0, value
            )
        nodes = history.nodes(value, s, c, known)
        polynomials = self._polynomials(nodes, history.last, c, equation)

        noise = []
        if normal is not None:
            assert c.noise is not None
            noise = [(c.noise, normal(t0, t1, y0))]
        start, base = _propagated(
            shape, linear, noise, history.last, polynomials.corrector, nodes, y0
        )
        integrated = self._integrated(problem, c, polynomials, nodes, base, y0, args)
        y1, y_error, values, interpolant = integrated
        too_long = self.splitting.is_too_long(c, nodes.span())
        y_error = jtu.tree_map(lambda x: jnp.where(too_long, jnp.inf, x), y_error)

        dense_info = dict(y0=y0, y1=y1)
        # On reverse diffusions, dense output is linear.
        if lam is None:
            direction = jnp.asarray(direction, s.dtype)
            method = equation, self.splitting, self.coordinate
            dense_info["exponential"] = Exponential(
                start, values, interpolant, c.end, direction, *method
            )
        last = None
        if history.last is not None:
            last = LastStep(base, c.moments, c.start, self._numbers)
        history = history.push(_after(y1, value), nodes, polynomials.rank, t, t1, last)
        return y1, y_error, dense_info, history, dfx.RESULTS.successful

    def _coefficients(self, problem: Problem, s, t) -> StepCoefficients:
        return self.splitting.integrate(
            problem.equation,
            s,
            t,
            self._num_moments,
            self.coordinate,
            self._num_for_error,
            problem.lam,
        )

    def _polynomials(
        self, nodes: Nodes, last: LastStep | None, c: StepCoefficients, equation
    ) -> _Polynomials:
        # Noise makes values rough: differences grow as the square root of the distance.
        closest = self.corrector.closest if c.noise is None else 0.2
        at = nodes.places.coordinate
        steps, numbers = [(self.coordinate, c.start, c.end)], [self.predictor.num_nodes]
        correct = self.corrector
        if last is not None:
            parts = self.coordinate, self.corrector
            coordinate, correct = eqx.combine(last.parts, parts)
            steps.append((coordinate, last.start, at[0]))
            numbers.append(correct.num_older + 1)

        def stack(x, *others):
            return jnp.stack([x, *others]) if eqx.is_array_like(x) else x

        @eqx.filter_vmap
        def place(step):
            coordinate, start, end = step
            x = coordinate.rescale(at, start, end)
            moves = start != end
            return x, rank_by_distance(x, nodes.places, nodes.stored, moves, closest)

        # Row 0 is this step, and row 1 the previous one: batched, to be compiled once.
        x, ranks = place(jtu.tree_map(stack, *steps))
        valid = ranks < np.array(numbers, np.int32)[:, None]
        rank = ranks[0]
        usable = rank < len(rank)
        if self.coordinate.is_logarithm:
            usable &= (np.arange(len(rank)) == 0) | (c.t >= equation.t_min)
            valid = valid.at[0].set(valid[0] & usable)
        predictor, *rest = lagrange(x, valid)
        corrector = None if last is None else correct(rest[0], ranks[1])
        used = jnp.where(usable, rank, len(rank))
        predictor = self.predictor(predictor, used)[:, : self._num_moments]
        return _Polynomials(rank, usable, predictor, corrector)

    def _integrated(
        self,
        problem: Problem,
        c: StepCoefficients,
        polynomials: _Polynomials,
        nodes: Nodes,
        base: State,
        y0: State,
        args: Args,
    ):
        """The state after the step: `base` plus the integral of the interpolated part. And
        the error estimate, and the interpolated values and their polynomials."""
        shape = problem.equation.shape
        # Order 1 stores a value only for its error estimate.
        used = 1 if self.predictor.num_nodes == 1 else None
        values, predictor = nodes.values[:used], polynomials.predictor[:used]
        y1 = add(base, integral(shape, predictor, c.moments, values))
        if not self.corrector.reevaluates:
            y_error = self._error(shape, c, polynomials, y0, nodes)
            return y1, y_error, values, predictor
        at_end = self.splitting.evaluate(problem.term, c.t, y1, args)
        values = [at_end, *nodes.values]
        corrector = self._reevaluated(nodes, c)
        corrected = add(base, integral(shape, corrector, c.moments, values))
        return corrected, subtract(corrected, y1), values, corrector

    def _lower(self, nodes: Nodes, usable: Array, c: StepCoefficients):
        """The polynomials that the error estimate compares with: of lower degree, in
        another coordinate, and through a subset of the same nodes."""
        places, number = nodes.places.error_coordinate, self._num_for_error
        x = self.splitting.error_coordinate.rescale(places, c.error_start, c.error_end)
        moves = c.error_start != c.error_end
        rank = rank_by_distance(x, nodes.places, usable, moves, 0.0)
        found = (rank < len(rank)).sum(dtype=jnp.int32)
        # Order 1 is compared with order 2, and the others with the next lower.
        few = jnp.minimum(found, number) - int(self.predictor.num_nodes > 1)
        return lagrange(x, rank < jnp.where(found > 1, few, 0))[:, :number]

    def _started(
        self,
        history: History,
        known: Array,
        model: StartedModel,
        closed_form: Callable[[], State],
        c: StepCoefficients,
        s: Array,
        y0: State,
        value: State,
    ) -> History:
        """The history for a model that may have been known in closed form so far. At its
        first evaluation the stored values are shifted, so that the difference from the
        closed form is extrapolated linearly; and the last step, which was that of the
        closed form, is not corrected."""
        first = model.starts(s, jnp.where(known, history.places.time, jnp.inf).min())

        def shifted():
            difference = subtract(value, closed_form())
            x = self.coordinate.rescale(history.places.coordinate, c.start, c.end)
            share = 1 + model.slope.astype(x.dtype) * x

            def shift(stored, d):
                return stored + append_axes(share, stored.ndim).astype(d.dtype) * d[None]

            values = jtu.tree_map(shift, history.values, difference)
            last = history.last
            if last is not None:
                last = last._replace(base=y0, moments=jnp.zeros_like(last.moments))
            return values, last

        values, last = lax.cond(first, shifted, lambda: (history.values, history.last))
        return dataclasses.replace(history, values=values, last=last)

    def _error(self, shape, c: StepCoefficients, polynomials, y0: State, nodes: Nodes):
        """The error estimate: the difference from polynomials of lower degree in another
        coordinate; or an a priori bound if there is only one value."""
        change = self.splitting.first_change(shape, c, y0, nodes.values[0])
        bound = combine(shape, [(jnp.abs(c.error_moments[0]), change)])
        lower = self._lower(nodes, polynomials.usable, c)
        blocks = weights(polynomials.predictor, c.moments)
        blocks = blocks - weights(lower, c.error_moments)
        estimate = weighted_sum(shape, blocks, nodes.values)
        alone = (lower == 0).all()
        return jtu.tree_map(lambda x, y: jnp.where(alone, x, y), bound, estimate)

    def _reevaluated(self, nodes: Nodes, c: StepCoefficients):
        """The corrector's polynomials, for the evaluation at the end of the step and for
        each node."""
        x = self.coordinate.rescale(nodes.places.coordinate, c.start, c.end)
        end = Places(c.t, c.end, c.error_end, jnp.zeros_like(c.error_end))
        # The end is at 1 even if the step has size zero.
        x = jnp.append(jnp.ones(1, x.dtype), x)
        places = jtu.tree_map(lambda a, b: jnp.append(a, b), end, nodes.places)
        stored, closest = jnp.append(True, nodes.stored), self.corrector.closest
        rank = rank_by_distance(x, places, stored, c.start != c.end, closest)
        polynomials = lagrange(x, rank <= self.corrector.num_older)
        return self.corrector(polynomials, rank)[:, : self._num_moments]

    def func(
        self, terms: dfx.AbstractTerm, t0: RealScalarLike, y0: State, args: Args
    ) -> PyTree:
        return terms.vf(t0, y0, args)


def _propagated(shape, linear, noise, last: LastStep | None, polynomials, nodes, y0):
    """The corrected state at the start of the step; and what the linear part makes of it,
    plus the noise."""
    if last is None:
        return y0, combine(shape, [(linear, y0), *noise])
    known = nodes.stored[1:].any()
    polynomials = jnp.where(known, polynomials, 0)
    before = jtu.tree_map(lambda a, y: jnp.where(known, a, y), last.base, y0)
    change = integral(shape, polynomials, last.moments, nodes.values)
    # Multiplying blocks takes less time than multiplying states.
    operator = BlockLinearOperator(linear, shape)
    moved = jax.vmap(lambda m: (operator @ BlockLinearOperator(m, shape)).blocks)
    moved = weighted_sum(shape, weights(polynomials, moved(last.moments)), nodes.values)
    return add(before, change), add(combine(shape, [(linear, before), *noise]), moved)


def _after(y1: State, value: State) -> State:
    """The value, made to depend on the state after the step. XLA then overwrites the oldest
    evaluation in place; otherwise it copies the history, as others may still read it."""
    never = ft.reduce(jnp.logical_or, [x > jnp.inf for x in jtu.tree_leaves(y1)])
    return jtu.tree_map(lambda x: jnp.where(never, jnp.inf, x), value)
