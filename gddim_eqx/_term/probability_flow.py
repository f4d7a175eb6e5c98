import dataclasses
import functools as ft
from collections.abc import Callable
from typing import cast, ParamSpec, TypeVar

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu

from .._custom_types import (
    Args,
    FrameName,
    PredictionName,
    RealScalarLike,
    State,
    Stochasticity,
)
from .._linear import add, apply, BlockLinearOperator, check_state
from .._misc import check_instance, renamed, show
from .._process import AbstractProcess, require_process, time_for
from .model import as_model
from .ode import AbstractODE, as_state_like
from .prediction import (
    AbstractPrediction,
    check_frame,
    check_prediction,
    error_without_signal,
    make_prediction,
    Noise,
    PerturbationKernel,
)
from .stochasticity import as_lam, lam_at


P = ParamSpec("P")
R = TypeVar("R")


class AbstractReverseTerm(dfx.AbstractTerm):
    """A term that generates samples: the probability flow or the reverse diffusion."""


class ProbabilityFlow(AbstractODE, AbstractReverseTerm):
    r"""The probability flow of a diffusion model, as a Diffrax term:

    $$\frac{\mathrm{d}u}{\mathrm{d}t} = F_t\,u - \tfrac{1}{2} G_t G_t^\top
    \nabla \log p_t(u).$$

    Paper, equation 7. This is an ODE for any solver, adjoint and step size controller of
    Diffrax; [`gddim_eqx.GDDIM`][] also exploits that it is linear except for the noise
    prediction.
    """

    process: AbstractProcess
    model: Callable
    predicts: PredictionName = eqx.field(static=True)
    frame: FrameName = eqx.field(static=True)
    raises: bool = eqx.field(static=True)

    @renamed(factor="frame")
    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        predicts: PredictionName | None = None,
        frame: FrameName = "R",
        *,
        raises: bool = True,
    ):
        r"""**Arguments:**

        - `process`: the forward process.
        - `model`: called as `model(t, u, args)` with a scalar time and a state in the
            data's coordinates, `(*batch, *shape)`; returns the same structure. It receives
            the whole batch, and in training a batch of one. To wrap a network for single
            samples, use [`gddim_eqx.nn.NetworkModel`][] or `jax.vmap`.
        - `predicts`: what the model returns. By default what it says, if it is a
            [`gddim_eqx.AbstractModel`][] that does, such as a preconditioned network; else
            `"noise"`.
            - `"noise"`: $-K_t^\top \nabla \log p_t$ (paper, equation 4), of all components.
            - `"data"`: the mean of the data given `u`. For a process with a velocity,
                that of the initial state, whose velocity is zero.
            - `"score"`: $\nabla \log p_t$.
            - `"v"`: $m\,\epsilon - \sigma\,x_0$, where $m$ and $\sigma$ are the
                mean coefficient and standard deviation.
            - `"flow"`: $\dot m\,x_0 + \dot \sigma\,\epsilon$, their derivatives in time
                times data and noise: the vector field of the probability flow, as in flow
                matching. For [`gddim_eqx.RectifiedFlow`][] with a shift, it is still
                $\epsilon - x_0$. `"v"` is only for processes of one component, and
                `"flow"` not where the diffusion is singular, as for [`gddim_eqx.CLD`][].
        - `frame`: the square root $K_t$ of the covariance that defines the noise: `"R"`
            for the paper's $R_t$ (equation 17), `"cholesky"` for $L_t$.
        - `raises`: whether run-time errors are raised, or give NaN: JAX's persistent cache
            stores no program that can raise one.

        **Raises:** `ValueError` for an unknown `predicts` or `frame`, or for `"v"` or
        `"flow"` where they are not defined. When evaluated: `ValueError` if the state does
        not match the process, or the model returns a different structure or shape.
        """
        require_process(process)
        check_instance("model", model, Callable, "callable as `model(t, u, args)`")
        described = as_model(model)
        known = described.predicts
        predicts = (known or "noise") if predicts is None else predicts
        check_prediction(process, predicts, frame)
        if known not in (None, predicts):
            raise ValueError(
                f"This {type(described).__name__} predicts {show(known)}; got predicts="
                f"{show(predicts)}. Leave it out. To train a preconditioned network with "
                f"the loss of a noise prediction, use "
                f"`DenoisingLoss(process, {show(known)}, weighting='noise')`."
            )
        self.process = process
        self.model = model
        self.predicts = predicts
        self.frame = frame
        self.raises = raises

    @property
    def _prediction(self) -> AbstractPrediction:
        return make_prediction(self.predicts, self.frame)

    def _evaluate(self, t, u, args, root=None) -> tuple[PerturbationKernel, State, State]:
        """Evaluate the model once, with checks: returns the process at that time, the
        state as arrays, and the prediction in the basis of states."""
        process = self.process
        u = check_state(u, process.num_components, process.shape, "The state")
        t = time_for(u, t)
        try:
            prediction = self.model(t, process.to_data(u), args)
        except Exception as error:
            error.add_note(_how_models_are_called(u, process))
            raise
        hint = f" {_how_models_are_called(u, process)}"
        value = process.from_data(as_state_like(u, prediction, "The model", hint))
        return PerturbationKernel(process, t, root, self.raises), u, value

    def predict(self, t: RealScalarLike, u: State, args: Args) -> State:
        """The model's prediction in the basis of states. Arguments as for
        [`gddim_eqx.ProbabilityFlow.noise`][]."""
        return self._evaluate(t, u, args)[2]

    @renamed(factor="frame")
    def noise(
        self,
        t: RealScalarLike,
        u: State,
        args: Args,
        frame: FrameName = "R",
        *,
        root: BlockLinearOperator | None = None,
    ) -> State:
        r"""The noise prediction $-K_t^\top \nabla \log p_t$ in the basis of states, from
        one evaluation of the model.

        **Arguments:**

        - `t`: a time in (0, T].
        - `u`: a state, `(*batch, *shape)`.
        - `args`: passed to the model.
        - `frame`: which $K_t$: `"R"` for $R_t$, `"cholesky"` for $L_t$.
        - `root`: $R_t$, if already computed.

        **Returns:** a state.
        """
        check_frame(frame)
        at, u, value = self._evaluate(t, u, args, root)
        return self._prediction.noise(at, u, value, frame)

    def prediction(
        self, t: RealScalarLike, u: State, noise: State, initial: State | None = None
    ) -> State:
        r"""The prediction that corresponds to a given noise: the inverse of
        [`gddim_eqx.ProbabilityFlow.noise`][].

        **Arguments:**

        - `t`: a time in (0, T].
        - `u`: a state, `(*batch, *shape)`.
        - `noise`: $-R_t^\top \nabla \log p_t$, in the basis of states.
        - `initial`: the initial state that goes with it, if known. It follows from the
            noise, except where there is no signal.

        **Returns:** what `model` would return, given `predicts`, in the data's coordinates.
        """
        process = self.process
        check = lambda x, name: check_state(x, process.num_components, process.shape, name)
        u, noise = check(u, "The state"), check(noise, "The noise")
        at = PerturbationKernel(process, time_for(u, t), raises=self.raises)
        if initial is None:
            initial = Noise("R").denoised(at, u, noise)
        data = jtu.tree_map(lambda x: x / process.data_scale, initial)
        return process.to_data(self._prediction.target(at, data, noise))

    def denoised(
        self,
        t: RealScalarLike,
        u: State,
        args: Args,
        *,
        root: BlockLinearOperator | None = None,
    ) -> State:
        r"""The prediction of the initial state, without the process' noise at time 0:
        $\Psi(0, t) (u - R_t \epsilon)$. Arguments as for
        [`gddim_eqx.ProbabilityFlow.noise`][]."""
        at, u, value = self._evaluate(t, u, args, root)
        return self._prediction.denoised(at, u, value)

    def score(self, t: RealScalarLike, u: State, args: Args) -> State:
        r"""The score $\nabla \log p_t(u)$ in the basis of states. Arguments as for
        [`gddim_eqx.ProbabilityFlow.noise`][]."""
        at, u, value = self._evaluate(t, u, args)
        return self._prediction.score(at, u, value)

    def reverse_drift(
        self, t: RealScalarLike, u: State, args: Args, lam: Stochasticity
    ) -> State:
        r"""$F_t\,u - \frac{1 + \lambda^2}{2} G_t G_t^\top \nabla \log p_t(u)$: paper,
        equation 6. Arguments as for [`gddim_eqx.ProbabilityFlow.noise`][], and the
        stochasticity `lam`."""
        lam = as_lam(lam)
        at, u, value = self._evaluate(t, u, args)
        flow = self._prediction.flow(at, u, value)
        if isinstance(lam, float) and lam == 0:
            return flow
        t = error_without_signal(
            at,
            f"At t = {self.process.t_zero_signal} there is no signal, and the drift of the "
            "reverse diffusion is infinite. Use `GDDIM`, which needs no drift, or a "
            "process with a smaller `t_end`.",
        )
        diffusion = self.process.diffusion(t)
        strength = -0.5 * lam_at(lam, at.t) ** 2
        score = self._prediction.score(at, u, value)
        return add(flow, apply(diffusion @ diffusion.T * strength, score))

    def vf(self, t: RealScalarLike, y: State, args: Args) -> State:
        return self.reverse_drift(t, y, args, 0.0)


