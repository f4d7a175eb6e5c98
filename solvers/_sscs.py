from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx

from gddim_eqx._custom_types import Args, BoolScalarLike, RealScalarLike, State
from gddim_eqx._linear import (
    add,
    align,
    apply,
    BlockLinearOperator,
    check_state,
    coefficient_dtype,
)
from gddim_eqx._misc import error_if_any
from gddim_eqx._process import CLD
from gddim_eqx._term import real_time, ReverseSDE, step_faults, unwrap_reverse


class SSCS(dfx.AbstractItoSolver[None]):
    r"""The symmetric splitting sampler for critically-damped Langevin diffusion.

    The reverse diffusion is split into an Ornstein-Uhlenbeck process, which would be all of
    it if the distribution at all times were the prior, and the rest of the score,

    $$\mathrm{d}u = -G_t G_t^\top \left[\nabla \log p_t(u) + \Sigma_\infty^{-1} u\right]
    \mathrm{d}t.$$

    A step is an exact half step of the first, an Euler step of the second with the score at
    the midpoint, and another exact half step of the first. Each step takes one evaluation
    of the model. Only for [`gddim_eqx.CLD`][], and only for
    `gddim_eqx.reverse_sde(..., lam=1.0)`.

    It is first order because the Euler step is: the rest of the score depends on the
    velocity that it drives. The splitting error itself is second order, so with few steps
    the error initially falls faster.

    ??? cite "Reference"

        T. Dockhorn, A. Vahdat, K. Kreis, *Score-Based Generative Modeling with
        Critically-Damped Langevin Diffusion*, ICLR 2022.

    **Arguments:** None
    """

    stages: ClassVar[tuple[float, ...]] = (0.5,)
    term_structure: ClassVar = ReverseSDE
    interpolation_cls: ClassVar[Callable[..., dfx.LocalLinearInterpolation]] = (
        dfx.LocalLinearInterpolation
    )

    def strong_order(self, terms):
        return 1

    def init(
        self,
        terms: ReverseSDE,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
    ) -> None:
        flow, lam, _ = unwrap_reverse(terms)
        process = flow.process
        if not isinstance(process, CLD):
            raise ValueError(
                "`SSCS` is for the phase-space process `CLD`, whose reversal it splits; "
                f"got {type(process).__name__}. Use `GDDIM`, which is for every process."
            )
        if not (isinstance(lam, float) and lam == 1):
            raise ValueError(
                f"`SSCS` is for `reverse_sde(..., lam=1.0)`; got lam={lam or 0.0}. Use "
                "`GDDIM`, which is for any stochasticity."
            )
        check_state(y0, process.num_components, process.shape, "The state `y0`")

    def step(
        self,
        terms: ReverseSDE,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: BoolScalarLike,
    ) -> tuple[State, None, dict, None, dfx.RESULTS]:
        del solver_state, made_jump
        flow, _, direction = unwrap_reverse(terms)
        process = flow.process
        assert isinstance(process, CLD)
        half = t0 + 0.5 * (t1 - t0)
        dtype = coefficient_dtype(y0)
        s, middle, t = (
            real_time(process.t_end, x, direction, dtype) for x in (t0, half, t1)
        )
        s = error_if_any(s, step_faults(process, s, t, True), flow.raises)
        diffusion = process.diffusion(middle)

        def relax(start, end, y, normal):
            transition, root = process.stationary_reversal(end, start)
            spread = BlockLinearOperator(
                align(root.blocks, diffusion.blocks), process.shape
            )
            return add(apply(transition, y), apply(spread, normal))

        y = relax(s, middle, y0, terms.normal(t0, half, y0))
        stationary = process.prior_factor() @ process.prior_factor().T
        pull = apply(stationary.astype(dtype).inverse(), y)
        excess = add(flow.score(middle, y, args), pull)
        y = add(y, apply(diffusion @ diffusion.T * (s - t), excess))
        y1 = relax(middle, t, y, terms.normal(half, t1, y0))
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def func(self, terms: ReverseSDE, t0: RealScalarLike, y0: State, args: Args) -> tuple:
        return terms.vf(t0, y0, args)
