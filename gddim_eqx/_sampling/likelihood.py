import math
from typing import Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Inexact

from .._custom_types import Args, Key, RealScalarLike, State
from .._linear import (
    add,
    apply,
    batch_axes,
    BlockLinearOperator,
    check_state,
    coefficient_dtype,
    join_components,
    subtract,
)
from .._misc import check_choice, check_count, check_key, show
from .._process import normal_like, on_time_axis
from .._term import check_flow, map_rows, ProbabilityFlow
from ..solvers import ExponentialAdams, GDDIM, LearnedGDDIM, SSCS
from .solve import check_solver


Divergence = Literal["exact", "rademacher", "gaussian"]


class Likelihood(NamedTuple):
    """What [`gddim_eqx.log_likelihood`][], [`gddim_eqx.log_likelihood_bound`][] and
    [`gddim_eqx.log_density`][] return."""

    value: Inexact[Array, "*batch"]
    """One number per sample, in nats."""
    latent: State
    """The latent code: the state at the end of the probability flow."""
    stats: dict
    """Diffrax's statistics of the solve, such as `num_steps`."""


def log_density(
    flow: ProbabilityFlow,
    u: State,
    key: Key | None = None,
    *,
    divergence: Divergence = "exact",
    num_probes: int = 1,
    solver: dfx.AbstractSolver = dfx.Tsit5(),
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    t0: float | None = None,
    t1: float | None = None,
    dt0: RealScalarLike | None = None,
    max_steps: int | None = 4096,
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint(),
    prior_log_density=None,
    args: Args = None,
) -> Likelihood:
    r"""The log density of states under a diffusion model: for CLD, of position and
    velocity jointly.

    The probability flow is solved forward in time for the state together with its log
    density, which changes by the divergence: $\log p_{t_0}(u_0) = \log p_{t_1}(u_1) +
    \int_{t_0}^{t_1} \nabla \cdot f(t, u_t)\,\mathrm{d}t$. The model must treat the samples
    of a batch independently. Everything can be differentiated and jitted.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `u`: states at `t0`, `(*batch, *shape)`, in the basis of the process' states. Half
        precision is converted to single.
    - `key`: a random key, for the probes.
    - `divergence`: how to compute the model's part of the divergence; that of the drift is
        exact where it is finite.
        - `"exact"`: one JVP of the model per coordinate of the state.
        - `"rademacher"`, `"gaussian"`: Hutchinson's unbiased estimator, with Rademacher or
            Gaussian probes, and one JVP for each of `num_probes`. Rademacher probes are
            exact for the diagonal part, which dominates for images: at equal cost they even
            outperform Hutch++. The same probes are used at all times.
    - `num_probes`: the number of random probes to average over.
    - `solver`: any Diffrax solver for ordinary differential equations.
    - `stepsize_controller`: by default adaptive step sizes with tolerances of 1e-5, in a
        norm that weights the log density per coordinate as much as the whole state.
    - `t0`, `t1`: the times of the states and of the latent codes; by default
        `process.t_min` and `process.t_max`. `t0=0` needs a model that predicts the score,
        or the flow of a rectified flow: without noise, neither follows from a noise
        prediction.
    - `dt0`, `max_steps`, `adjoint`: as in `diffrax.diffeqsolve`.
    - `prior_log_density`: a function that maps states at `t1` to their log density; by
        default that of `process.prior`.
    - `args`: passed to the model.

    **Returns:** [`gddim_eqx.results.Likelihood`][], with values of shape `(*batch,)`.

    **Raises:** `ValueError` for invalid arguments.

    ??? cite "Reference"

        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, *Score-Based
        Generative Modeling through Stochastic Differential Equations*, ICLR 2021, section
        4.3 and appendix D.2.
    """
    check_flow(flow)
    check_solver(solver)
    process = flow.process
    u = check_state(u, process.num_components, process.shape, "The state `u`")
    if isinstance(solver, GDDIM | LearnedGDDIM | ExponentialAdams | SSCS):
        raise ValueError(
            f"`{type(solver).__name__}` solves for states only, but a log density also "
            "needs the divergence along the flow. Use a solver such as `diffrax.Tsit5()`; "
            "or, for latent codes alone, `gddim_eqx.invert`."
        )
    t0 = on_time_axis(process, "t0", process.t_min if t0 is None else t0)
    t1 = on_time_axis(process, "t1", process.t_max if t1 is None else t1)
    if not t0 < t1:
        raise ValueError(
            f"Need 0 <= `t0` < `t1` <= {process.t_end}, the end of the time axis of "
            f"{type(process).__name__}; got {t0} and {t1}."
        )
    if stepsize_controller is None:
        stepsize_controller = dfx.PIDController(rtol=1e-5, atol=1e-5, norm=_norm)
    batch, dtype = batch_axes(u, process.shape), coefficient_dtype(u)
    # In half precision the sums would be inaccurate.
    u = jtu.tree_map(lambda x: x.astype(dtype), u)
    probes = _probes(divergence, num_probes, key, u)
    sol = dfx.diffeqsolve(
        dfx.ODETerm(_Augmented(flow)),
        solver,
        jnp.asarray(t0, dtype),
        jnp.asarray(t1, dtype),
        dt0,
        (u, jnp.zeros(batch, dtype)),
        (args, probes),
        stepsize_controller=stepsize_controller,
        max_steps=max_steps,
        adjoint=adjoint,
    )
    latent, change = jtu.tree_map(lambda x: x[-1], sol.ys)
    prior = process.prior_log_density if prior_log_density is None else prior_log_density
    return Likelihood(prior(latent) + _size(process) * change, latent, sol.stats)


