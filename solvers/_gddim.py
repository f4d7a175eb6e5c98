from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import numpy as np

from gddim_eqx._custom_types import FrameName
from gddim_eqx._exponential import (
    AbstractCoordinate,
    AbstractSplitting,
    COORDINATES,
    DataSplitting,
    NoiseSplitting,
)
from gddim_eqx._term import unwrap_reverse

from ._corrector import AbstractCorrector, FreeCorrector, NoCorrector, Reevaluate
from ._multistep import AbstractExponentialMultistep
from ._polynomial import AdamsBashforth


_default_variables = {"data": "clock", "noise": "time"}

Variable = Literal["time", "sqrt", "log", "clock"]


class GDDIM(AbstractExponentialMultistep):
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
    factor: FrameName = eqx.field(static=True)
    reevaluate: bool = eqx.field(static=True)

    def __init__(
        self,
        order: int | None = None,
        space: Literal["data", "noise"] = "data",
        corrector: int | None = None,
        *,
        variable: Variable | None = None,
        factor: FrameName = "R",
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
        if variable not in (None, *COORDINATES):
            raise ValueError(
                f"`variable` must be one of {', '.join(map(repr, COORDINATES))}; got "
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
            by_default = self.space == "data" or self.reevaluate
            number = self.num_nodes - 1 if by_default else 0
        if number == 0:
            return NoCorrector()
        return Reevaluate(number) if self.reevaluate else FreeCorrector(number)

    def check(self, terms: dfx.AbstractTerm) -> None:
        _, lam, _ = unwrap_reverse(terms)
        plain = GDDIM(self.num_nodes, "noise")
        stochastic = not (isinstance(lam, float) and lam == 0)
        if self.space == "noise" and stochastic and self != plain:
            raise ValueError(
                "In noise space the options of `GDDIM` are for the probability flow only, "
                f"but these terms have noise, lam={lam}. Use `GDDIM()`, or "
                f"`GDDIM({self.num_nodes}, 'noise')`; got {self}."
            )


def _is_integer(value: Any, least: int, most: int) -> bool:
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return integer and bool(least <= value <= most)
