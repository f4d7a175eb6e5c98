import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import Args, BoolScalarLike, Level, RealScalarLike, State
from gddim_eqx._exponential import contraction, scaled, Splitting, Variable, VARIABLES
from gddim_eqx._linear import apply, BlockLinearOperator, check_state, coefficient_dtype
from gddim_eqx._misc import pin
from gddim_eqx._term import (
    AbstractReverseTerm,
    backward,
    real_times,
    ReverseSDE,
    unwrap_reverse,
)

from ._polynomial import lagrange, weights
from ._step import combine, continued, pick
from ._stochastic import init_stochastic, stochastic_step, StochasticHistory


class _History(eqx.Module):
    """The most recent predictions, in a ring."""

    times: Real[Array, " slots"]
    values: PyTree[Inexact[Array, "slots ..."]]
    # For the corrector, of the last step: what the linear part, and the noise, made of the
    # state; and the moments.
    base: State | None
    moments: Inexact[Array, "number n n *spectrum"] | None
    # How many of the slots hold predictions along the current solution.
    count: Int[Array, ""]
    # The slot that is overwritten next.
    slot: Int[Array, ""]
    # Where, in the time of `diffeqsolve`, the last step ended.
    end: Real[Array, ""]


class _ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The exponential integrator's own solution within a step, of the solver's order."""

    t0: RealScalarLike
    t1: RealScalarLike
    y0: State
    y1: State
    # What the corrector made of `y0`.
    corrected: State
    # Coefficients of the prediction's polynomial in the variable, 0 at `t0` and 1 at `t1`.
    polynomial: PyTree[Inexact[Array, "number ..."]]
    direction: RealScalarLike
    splitting: Splitting

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> State:
        del left
        if t1 is not None:
            return jtu.tree_map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        dtype, splitting = coefficient_dtype(self.y0), self.splitting
        start, end, t = (
            jnp.asarray(x * self.direction, dtype) for x in (self.t0, self.t1, t0)
        )
        readings = splitting.read(jnp.stack([start, end, t]), start, end)
        fraction = scaled(readings[2:], *readings[:2])[0]
        number = jtu.tree_leaves(self.polynomial)[0].shape[0]
        linear, blocks = splitting.step(start, t, number)
        pairs = [(fraction**i * blocks[i], pick(self.polynomial, i)) for i in range(number)]
        pairs.append((linear, self.corrected))
        y = combine(splitting.process, pairs)
        # Begin where the step before ended.
        rest = (end - t) / jnp.where(start == end, 1, end - start)

        def finish(y, y0, corrected, y1):
            y = y + rest.astype(y.dtype) * (y0 - corrected)
            return pin(t == end, y1, y)

        return jtu.tree_map(finish, y, self.y0, self.corrected, self.y1)


_default_variables: dict[str, Variable] = {"data": "clock", "noise": "time"}


def _is_integer(value: Any, least: int, most: int) -> bool:
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return integer and bool(least <= value <= most)


def _is_flow(lam: Level) -> bool:
    """Whether it is known, before running, that there is no noise."""
    return isinstance(lam, float) and lam == 0


def _interpolation(*, t0, t1, y0, y1, **flow) -> dfx.AbstractLocalInterpolation:
    if flow:
        return _ExponentialInterpolation(t0, t1, y0, y1, **flow)
    return dfx.LocalLinearInterpolation(t0=t0, t1=t1, y0=y0, y1=y1)


class GDDIM(
    dfx.AbstractAdaptiveSolver[_History | StochasticHistory],
    dfx.AbstractItoSolver[_History | StochasticHistory],
):
    r"""Generalized DDIM: an exponential multistep method for the probability flow of any
    linear diffusion, and for its reverse diffusions.

    The linear part of the equation is solved exactly, and what the model predicts is
    extrapolated by a polynomial through its most recent values. On data from a single
    point one step of any length is exact. There is one evaluation of the model per step.

    - In data space, the default, this is the initial state that the model predicts. Once
        the model has been evaluated at the end of a step, the step is corrected: its
        polynomial is made to pass through the new value too. That costs no evaluation;
        the last step stays as it was. For VP and order 2 without corrector the split is
        that of DPM-Solver++.
    - In noise space it is the noise prediction in the frame $R_t$, in which it hardly
        moves: the paper's method, equations 18 (order 1, which for VP is DDIM) and 19.
        `GDDIM(3, "noise")` on the times of `time_grid(process, n, "quadratic")` is its
        best sampler.

    Few steps are safe because predictions are polynomials in a variable that slows down
    on the way, so that none is extrapolated by more than was seen before.

    All coefficients are computed in the step, from its own time and those of the stored
    evaluations, so steps may be uneven, rejected or clipped, and time may run in either
    direction: backward to sample, forward to encode. (Noise space may start from time 0;
    data space needs some noise to start from, for example at `process.t_min`.)

    The first steps have fewer values to use and are of lower order. As all steps are
    shortened together the error of the whole is therefore of second order in the end,
    with a corrector of third. But predictions hardly change near the start of sampling: in
    noise space, solves from the prior that are given exact earlier values have the same
    error to 1% under CLD, and to a quarter under VP.

    The error estimate is the difference between polynomials in time through all values
    and through one less. It costs no evaluation. (For order 1: through one more. On the
    very first step it is the whole contribution of the model, which is safe but coarse.)
    Dense output is of the same order as the solver. To spend few evaluations well, rather
    than to keep a tolerance, take fixed steps: [`gddim_eqx.adapted_grid`][] finds some.

    On [`gddim_eqx.reverse_sde`][] this is stochastic gDDIM (paper, proposition 6), with
    the exact mean and covariance of every step, the last one included: for one data point
    samples have the right distribution whatever the grid and the level of noise. The noise
    is made of the Brownian path's increments such that solutions converge along the path,
    with strong order 1. In noise space higher orders help only while there is little noise;
    with `lam` near 1 and few steps (20, under CLD) order 3 and 4 are unstable there.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{zhang2023gddim,
            title={{gDDIM}: Generalized denoising diffusion implicit models},
            author={Zhang, Qinsheng and Tao, Molei and Chen, Yongxin},
            booktitle={International Conference on Learning Representations},
            year={2023},
        }
        ```
    """

    num_nodes: int = eqx.field(static=True)
    space: Literal["data", "noise"] = eqx.field(static=True)
    corrector: int | None = eqx.field(static=True)
    variable: Variable | None = eqx.field(static=True)
    factor: Literal["R", "cholesky"] = eqx.field(static=True)
    reevaluate: bool = eqx.field(static=True)

    term_structure: ClassVar = AbstractReverseTerm
    interpolation_cls: ClassVar[Callable[..., dfx.AbstractLocalInterpolation]] = (
        staticmethod(_interpolation)
    )

    def __init__(
        self,
        order: int | None = None,
        space: Literal["data", "noise"] = "data",
        corrector: int | None = None,
        *,
        variable: Variable | None = None,
        factor: Literal["R", "cholesky"] = "R",
        reevaluate: bool = False,
        num_nodes: int | None = None,
    ):
        r"""**Arguments:**

        - `order`: the number of model evaluations that are combined, 1 to 4; the
            paper's q. By default 4.
        - `space`: what is extrapolated: `"data"`, the initial state that the model
            predicts; or `"noise"`, the noise, as in the paper.
        - `corrector`: how many older evaluations, beside the new one, correct the end of
            the last step once the model has been evaluated there, 0 (for no correction)
            to `order`. By default `order - 1` in data space, and none in noise space, where
            it is unstable for few steps.
        - `variable`: the variable in which predictions are polynomials: `"time"` (the
            paper's, and the default in noise space), `"sqrt"` or `"log"` of it, or
            `"clock"` (the default in data space), which slows down on the way.
        - `factor`: in which frame noise predictions are extrapolated: `"R"` for the
            paper's $R_t$; `"cholesky"` for $L_t$, which the paper compares with, and
            which is far worse for CLD. Only for the probability flow in noise space. It
            need not be the frame in which the model predicts.
        - `reevaluate`: correct at the end of every step, with an extra evaluation there:
            two a step. The paper's predictor-corrector.
        - `num_nodes`: the field in which `order` is kept, as `order` is a method of every
            solver. It counts where `order` is not given, for `dataclasses.replace`.

        **Raises:** `ValueError` for other values, or values that exclude each other.
        """
        if order is None:
            order = 4 if num_nodes is None else num_nodes
        if not _is_integer(order, 1, 4):
            raise ValueError(f"`order` must be 1, 2, 3 or 4; got {order!r}.")
        if space not in ("data", "noise"):
            raise ValueError(f"`space` must be 'data' or 'noise'; got {space!r}.")
        default = order - 1 if space == "data" or reevaluate else 0
        if corrector is not None and not _is_integer(corrector, 0, order):
            raise ValueError(
                "`corrector` must be an integer from 0 (for none) to `order`, which is "
                f"{order}; got {corrector!r}."
            )
        if variable not in (None, *VARIABLES):
            raise ValueError(
                f"`variable` must be one of {', '.join(map(repr, VARIABLES))}; got "
                f"{variable!r}."
            )
        if factor not in ("R", "cholesky"):
            raise ValueError(f"`factor` must be 'R' or 'cholesky'; got {factor!r}.")
        if factor == "cholesky" and space == "data":
            raise ValueError(
                "`factor` is the frame of noise predictions. For the frame L_t take "
                "`GDDIM(space='noise', factor='cholesky')`."
            )
        if reevaluate and (corrector == 0 or default == 0 and corrector is None):
            raise ValueError(
                "`reevaluate` is for the corrector, but there is none. Give `corrector`, "
                "from 1 to `order`."
            )
        self.num_nodes = int(order)
        self.space = space
        # `None` for what is the default, so that solvers that do the same are equal.
        self.corrector = None if corrector in (None, default) else int(corrector)
        self.variable = None if variable == _default_variables[space] else variable
        self.factor = factor
        self.reevaluate = bool(reevaluate)

    def __repr__(self) -> str:
        # As it is made: `order` is the argument of `num_nodes`.
        names = ("space", "corrector", "variable", "factor", "reevaluate")
        rest = [f"{name}={getattr(self, name)!r}" for name in names]
        return f"GDDIM({', '.join([f'order={self.num_nodes}', *rest])})"

    @property
    def _corrector(self) -> int:
        """How many older evaluations correct the end of a step."""
        if self.corrector is not None:
            return self.corrector
        return self.num_nodes - 1 if self.space == "data" or self.reevaluate else 0

    @property
    def _variable(self) -> Variable:
        return self.variable or _default_variables[self.space]

    def order(self, terms):
        # What the corrector makes of a step replaces it.
        return self._corrector + 1 if self._corrector else self.num_nodes

    def strong_order(self, terms):
        return 1

    def error_order(self, terms):
        return max(self.num_nodes, 2) if _is_flow(unwrap_reverse(terms)[1]) else 1.5

    @property
    def _slots(self) -> int:
        # Order 1 keeps one value for its error estimate.
        return max(self.num_nodes - 1, self._corrector, 1)

    @property
    def _number(self) -> int:
        """How many moments the predictor and the corrector need."""
        return self._slots + 1 if self._corrector else self.num_nodes

    def init(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
    ) -> _History | StochasticHistory:
        del t1, args
        flow, lam, _ = unwrap_reverse(terms)
        process = flow.process
        y0 = check_state(y0, process.num_components, process.shape, "The state `y0`")
        if self.space == "noise" and not _is_flow(lam):
            other = GDDIM(self.num_nodes, "noise")
            if self != other:
                raise ValueError(
                    "In noise space the options of `GDDIM` are for the probability flow "
                    f"only, but these terms have noise, lam={lam}. Use `GDDIM()`, or "
                    f"`GDDIM({self.num_nodes}, 'noise')`; got {self}."
                )
            assert isinstance(terms, ReverseSDE)
            return init_stochastic(self._slots, terms, t0, y0)
        slots, dtype = self._slots, coefficient_dtype(y0)
        base = moments = None
        if self._corrector and not self.reevaluate:
            base = jtu.tree_map(jnp.zeros_like, y0)
            time = jax.ShapeDtypeStruct((), dtype)
            carried = lambda t: (process.factor(t) @ process.transition(t, t)).blocks
            shape = eqx.filter_eval_shape(carried, time).shape
            moments = jnp.zeros((self._number, *shape), dtype)
        return _History(
            times=jnp.zeros(slots, dtype),
            values=jtu.tree_map(lambda y: jnp.zeros((slots, *y.shape), y.dtype), y0),
            base=base,
            moments=moments,
            count=jnp.zeros((), jnp.int32),
            slot=jnp.zeros((), jnp.int32),
            end=jnp.asarray(t0),
        )

    def step(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
        solver_state: _History | StochasticHistory,
        made_jump: BoolScalarLike,
    ) -> tuple[State, State, dict, _History | StochasticHistory, dfx.RESULTS]:
        if isinstance(solver_state, StochasticHistory):
            assert isinstance(terms, ReverseSDE)
            return stochastic_step(
                self.num_nodes, terms, t0, t1, y0, args, solver_state, made_jump
            )
        flow, lam, direction = unwrap_reverse(terms)
        process, history, slots = flow.process, solver_state, self._slots
        splitting = Splitting(process, self.space, self.factor, self._variable)
        s, t = real_times(process, t0, t1, direction, coefficient_dtype(y0))
        value = splitting.predict(flow, s, y0, args)

        count = continued(history.count, history.end, t0, made_jump)
        # Node 0 is the new prediction; the others are the slots.
        age = (history.slot - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots + 1
        age = jnp.concatenate([jnp.zeros(1, jnp.int32), age])
        times = jnp.concatenate([s[None], jnp.where(age[1:] <= count, history.times, s)])
        values = [value, *(pick(history.values, k) for k in range(slots))]
        readings = splitting.read(jnp.concatenate([times, t[None]]), s, t)
        now, readings, then = readings[0], readings[:-1], readings[-1]

        # By node and power: of the corrector of the last step, and of this step.
        used, number = jnp.minimum(count, max(self.num_nodes - 1, 1)), self._number
        before = readings[(history.slot - 1) % slots + 1]
        before = jnp.where(count > 0, before, then)
        nodes = scaled(readings, now, then)
        corrector, wide = jax.vmap(lagrange)(
            jnp.stack([scaled(readings, before, now), nodes]),
            jnp.stack([age <= jnp.minimum(count, self._corrector), age <= used]),
        )

        start = y0
        if history.base is not None and history.moments is not None:
            coefficients = weights(corrector, history.moments)
            corrected = combine(process, list(zip(coefficients, values)))
            start = jtu.tree_map(
                lambda y, a, b: jnp.where(count > 0, a + b, y), y0, history.base, corrected
            )

        step = None
        if not _is_flow(lam):
            s, t = backward(s, t)
            step = contraction(process, s, t, lam)
        linear, integrals = splitting.step(s, t, number, step)
        base = combine(process, [(linear, start)])
        if step is not None:
            assert isinstance(terms, ReverseSDE)
            root = process.factor(t) @ BlockLinearOperator(step.spread, process.shape)
            noise = apply(root, terms.normal(t0, t1, y0))
            base = jtu.tree_map(lambda a, b: a + b, base, noise)

        if self.num_nodes == 1:
            # Its one value is used even if there are others.
            polynomials = jnp.zeros_like(wide).at[0, 0].set(1)[:number, :number]
        else:
            polynomials = wide
        coefficients = weights(polynomials, integrals)
        y1 = combine(process, list(zip(coefficients, values)))
        y1 = jtu.tree_map(lambda a, b: a + b, base, y1)

        if self.reevaluate:
            values = [splitting.predict(flow, t, y1, args), *values]
            used = jnp.minimum(count, self._corrector - 1)
            polynomials = lagrange(
                jnp.concatenate([jnp.ones_like(s)[None], nodes]),
                jnp.concatenate([jnp.ones(1, bool), age <= used]),
            )[:, :number]
            coefficients = weights(polynomials, integrals)
            corrected = combine(process, list(zip(coefficients, values)))
            corrected = jtu.tree_map(lambda a, b: a + b, base, corrected)
            y_error = jtu.tree_map(lambda a, b: a - b, corrected, y1)
            y1 = corrected
        else:
            # Where no error is used XLA drops all this, and what order 1 stores for it. In
            # a variable that slows down long steps would seem accurate, so it is time.
            in_time = dataclasses.replace(splitting, variable="time")
            _, blocks = in_time.step(s, t, max(self.num_nodes, 2), step)
            all_used, fewer = jax.vmap(lagrange, (None, 0))(
                scaled(times, s, t), jnp.stack([age <= used, age < used])
            )
            polynomials_of_error = (all_used - fewer)[:, : max(self.num_nodes, 2)]
            coefficients = weights(polynomials_of_error, blocks)
            y_error = combine(process, list(zip(coefficients, values)))

        dense_info = dict(y0=y0, y1=y1)
        if step is None:

            def polynomial(*leaves):
                rows = polynomials.astype(leaves[0].dtype)
                columns = [sum(c * x for c, x in zip(row, leaves)) for row in rows.T]
                return jnp.stack(columns)

            dense_info |= dict(
                corrected=start,
                polynomial=jtu.tree_map(polynomial, *values[: polynomials.shape[0]]),
                direction=jnp.asarray(direction, s.dtype),
                splitting=splitting,
            )
        stored, still = history.base is not None, (s == t).astype(count.dtype)
        history = _History(
            times=history.times.at[history.slot].set(s),
            values=jtu.tree_map(
                lambda x, new: x.at[history.slot].set(new), history.values, value
            ),
            base=base if stored else None,
            moments=integrals if stored else None,
            # After a step of no length the same slot is overwritten again.
            count=jnp.minimum(count + 1 - still, slots - still),
            slot=(history.slot + 1 - still) % slots,
            end=jnp.asarray(t1),
        )
        return y1, y_error, dense_info, history, dfx.RESULTS.successful

    def func(
        self, terms: dfx.AbstractTerm, t0: RealScalarLike, y0: State, args: Args
    ) -> PyTree:
        return terms.vf(t0, y0, args)
