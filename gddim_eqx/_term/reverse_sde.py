import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import Args, Key, RealScalarLike, State, Stochasticity
from .._linear import (
    at_least_single,
    BlockLinearOperator,
    coefficient_dtype,
    join_components,
)
from .._misc import as_batch, check_key, check_positive, show
from .._process import AbstractProcess
from .diffrax_compat import unwrap
from .ode import AbstractODE
from .probability_flow import (
    AbstractReverseTerm,
    check_flow,
    flow_first,
    ProbabilityFlow,
)
from .stochasticity import as_lam, lam_at


class _ReverseDrift(AbstractODE):
    flow: ProbabilityFlow
    lam: Stochasticity

    def vf(self, t: RealScalarLike, y: State, args: Args) -> State:
        return self.flow.reverse_drift(t, y, args, self.lam)


class _ReverseDiffusion(dfx.AbstractTerm):
    process: AbstractProcess
    path: dfx.AbstractBrownianPath
    lam: Stochasticity

    def vf(self, t: RealScalarLike, y: State, args: Args) -> BlockLinearOperator:
        self.check(y)
        t = jnp.asarray(t, coefficient_dtype(y))
        return self.process.diffusion(t) * lam_at(self.lam, t)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs):
        # Diffrax's Brownian paths do not support times in bfloat16.
        t0, t1 = (jnp.asarray(t, at_least_single(jnp.result_type(t))) for t in (t0, t1))
        if kwargs.get("use_levy") and self.path.levy_area is not dfx.BrownianIncrement:
            raise ValueError(
                "Diffrax's stochastic Runge-Kutta methods, those that use Levy areas, give "
                "wrong results backward in time (seen in Diffrax 0.7.2). Use `GDDIM`, or "
                "`diffrax.Euler`, `Heun`, `EulerHeun` or `ItoMilstein`."
            )
        if isinstance(self.path, dfx.VirtualBrownianTree):
            length = jnp.abs(t1 - t0)
            resolution = self.path.tol * (self.path.t1 - self.path.t0)
            t0 = eqx.error_if(
                t0,
                (length > 0) & (length < resolution),
                "A step is shorter than the tolerance of the Brownian path, so its noise "
                "would have the wrong variance. Pass a smaller `tol` to `reverse_sde`.",
            )
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf: BlockLinearOperator, control: State) -> State:
        return vf.mv(jtu.tree_map(lambda w: w.astype(vf.blocks.dtype), control))

    def check(self, y: State) -> None:
        """Raise a `ValueError` unless the Brownian path matches the state."""
        time = jax.ShapeDtypeStruct((), jnp.float32)
        increments = eqx.filter_eval_shape(self.path.evaluate, time, time)
        given, wanted = (jtu.tree_map(jnp.shape, tree) for tree in (increments, y))
        if given != wanted:
            raise ValueError(
                "The Brownian path must have increments of the states' structure and "
                f"shape. Those of the states are {show(wanted)}; those of the increments "
                f"are {show(given)}. For states of shape (64, *shape), pass `batch=(64,)` "
                "to `reverse_sde`."
            )


class ReverseSDE(dfx.MultiTerm, AbstractReverseTerm):
    """The drift and diffusion returned by [`gddim_eqx.reverse_sde`][]."""

    def __init__(self, drift: _ReverseDrift, diffusion: _ReverseDiffusion):
        self.terms = (drift, diffusion)

    def normal(self, t0: RealScalarLike, t1: RealScalarLike, y: State) -> State:
        """The Brownian increments over a step, in the solver's time, divided by the square
        root of its length: standard normals of the structure and shape of `y`."""
        diffusion, _ = unwrap(self.terms[1])
        assert isinstance(diffusion, _ReverseDiffusion)
        diffusion.check(y)

        def normalise(y, increment):
            # In the precision of the path's increments, but at least single: in half
            # precision the difference of times would be lost.
            wide = at_least_single(increment.dtype)
            start, end = (jnp.asarray(t, wide) for t in (t0, t1))
            length = jnp.where(start == end, 1, jnp.abs(end - start))
            return (increment.astype(wide) / jnp.sqrt(length)).astype(y.dtype)

        return jtu.tree_map(normalise, y, self.terms[1].contr(t0, t1))


