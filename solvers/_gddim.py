from typing import ClassVar, Literal

import diffrax as dfx

from gddim_eqx._custom_types import FrameName
from gddim_eqx._exponential import (
    AbstractCoordinate,
    AbstractSplitting,
    Clock,
    DataSplitting,
    LogSNR,
    NoiseSplitting,
    Time,
)
from gddim_eqx._misc import is_integer, renamed, show
from gddim_eqx._process import AbstractProcess, require_process
from gddim_eqx._term import (
    AbstractReverseTerm,
    check_frame,
    check_prediction,
    flow_of_ode,
    ReverseSDE,
    unwrap,
)

from ._corrector import AbstractCorrector, FreeCorrector, NoCorrector, Reevaluate
from ._multistep import AbstractExponentialMultistep, Problem
from ._predictor import AbstractPredictor, AdamsBashforth


_coordinates = {"time": Time(), "log_snr": LogSNR(), "clock": Clock()}


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
        reuses the next step's evaluation, so it costs no extra NFE; saved states, such as
        the final one, are not corrected. For VP, order 2 without a corrector and with
        `coordinate="log_snr"` is DPM-Solver++(2M) with exactly integrated coefficients.
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
    with strong order 1. In noise space only order 1 is supported.

    `splitting`, `coordinate`, `predictor` and `corrector` are fields, which can be replaced
    by your own: see [Write your own solver](../how_to/own_solver.md).

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

    splitting: AbstractSplitting
    coordinate: AbstractCoordinate
    predictor: AbstractPredictor
    corrector: AbstractCorrector
    process: AbstractProcess | None

    term_structure: ClassVar = dfx.AbstractTerm

    @renamed(variable="coordinate", factor="frame", num_nodes="order")
    def __init__(
        self,
        order: int | AbstractPredictor = 4,
        space: Literal["data", "noise"] | AbstractSplitting = "data",
        corrector: int | AbstractCorrector | None = None,
        *,
        coordinate: Literal["time", "log_snr", "clock"] | AbstractCoordinate | None = None,
        frame: FrameName = "R",
        reevaluate: bool = False,
        process: AbstractProcess | None = None,
    ):
        r"""**Arguments:**

        - `order`: the number of evaluations that a step combines, 1 to 4; or a predictor.
            q in the paper's equation 19; where q counts from 0, as in its tables and in the
            authors' `deis_order`, q + 1.
        - `space`: what is extrapolated: `"data"`, the data prediction; `"noise"`, the noise
            prediction, as in the paper; or a splitting.
        - `corrector`: the number of past evaluations that the corrector uses besides the
            new one, from 0 (no corrector) to `order`; or a corrector. Defaults to
            `order - 1` in data space and with `reevaluate`, and to 0 otherwise, as the UniC
            corrector is unstable in noise space with few steps.
        - `coordinate`: the interpolation coordinate: `"time"` (the paper's, and the default
            in noise space); `"log_snr"`, as in DPM-Solver++; `"clock"` (the default in data
            space), which slows down during sampling; or a coordinate.
        - `frame`: the frame in which noise predictions are extrapolated: `"R"` for the
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

        **Raises:** `ValueError` for invalid or conflicting arguments.
        """
        predictor = order if isinstance(order, AbstractPredictor) else AdamsBashforth(order)
        self.predictor, self.splitting = predictor, _as_splitting(space, frame)
        in_noise = isinstance(self.splitting, NoiseSplitting)
        if coordinate is None:
            coordinate = "time" if in_noise else "clock"
        self.coordinate = _as_coordinate(coordinate)
        if corrector is None:
            corrector = 0 if in_noise and not reevaluate else predictor.num_nodes - 1
        self.corrector = _as_corrector(corrector, predictor.num_nodes, reevaluate)
        if process is not None:
            require_process(process)
            check_prediction(process, "flow", "R")
        self.process = process

    def unwrap(self, terms, y):
        term = terms if isinstance(terms, ReverseSDE) else unwrap(terms)[0]
        if isinstance(term, dfx.ODETerm) and self.process is not None:
            flow = flow_of_ode(self.process, term)
            return Problem(flow, self.process, unwrap(terms)[1])
        if not isinstance(term, AbstractReverseTerm):
            raise ValueError(_unsupported(term))
        problem = Problem.of_diffusion(terms)
        if self.process not in (None, problem.equation):
            raise ValueError(
                f"The process of the solver, {self.process}, is not that of the terms, "
                f"{problem.equation}. Leave out `process`, which is for `diffrax.ODETerm`."
            )
        order = max(self.predictor.num_nodes, self.corrector.num_older + 1)
        in_noise = isinstance(self.splitting, NoiseSplitting)
        if problem.lam is not None and in_noise and order > 1:
            raise ValueError(
                "On reverse diffusions, noise space is for order 1 without a corrector: "
                "noise makes noise predictions too rough to extrapolate. Use "
                f"`GDDIM({self.predictor.num_nodes})`, or `GDDIM(1, 'noise')`; these terms "
                f"have lam={problem.lam}."
            )
        return problem


def _as_splitting(space, frame) -> AbstractSplitting:
    check_frame(frame)
    if frame == "cholesky" and space != "noise":
        raise ValueError(
            "`frame` is that of noise predictions. For the frame L_t use "
            "`GDDIM(space='noise', frame='cholesky')`."
        )
    if isinstance(space, AbstractSplitting):
        return space
    if space not in ("data", "noise"):
        raise ValueError(
            f"`space` must be 'data', 'noise' or a splitting; got {show(space)}."
        )
    return DataSplitting() if space == "data" else NoiseSplitting(frame)


def _as_coordinate(coordinate) -> AbstractCoordinate:
    if isinstance(coordinate, str):
        coordinate = _coordinates.get(coordinate, coordinate)
    if not isinstance(coordinate, AbstractCoordinate):
        raise ValueError(
            f"`coordinate` must be one of {', '.join(map(repr, _coordinates))}, or a "
            f"coordinate; got {show(coordinate)}."
        )
    return coordinate


def _as_corrector(corrector, order: int, reevaluate: bool) -> AbstractCorrector:
    if isinstance(corrector, AbstractCorrector):
        if reevaluate:
            raise ValueError("With a corrector, leave out `reevaluate`.")
        return corrector
    if not is_integer(corrector, 0, order):
        raise ValueError(
            "`corrector` must be an integer from 0 (for none) to `order`, which is "
            f"{order}, or a corrector; got {show(corrector)}."
        )
    if corrector == 0 and reevaluate:
        raise ValueError(
            "`reevaluate` is for the corrector, but there is none. Pass `corrector`, "
            "from 1 to `order`."
        )
    if corrector == 0:
        return NoCorrector()
    return Reevaluate(corrector) if reevaluate else FreeCorrector(corrector)


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
