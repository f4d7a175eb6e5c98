from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Real

from gddim_eqx._custom_types import RealScalarLike
from gddim_eqx._exponential import AbstractCoordinate, Clock, interpolation, slowing
from gddim_eqx._linear import coefficient_dtype
from gddim_eqx._misc import error_if_any, is_integer, show
from gddim_eqx._process import AbstractProcess, require_process
from gddim_eqx._term import ProbabilityFlow, real_time, started_flow, StartedModel

from ._corrector import AbstractCorrector
from ._gddim import GDDIM
from ._history import History
from ._multistep import Problem
from ._predictor import AbstractPredictor


class LearnedGDDIM(dfx.AbstractItoSolver[History]):
    r"""[`gddim_eqx.GDDIM`][] on a fixed time grid, with learned corrections for each step.
    From [`gddim_eqx.fit_solver`][].

    A step of an exponential multistep method adds $\sum_{ij} A_{ij} M_i U_j$ to the state,
    with the moments $M_i$ and the coefficients $A_{ij}$ of the Lagrange polynomials. To
    the coefficients of the first two moments this adds corrections, whose sum over the
    nodes is subtracted. So it is always zero: whatever the corrections are, every step is
    exact if the data are a single point. With all parameters zero, this is `solver`.

    [`gddim_eqx.sample`][] and [`gddim_eqx.generate`][] take its times from it. For
    `diffrax.diffeqsolve` pass `t0=solver.ts[0]`, `t1=solver.ts[-1]` and
    `stepsize_controller=diffrax.StepTo(solver.ts)`. [`gddim_eqx.checkpoints.save`][] saves
    it.

    ??? cite "Reference"

        Additive corrections: A. Frolov et al., *GAS: Improving Discretization of Diffusion
        ODEs via Generalized Adversarial Solver*, ICLR 2026.
    """

    solver: GDDIM
    process: AbstractProcess
    ts: Real[Array, " times"]
    predictor: Float[Array, "steps nodes powers"]
    corrector: Float[Array, "steps older powers"]
    log_rates: Float[Array, " steps"]
    shifts: Float[Array, " steps"]
    data: Any
    num_free: int = eqx.field(static=True)
    slope: Float[Array, ""] | None

    stages: ClassVar[tuple[float, ...]] = (0.0,)
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., dfx.AbstractLocalInterpolation]] = (
        staticmethod(interpolation)
    )

    def __init__(
        self,
        solver: GDDIM,
        process: AbstractProcess,
        ts: Real[Array, " times"],
        predictor: Float[Array, "steps nodes powers"] | None = None,
        corrector: Float[Array, "steps older powers"] | None = None,
        log_rates: Float[Array, " steps"] | None = None,
        shifts: Float[Array, " steps"] | None = None,
        data: Any = None,
        num_free: int = 0,
        slope: RealScalarLike | None = None,
    ):
        """**Arguments:**

        - `solver`: what is corrected, without `reevaluate`.
        - `process`: the forward process.
        - `ts`: the times.
        - `predictor`: for each step and node, the newest first, the corrections of the
            predictor's coefficients of the zeroth and first moment, before their mean over
            the nodes is subtracted.
        - `corrector`: the same for the corrector at the end of each step, where its newest
            node is. That of the last step is not used.
        - `log_rates`: for each step, the logarithm of the factor that multiplies the rate
            of the interpolation coordinate. Empty unless that is `"clock"`.
        - `shifts`: for each step, the logarithm of the factor that multiplies the time the
            model is given.
        - `data`: [`gddim_eqx.NormalData`][] or a [`gddim_eqx.GaussianMixture`][], whose
            predictions replace those of the model in the first steps, as in
            [`gddim_eqx.GaussianStart`][].
        - `num_free`: the number of these steps.
        - `slope`: as in [`gddim_eqx.GaussianStart`][]; by default 0.

        All corrections are zero by default.

        **Raises:** `ValueError` for a solver that cannot be corrected, or arrays of other
        shapes.
        """
        if not isinstance(solver, GDDIM):
            raise ValueError(f"`solver` must be a `GDDIM()`; got {show(solver)}.")
        if solver.corrector.reevaluates:
            raise ValueError("Corrections are learned without `reevaluate`.")
        require_process(process)
        self.solver, self.process = solver, process
        self.ts = jnp.asarray(ts)
        steps, dtype = self.ts.shape[0] - 1, self.ts.dtype
        older = solver.corrector.num_older
        shapes = {
            "predictor": (steps, solver.predictor.num_nodes, 2),
            "corrector": (steps, older + 1 if older else 0, 2),
            "log_rates": (steps if isinstance(solver.coordinate, Clock) else 0,),
            "shifts": (steps,),
        }
        given = dict(zip(shapes, (predictor, corrector, log_rates, shifts)))
        for name, shape in shapes.items():
            value = given[name]
            value = jnp.zeros(shape, dtype) if value is None else jnp.asarray(value)
            if value.shape != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape} for this solver and {steps} steps; "
                    f"got {value.shape}."
                )
            setattr(self, name, value)
        most = 0 if data is None else steps - 1
        if not is_integer(num_free, 0 if data is None else 1, most):
            raise ValueError(
                f"`num_free` must be an integer from 1 to {steps - 1}, and 0 without "
                f"`data`; got {show(num_free)} with `data` {show(data)}."
            )
        if data is not None:
            if not hasattr(data, "model"):
                raise ValueError(f"`data` must be a `NormalData(...)`; got {show(data)}.")
            data.model(process, "data")  # Checks the shape.
            slope = jnp.asarray(0.0 if slope is None else slope, dtype)
        elif slope is not None:
            raise ValueError(f"`slope` is that of a start from `data`; got {show(slope)}.")
        self.data, self.num_free, self.slope = data, int(num_free), slope

    @property
    def num_evaluations(self) -> int:
        """The number of evaluations of the model."""
        return self.ts.shape[0] - 1 - self.num_free

    def order(self, terms):
        return 1

    def strong_order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args) -> History:
        self._checked(terms, y0)
        solver = self._solver(jnp.zeros((), jnp.int32), coefficient_dtype(y0))
        return solver.init(terms, t0, t1, y0, args)

    def _checked(self, terms, y) -> Problem:
        problem = self.solver.unwrap(terms, y)
        if problem.equation != self.process:
            raise ValueError(
                f"This solver was learned for {show(self.process)}; got "
                f"{show(problem.equation)}."
            )
        assert isinstance(problem.term, ProbabilityFlow)
        if isinstance(problem.term.model, StartedModel):
            raise ValueError(
                "A learned solver has its own start, or none: pass the flow without one. "
                "To learn a solver with a start, use `fit_solver(flow, u, start=start)`."
            )
        if problem.lam is not None:
            raise ValueError(
                "Learned solvers minimise the distance to the endpoint of the probability "
                "flow; got a reverse diffusion, whose endpoint depends on the noise of "
                "every step. Use `GDDIM()`."
            )
        return problem

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        problem, dtype = self._checked(terms, y0), coefficient_dtype(y0)
        ends = t0, t1
        s, t = (real_time(self.process.t_end, x, problem.direction, dtype) for x in ends)
        # As the solve has rounded them.
        ts = self.ts.astype(jnp.result_type(t0)).astype(dtype)
        index = jnp.argmin(jnp.abs(ts[:-1] - s)).astype(jnp.int32)
        near = lambda a, b: jnp.abs(a - b) <= 8 * jnp.finfo(dtype).eps * ts.max()
        own = near(ts[index], s) & near(ts[index + 1], t)
        assert isinstance(problem.term, ProbabilityFlow)
        elsewhere = ~own & (s != t), _elsewhere
        t0 = error_if_any(jnp.asarray(t0), [elsewhere], problem.term.raises)
        problem = problem._replace(term=self._flow(problem.term, index, dtype))
        solver = self._solver(index, dtype)
        return solver.advance(problem, t0, t1, y0, args, solver_state, made_jump)

    def _flow(self, flow: ProbabilityFlow, index, dtype) -> ProbabilityFlow:
        """The flow of a step."""
        model = _Shifted(flow.model, self.process, _pick(self.shifts, index, dtype))
        flow = eqx.tree_at(lambda flow: flow.model, flow, model)
        if self.data is None:
            return flow
        assert self.slope is not None
        boundary = self.ts[self.num_free - 1 : self.num_free + 1].mean()
        return started_flow(
            flow, self.data, boundary.astype(dtype), self.slope.astype(dtype)
        )

    def _solver(self, index: Int[Array, ""], dtype) -> GDDIM:
        """The solver of a step."""
        coordinate = self.solver.coordinate
        predictor, corrector = self.solver.predictor, self.solver.corrector
        if isinstance(coordinate, Clock):
            rate = coordinate.rate * jnp.exp(_pick(self.log_rates, index, dtype))
            coordinate = _Clock(rate)
        if older := corrector.num_older:
            change = _pick(self.corrector, index, dtype)
            # Pyright takes `closest` for a field.
            corrector = _Corrector(older, corrector, change)  # pyright: ignore[reportCallIssue]
        change = _pick(self.predictor, index, dtype)
        return GDDIM(
            _Predictor(predictor.num_nodes, predictor, change),
            self.solver.splitting,
            corrector,
            coordinate=coordinate,
            process=self.solver.process,
        )

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def _pick(x, index, dtype):
    return lax.dynamic_index_in_dim(x, index, keepdims=False).astype(dtype)