def without_errors(flow: ProbabilityFlow) -> ProbabilityFlow:
    """The flow, and those in its model, with NaN in place of run-time errors."""
    is_inner = lambda x: x is not flow and isinstance(x, ProbabilityFlow)
    quiet = lambda x: without_errors(x) if is_inner(x) else x
    model = jtu.tree_map(quiet, flow.model, is_leaf=is_inner)
    return dataclasses.replace(flow, model=model, raises=False)


def flow_of_ode(process: AbstractProcess, term: dfx.ODETerm) -> ProbabilityFlow:
    """The probability flow of a process, given as an ODE for its states."""

    def model(t, u, args):
        field = term.vf(t, process.from_data(u), args)
        speed = process.flow_speed(t)
        return process.to_data(jtu.tree_map(lambda x: x / speed.astype(x.dtype), field))

    return ProbabilityFlow(process, model, "flow")


def check_flow(flow: object) -> ProbabilityFlow:
    """**Raises:** `ValueError` unless given a probability flow."""
    check_instance("flow", flow, ProbabilityFlow, "a `ProbabilityFlow(process, model)`")
    return cast(ProbabilityFlow, flow)


def flow_first(call: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Until the release: an error that writes out a call, such as `"sample(flow, key,
    number)"`, where a process is passed, and its model, in place of the flow."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @ft.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            first = (*args, None)[0], kwargs.get("process")
            if any(isinstance(x, AbstractProcess) for x in first):
                name = call.split("(")[0]
                new = call.replace("(flow", "(ProbabilityFlow(process, model)")
                raise ValueError(
                    f"`{name}` takes a flow, not a process and a model: `{new}`."
                )
            return function(*args, **kwargs)

        return wrapper

    return decorate


def _how_models_are_called(u: State, process: AbstractProcess) -> str:
    shapes = " and ".join(str(x.shape) for x in jtu.tree_leaves(u))
    return (
        f"The model was called as `model(t, u, args)` with a scalar time and a state of "
        f"shape {shapes}, which is `(*batch, *shape)` with `shape={process.shape}`. For a "
        "network of single samples use `gddim_eqx.nn.NetworkModel`, or `jax.vmap`."
    )