def log_likelihood(
    flow: ProbabilityFlow,
    x: Inexact[Array, "..."],
    key: Key | None = None,
    **kwargs,
) -> Likelihood:
    r"""The log density of data under a diffusion model, $\log p(x)$.

    Data are treated as states at `t0`: the density is that of data with the small noise of
    `process.t_min`. For a process with a velocity this density is not known; see
    [`gddim_eqx.log_likelihood_bound`][], or [`gddim_eqx.log_density`][] for position and
    velocity jointly.

    For images see [`gddim_eqx.dequantise`][] and [`gddim_eqx.bits_per_dimension`][].

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `x`: data, `(*batch, *shape)`.
    - `key`: a random key, for the probes.
    - `**kwargs`: as in [`gddim_eqx.log_density`][], from `divergence` on.

    **Returns:** [`gddim_eqx.results.Likelihood`][], with values of shape `(*batch,)`.

    **Raises:** `ValueError` for invalid arguments, or a process with more than one
    component.
    """
    check_flow(flow)
    process = flow.process
    if process.num_components > 1:
        raise ValueError(
            f"The states of {type(process).__name__} have {process.num_components} "
            "components, so the density of the data alone is not known. Use "
            "`log_likelihood_bound`, or `log_density` for all components jointly."
        )
    joint = log_density(flow, process.encode(x), key, **kwargs)
    return joint._replace(value=joint.value + _log_volume(process))


def log_likelihood_bound(
    flow: ProbabilityFlow,
    x: Inexact[Array, "..."],
    key: Key,
    *,
    num_draws: int = 1,
    t0: float | None = None,
    args: Args = None,
    **kwargs,
) -> Likelihood:
    r"""An estimate of a lower bound on the log density of data under a process with a
    velocity,

    $$\log p(x) \geq \mathbb{E}_{v \sim q}[\log p(x, v) - \log q(v)],$$

    where $q$ is the distribution of the velocity at `t0` in the forward process, given
    `x` at time 0. The gap is the KL divergence of $q$ from the model's distribution of the
    velocity given `x`.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `x`: data, `(*batch, *shape)`.
    - `key`: a random key, for the velocities and the probes.
    - `num_draws`: the number of velocities per sample to average over.
    - `t0`: the time of the states; by default `process.t_min`.
    - `args`: passed to the model. Arrays with the batch axes of `x` are taken to be
        conditions, and repeated for every draw.
    - `**kwargs`: as in [`gddim_eqx.log_density`][], from `divergence` on.

    **Returns:** [`gddim_eqx.results.Likelihood`][]: unbiased estimates of the bound,
    `(*batch,)`, and latent codes, `(num_draws, *batch, *shape)`.

    **Raises:** `ValueError` for invalid arguments, or a process without a velocity. When
    evaluated: if the velocity at `t0` is deterministic.

    ??? cite "Reference"

        T. Dockhorn, A. Vahdat, K. Kreis, *Score-Based Generative Modeling with
        Critically-Damped Langevin Diffusion*, ICLR 2022, appendix B.3.
    """
    check_flow(flow)
    check_key(key)
    process = flow.process
    if process.num_components == 1:
        raise ValueError(
            f"The states of {type(process).__name__} are the data alone, whose density is "
            "known. Use `log_likelihood`."
        )
    check_count("num_draws", num_draws)
    t0 = on_time_axis(process, "t0", process.t_min if t0 is None else t0)
    repeat = lambda x: jnp.broadcast_to(x, (num_draws, *jnp.shape(x)))
    initial = process.encode(repeat(x))
    t = jnp.asarray(t0, coefficient_dtype(initial))
    _, *means = jtu.tree_leaves(apply(process.transition(t, jnp.zeros_like(t)), initial))
    covariance = process.covariance(t).blocks[1:, 1:]
    root = BlockLinearOperator(covariance, process.shape).cholesky()
    logarithms = jnp.log(jnp.diagonal(root.blocks)).sum(-1)
    logarithms = eqx.error_if(
        logarithms,
        ~jnp.isfinite(logarithms).all(),
        "The bound needs a random velocity; at `t0` that of this process is deterministic.",
    )
    velocity_key, probe_key = jr.split(key)
    normal = normal_like(velocity_key, join_components(means))
    velocity = add(join_components(means), apply(root, normal))
    u = join_components([jtu.tree_leaves(initial)[0], *jtu.tree_leaves(velocity)])
    # Conditions, one per sample.
    batch = batch_axes(u, process.shape)[1:]
    is_condition = lambda x: batch and jnp.shape(x)[: len(batch)] == batch
    args = jtu.tree_map(lambda x: repeat(x) if is_condition(x) else x, args)
    flow = map_rows(lambda _, x: repeat(x), flow)
    joint = log_density(flow, u, probe_key, t0=t0, args=args, **kwargs)
    # Minus the log density of the velocities, which varies with that of the model.
    rest = _size(process) - math.prod(process.shape)
    constant = _sum(logarithms, process) + 0.5 * rest * math.log(2 * math.pi)
    normal = jtu.tree_map(lambda x: x.astype(joint.value.dtype), normal)
    squares = _inner(normal, normal, process)
    values = joint.value + 0.5 * squares + constant.astype(joint.value.dtype)
    return joint._replace(value=values.mean(0) + _log_volume(process))