def _corrected(polynomials, change, rank: Int[Array, " nodes"], number: int):
    """Polynomials with corrections of the constant and linear coefficients, whose sum over
    the nodes is zero."""
    valid = rank[:, None] < number
    change = jnp.where(valid, change[jnp.clip(rank, 0, number - 1)], 0)
    mean = change.sum(0, keepdims=True) / valid.sum().astype(change.dtype)
    change = jnp.where(valid, change - mean, 0)
    powers = min(2, polynomials.shape[1])
    return polynomials.at[:, :powers].add(change[:, :powers])


class _Clock(AbstractCoordinate):
    """The clock at another rate in each step."""

    rate: Float[Array, ""]
    uses_log_snr: ClassVar[bool] = True

    def __call__(self, process, t, log_snr):
        return Clock()(process, t, log_snr)

    def rescale(self, values, start, end):
        return slowing(self.rate, values, start, end)


class _Predictor(AbstractPredictor):
    num_nodes: int = eqx.field(static=True)
    predictor: AbstractPredictor
    change: Float[Array, "nodes powers"]

    def __call__(self, polynomials, rank):
        polynomials = self.predictor(polynomials, rank)
        return _corrected(polynomials, self.change, rank, self.num_nodes)


class _Corrector(AbstractCorrector):
    num_older: int = eqx.field(static=True)
    corrector: AbstractCorrector
    change: Float[Array, "older powers"]
    reevaluates: ClassVar[bool] = False

    @property
    def closest(self) -> float:
        return self.corrector.closest

    def __call__(self, polynomials, rank):
        polynomials = self.corrector(polynomials, rank)
        return _corrected(polynomials, self.change, rank, self.num_older + 1)


class _Shifted(eqx.Module):
    model: Callable
    process: AbstractProcess
    shift: Array

    def __call__(self, t, u, args):
        t = jnp.minimum(t * jnp.exp(self.shift).astype(t.dtype), self.process.t_end)
        return self.model(t, u, args)


_elsewhere = (
    "A learned solver was asked for a step between other times than its own. Solve with "
    "`t0=solver.ts[0], t1=solver.ts[-1]` and "
    "`stepsize_controller=diffrax.StepTo(solver.ts)`."
)
