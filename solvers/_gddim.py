from typing import ClassVar, Literal

import diffrax as dfx
import equinox as eqx

from gddim_eqx._custom_types import FrameName, Stochasticity
from gddim_eqx._exponential import (
    AbstractCoordinate,
    AbstractSplitting,
    CoordinateName,
    COORDINATES,
    DataSplitting,
    NoiseSplitting,
)
from gddim_eqx._misc import show
from gddim_eqx._process import AbstractProcess, require_process
from gddim_eqx._term import (
    AbstractReverseTerm,
    check_frame,
    check_prediction,
    flow_of_ode,
    ReverseSDE,
    unwrap,
    unwrap_reverse,
)

from ._corrector import AbstractCorrector, FreeCorrector, NoCorrector, Reevaluate
from ._multistep import (
    AbstractExponentialMultistep,
    check_order,
    is_integer,
    Problem,
)
from ._predictor import AdamsBashforth


_default_variables: dict[str, CoordinateName] = {"data": "clock", "noise": "time"}


class GDDIM(AbstractExponentialMultistep):
    r"""Generalized DDIM: an exponential multistep method for the probability flow of any
    linear diffusion, and for its reverse diffusions.

    The linear part of the equation is solved exactly, and the model's prediction is
    extrapolated by a polynomial through its most recent values, as in an Adams-Bashforth
    method. If the data are a single point, a step of any size is exact, up to rounding.
    (A noise or score prediction has its rounding error multiplied by the norm of
    $\Psi(0, t) R_t$, about $5 \cdot 10^4$ at the start of CLD. In float32, a single step
    then needs a data prediction and data space.) Each step takes one evaluation of the
    model.

    - In data space, the default, the data prediction is extrapolated. The UniC corrector
        reuses the next step's evaluation, so it costs no extra NFE; the final step is not
        corrected. For VP, order 2 without a corrector and with
        `variable="log_snr"` is DPM-Solver++(2M) with exactly integrated coefficients.
    - In noise space, the noise prediction is extrapolated in the frame $R_t$, where it is
        nearly constant along the flow. This is the paper's method: equations 18 (order 1;
        DDIM for VP) and 19 (DEIS for VP). The paper's best sampler is
        `GDDIM(3, "noise")` on the grid `time_grid(process, n, "quadratic")`.

    The default interpolation coordinate in data space slows down during sampling: each
    step extrapolates over a shorter distance than the previous step covered. This keeps
    large steps stable.

    Coefficients are computed from the times of the step and of its history. Steps may
    therefore be nonuniform, rejected or clipped, and time may run in either direction:
    backward to sample, forward to encode. (To encode, a solve in noise space may
    start at time 0; one in data space must start at a time with some noise, for example at
    `process.t_min`.)

    The first steps are a warm-up of lower order. As the step size goes to zero, the global
    order is therefore at most 2, or 3 with a corrector. In practice this costs little, as
    predictions hardly change near the start of sampling: in noise space, an exact initial
    history changes the error by no more than 1% for CLD and 25% for VP.

    The error estimate is the difference from the method of the next lower order in another
    coordinate, close to the log-SNR, so it costs no NFE. (Order 1 is compared with order 2;
    the first step with a bound; and with `reevaluate`, the predicted with the corrected
    state.) As past values cannot tell what the model will predict at much lower noise,
    adaptive steps longer than 2 in log-SNR are rejected. To get the smallest error at a
    given small NFE, rather than to meet a tolerance, use a fixed grid:
    [`gddim_eqx.fit_solver`][] finds a good one. Dense output has the order of the solver.

    Times may be close to each other. Where two are much closer than the steps around them,
    only one of their evaluations is used for interpolation.

    On [`gddim_eqx.reverse_sde`][] this is stochastic gDDIM (paper, proposition 6), with the
    exact mean and covariance of every step: if the data are a single point, samples have
    the exact distribution on any grid and for any stochasticity. The noise of a step is
    computed from the increments of the Brownian path, so that solutions converge pathwise,
    with strong order 1. In noise space, orders above 1 help only for small `lam`. For `lam`
    near 1 and few steps (20 for CLD), orders 3 and 4 are unstable in noise space.

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
    variable: CoordinateName | None = eqx.field(static=True)
    factor: FrameName = eqx.field(static=True)
    reevaluate: bool = eqx.field(static=True)
    process: AbstractProcess | None

    term_structure: ClassVar = dfx.AbstractTerm

    def __init__(
        self,
        order: int | None = None,
        space: Literal["data", "noise"] = "data",
        corrector: int | None = None,
        *,
        variable: CoordinateName | None = None,
        factor: FrameName = "R",
        reevaluate: bool = False,
        process: AbstractProcess | None = None,
        num_nodes: int | None = None,
    ):
        r"""**Arguments:**

        - `order`: the number of evaluations that a step combines, 1 to 4. Defaults to 4.
            q in the paper's equation 19; where q counts from 0, as in its tables and in the
            authors' `deis_order`, q + 1.
        - `space`: what is extrapolated: `"data"`, the data prediction; or `"noise"`, the
            noise prediction, as in the paper.
        - `corrector`: the number of past evaluations that the corrector uses besides the
            new one, from 0 (no corrector) to `order`. Defaults to `order - 1` in data
            space and with `reevaluate`, and to 0 otherwise, as the UniC corrector is
            unstable in noise space with few steps.
        - `variable`: the interpolation coordinate: `"time"` (the paper's, and the default
            in noise space), its `"sqrt"` or `"log"`; `"log_snr"`, as in DPM-Solver++; or
            `"clock"` (the default in data space), which slows down during sampling.
        - `factor`: the frame in which noise predictions are extrapolated: `"R"` for the
            paper's $R_t$, or `"cholesky"` for $L_t$, the paper's baseline, which is far
            worse for CLD. Only for the probability flow in noise space. It need not be
            the frame in which the model predicts.
        - `reevaluate`: whether to correct every step with an extra evaluation at its end,
            at two evaluations per step: the paper's predictor-corrector (PEC).
        - `process`: only for a `diffrax.ODETerm`: the process whose probability flow is its
            vector field, for example a flow-matching model. The data or noise prediction
            is recovered from the vector field. This cannot be checked: another vector
            field is still integrated, but less accurately than by a general solver. Not
            needed for `ProbabilityFlow` and `reverse_sde`, which hold their process.
        - `num_nodes`: the field that stores the order, since `order` is a method of every
            Diffrax solver. Used only if `order` is not given, as by `dataclasses.replace`.

        **Raises:** `ValueError` for invalid or conflicting arguments.
        """
        order = check_order(order, num_nodes)
        if space not in ("data", "noise"):
            raise ValueError(f"`space` must be 'data' or 'noise'; got {show(space)}.")
        default = _default_corrector(order, space, reevaluate)
        if corrector is not None and not is_integer(corrector, 0, order):
            raise ValueError(
                "`corrector` must be an integer from 0 (for none) to `order`, which is "
                f"{order}; got {show(corrector)}."
            )
        if variable not in (None, *COORDINATES):
            raise ValueError(
                f"`variable` must be one of {', '.join(map(repr, COORDINATES))}; got "
                f"{show(variable)}."
            )
        check_frame(factor)
        if factor == "cholesky" and space == "data":
            raise ValueError(
                "`factor` is the frame of noise predictions. For the frame L_t use "
                "`GDDIM(space='noise', factor='cholesky')`."
            )
        if reevaluate and (corrector == 0 or default == 0 and corrector is None):
            raise ValueError(
                "`reevaluate` is for the corrector, but there is none. Pass `corrector`, "
                "from 1 to `order`."
            )
        self.num_nodes = order
        self.space = space
        # Defaults are stored as `None`, so that equivalent solvers compare equal.
        self.corrector = None if corrector in (None, default) else int(corrector)
        self.variable = None if variable == _default_variables[space] else variable
        self.factor = factor
        self.reevaluate = bool(reevaluate)
        if process is not None:
            require_process(process)
            check_prediction(process, "flow", "R")
        self.process = process

    def __repr__(self) -> str:
        # A valid constructor call: the argument `order` sets `num_nodes`.
        names = ("space", "corrector", "variable", "factor", "reevaluate")
        rest = [f"{name}={getattr(self, name)!r}" for name in names]
        rest += [] if self.process is None else [f"process={self.process!r}"]
        return f"GDDIM({', '.join([f'order={self.num_nodes}', *rest])})"

    # The components of `AbstractExponentialMultistep`, as the arguments specify them.

    @property
    def splitting(self) -> AbstractSplitting:
        return DataSplitting() if self.space == "data" else NoiseSplitting(self.factor)

    @property
    def coordinate(self) -> AbstractCoordinate:
        return COORDINATES[self.variable or _default_variables[self.space]]

    @property
    def predictor(self) -> AdamsBashforth:
        return AdamsBashforth(self.num_nodes)

    @property
    def correction(self) -> AbstractCorrector:
        number = self.corrector
        if number is None:
            number = _default_corrector(self.num_nodes, self.space, self.reevaluate)
        if number == 0:
            return NoCorrector()
        return Reevaluate(number) if self.reevaluate else FreeCorrector(number)

    def unwrap(self, terms, y):
        term = terms if isinstance(terms, ReverseSDE) else unwrap(terms)[0]
        if isinstance(term, dfx.ODETerm) and self.process is not None:
            flow = flow_of_ode(self.process, term)
            return Problem(flow, self.process, None, unwrap(terms)[1])
        if not isinstance(term, AbstractReverseTerm):
            raise ValueError(_unsupported(term))
        flow, lam, direction = unwrap_reverse(terms)
        if self.process not in (None, flow.process):
            raise ValueError(
                f"The process of the solver, {self.process}, is not that of the terms, "
                f"{flow.process}. Leave out `process`, which is for `diffrax.ODETerm`."
            )
        if self.space == "noise" and lam is not None:
            self._check_stochastic(lam)
        return Problem(flow, flow.process, lam, direction)

    def _check_stochastic(self, lam: Stochasticity) -> None:
        if self != GDDIM(self.num_nodes, "noise", process=self.process):
            raise ValueError(
                "In noise space the options of `GDDIM` are for the probability flow only, "
                f"but these terms have noise, lam={lam}. Use `GDDIM()`, or "
                f"`GDDIM({self.num_nodes}, 'noise')`; got {show(self)}."
            )


def _unsupported(term: dfx.AbstractTerm) -> str:
    cures = {
        "ODETerm": "For the probability flow of a process as an `ODETerm`, pass that "
        "process: `GDDIM(process=...)`.",
        "AdjointTerm": "Give `BacksolveAdjoint` a solver for the backward pass, such as "
        "`BacksolveAdjoint(solver=diffrax.Tsit5())`.",
        "Semilinear": "For a `Semilinear` equation, use `ExponentialAdams`.",
    }
    cure = cures.get(type(term).__name__, "Use another solver.")
    return (
        "`GDDIM` solves `gddim_eqx.ProbabilityFlow` and `gddim_eqx.reverse_sde`; got "
        f"{type(term).__name__}. {cure}"
    )


def _default_corrector(order: int, space: str, reevaluate: bool) -> int:
    return order - 1 if space == "data" or reevaluate else 0