class _Augmented(eqx.Module):
    """The vector field of the probability flow, and its divergence per coordinate."""

    flow: ProbabilityFlow

    def __call__(self, t: RealScalarLike, y: tuple, args: Args) -> tuple:
        (u, _), (args, probes) = y, args
        process = self.flow.process
        t = jnp.asarray(t, coefficient_dtype(u))
        velocity, push = jax.linearize(lambda u: self.flow.vf(t, u, args), u)
        # The divergence of the drift is known, but infinite where there is no signal.
        drift = process.drift(t) if process.t_end < process.t_zero_signal else None

        def quadratic(probe):
            pushed = push(probe)
            if drift is not None:
                pushed = subtract(pushed, apply(drift, probe))
            return _inner(probe, pushed, process)

        if probes is None:
            trace = _over_coordinates(quadratic, u, process.shape)
        else:
            trace = jax.vmap(quadratic)(probes).mean(0)
        if drift is not None:
            diagonal = jnp.diagonal(drift.blocks).sum(-1)
            trace = trace + _sum(diagonal, process).astype(trace.dtype)
        return velocity, trace / _size(process)


def _over_coordinates(quadratic, u, shape):
    """The sum of a quadratic form over the standard basis."""
    leaves, treedef = jtu.tree_flatten(u)
    number = len(leaves) * math.prod(shape)

    def one(index):
        units = (jnp.arange(number) == index).reshape(len(leaves), *shape)
        probe = [
            jnp.broadcast_to(unit.astype(x.dtype), x.shape)
            for unit, x in zip(units, leaves)
        ]
        return quadratic(jtu.tree_unflatten(treedef, probe))

    # In chunks, which an empty batch does not allow.
    together = min(number, 16) if leaves[0].size else None
    return jax.lax.map(one, jnp.arange(number), batch_size=together).sum(0)


def _probes(divergence, num_probes, key, u):
    check_choice("divergence", divergence, ("exact", "rademacher", "gaussian"))
    if divergence == "exact":
        return None
    if key is None:
        raise ValueError(f"Pass a `key`: `divergence={show(divergence)}` draws probes.")
    check_key(key)
    check_count("num_probes", num_probes)
    draw = jr.rademacher if divergence == "rademacher" else jr.normal
    leaves, treedef = jtu.tree_flatten(u)
    keys = jr.split(key, len(leaves))
    draws = [draw(k, (num_probes, *x.shape), x.dtype) for k, x in zip(keys, leaves)]
    return jtu.tree_unflatten(treedef, draws)


def _norm(y):
    """The root mean square of the state, or of the log density per coordinate, whichever is
    larger: averaged with all coordinates of the state, the latter would not count."""

    parts = (ravel_pytree(part)[0] for part in jax.lax.stop_gradient(y))
    return jnp.maximum(*(jnp.sqrt((x**2).sum() / max(x.size, 1)) for x in parts))


def _inner(a, b, process):
    """The inner product of two states, over all components and coordinates."""
    axes = tuple(range(-len(process.shape), 0))
    products = jtu.tree_map(lambda x, y: (x * y).sum(axes), a, b)
    return jnp.stack(jtu.tree_leaves(products)).sum(0)


def _size(process) -> int:
    return process.num_components * math.prod(process.shape)


def _sum(spectrum, process):
    """The sum over all coordinates of the data of a value that may depend on them."""
    return jnp.broadcast_to(spectrum, process.shape).sum()


def _log_volume(process) -> float:
    """The logarithm of the factor by which `encode` scales volumes."""
    return math.prod(process.shape) * math.log(process.data_scale)