@flow_first("reverse_sde(flow, lam, key)")
def reverse_sde(
    flow: ProbabilityFlow,
    lam: Stochasticity,
    key: Key | dfx.AbstractBrownianPath,
    batch: tuple[int, ...] = (),
    *,
    tol: float | None = None,
) -> ReverseSDE:
    r"""The reverse diffusions of a diffusion model, as Diffrax terms:

    $$\mathrm{d}u = \left[F_t\,u - \tfrac{1 + \lambda^2}{2} G_t G_t^\top
    \nabla \log p_t(u)\right] \mathrm{d}t + \lambda\,G_t\,\mathrm{d}w,$$

    to be solved backward in time. Paper, equation 6. All have the same marginals, at
    time 0 that of the data: $\lambda = 0$ is the probability flow, $\lambda = 1$ the
    time reversal of the forward diffusion.

    Solve these terms with [`gddim_eqx.GDDIM`][] or with Diffrax's SDE solvers:
    `diffrax.Euler()` is the Euler-Maruyama scheme. (Solvers that use Levy areas raise an
    error: they are wrong backward in time.) `GDDIM(1)` with `lam=1` is ancestral
    sampling, which draws from the exact posterior given the predicted data.

    **Arguments:**

    - `flow`: the probability flow of a process and a model.
    - `lam`: the stochasticity $\lambda$, at least 0 (for VP, DDIM's $\eta$). A Python
        number is a compile-time constant; to vary it without recompiling, pass an array. It
        may also be a function of time, for example to add noise only in an interval
        ("churn"): `lambda t: jnp.where((0.1 < t) & (t < 0.6), 1.0, 0.0)`. `GDDIM` is
        exact for this too; place grid times at its jumps, as it is assumed to be smooth
        within a step.
    - `key`: a random key; or a Brownian path, such as `diffrax.VirtualBrownianTree`, whose
        increments have the states' structure and shape.
    - `batch`: the states' leading axes. Not needed under `jax.vmap`, or with a path.
    - `tol`: the smallest step size. Defaults to $2^{-20}$ of the time axis. Smaller values
        are slower: each step draws noise about $2 \log_2(1 / \text{tol})$ times.

    A key gives a `diffrax.VirtualBrownianTree`, in single precision whatever the precision
    of the states. The same key thus gives the same path, and solves on different grids,
    with different solvers or in different precision converge to the same sample. If the
    draws are too slow, for a small model and a large batch, pass a
    `diffrax.UnsafeBrownianPath`, which draws once per step, and
    `adjoint=diffrax.DirectAdjoint()` to `diffeqsolve`.

    **Returns:** a `diffrax.MultiTerm` of drift and diffusion.

    **Raises:** `ValueError` for a `lam` that is negative or not finite, and for
    anything but a flow. When evaluated: if the path does not match the states or a
    step is shorter than `tol`.

    !!! example

        ```python
        import diffrax as dfx
        import gddim_eqx as gd
        import jax

        process = gd.VP((2,))
        model = gd.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.05).model(process)
        keys = jax.random.split(jax.random.key(0))
        flow = gd.ProbabilityFlow(process, model)
        terms = gd.reverse_sde(flow, 1.0, keys[0], (64,))
        ts = gd.time_grid(process, 20)
        u = process.prior(keys[1], (64,))
        sol = dfx.diffeqsolve(
            terms, gd.GDDIM(1), ts[0], ts[-1], None, u, stepsize_controller=dfx.StepTo(ts)
        )
        ```
    """
    process = check_flow(flow).process
    lam = as_lam(lam)
    if isinstance(key, dfx.AbstractBrownianPath):
        if batch != () or tol is not None:
            raise ValueError(
                "`batch` and `tol` are for the path that is made from a key, but a path "
                f"was passed. Leave them out; got batch={batch} and tol={tol}."
            )
        path = key
    else:
        check_key(key)
        leaf = jax.ShapeDtypeStruct((*as_batch(batch), *process.shape), jnp.float32)
        # A power of two, so that times are scaled without rounding.
        end = 2.0 ** math.ceil(math.log2(process.t_end))
        tol = 2.0**-20 * end if tol is None else tol
        check_positive(tol=tol)
        path = dfx.VirtualBrownianTree(
            0.0, end, tol, join_components([leaf] * process.num_components), key
        )
    return ReverseSDE(_ReverseDrift(flow, lam), _ReverseDiffusion(process, path, lam))


def unwrap_reverse(
    terms: dfx.AbstractTerm,
) -> tuple[ProbabilityFlow, Stochasticity | None, RealScalarLike]:
    """The probability flow, the stochasticity (`None` if it is statically zero), and the
    direction by which times are multiplied, from the terms that a solver receives.

    **Raises:** `ValueError` for other terms.
    """
    if isinstance(terms, ReverseSDE):
        drift, direction = unwrap(terms.terms[0])
        assert isinstance(drift, _ReverseDrift)
        zero = isinstance(drift.lam, float) and drift.lam == 0
        return drift.flow, None if zero else drift.lam, direction
    flow, direction = unwrap(terms)
    return check_flow(flow), None, direction
