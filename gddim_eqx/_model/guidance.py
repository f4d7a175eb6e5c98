import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._custom_types import Args, PredictionName, RealScalarLike, State
from .._linear import add, append_axes, apply, batch_axes, join_components, subtract
from .._misc import as_constant, as_floats, as_shape, check_instance, constant_field
from .._process import AbstractProcess
from .._term import AbstractWrapper, as_model, check_flow, flow_first, ProbabilityFlow


Scale = ArrayLike | Callable[[RealScalarLike], ArrayLike]


class AbstractGuidance(AbstractWrapper):
    """A model that changes the predictions of a flow's, and predicts the same quantity."""

    flow: eqx.AbstractVar[ProbabilityFlow]

    @property
    def inner(self) -> Callable:
        return self.flow.model

    @property
    def predicts(self) -> PredictionName:
        return self.flow.predicts

    @property
    def process(self) -> AbstractProcess:
        return self.flow.process


def guided_flow(model: AbstractGuidance) -> ProbabilityFlow:
    """The flow of a model that changes the predictions of another flow."""
    return dataclasses.replace(check_flow(model.flow), model=model)


class WithArgs(AbstractGuidance):
    flow: ProbabilityFlow
    args: PyTree[Array]

    @property
    def no_condition(self) -> None:
        return None

    def check_args(self, args: Args) -> None:
        del args

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        batch = batch_axes(u, self.process.shape)
        each = lambda x: jnp.broadcast_to(x, (*batch, *x.shape))
        return self.flow.model(t, u, jtu.tree_map(each, self.args))


@flow_first("with_args(flow, args)")
def with_args(flow: ProbabilityFlow, args: PyTree) -> ProbabilityFlow:
    """A flow whose model receives these `args`, the same for every sample, in place of
    those that it is called with.

    **Arguments:**

    - `flow`: the probability flow of a model that takes a condition per sample, such as a
        [`gddim_eqx.nn.NetworkModel`][].
    - `args`: the condition of one sample: a pytree of arrays without batch axes. `None`
        for a model without condition beside one with.

    **Returns:** a [`gddim_eqx.ProbabilityFlow`][].
    """
    args = jtu.tree_map(jnp.asarray, args)
    as_model(check_flow(flow).model).check_args(args)
    return guided_flow(WithArgs(flow, args))


class AbstractScaledGuidance(AbstractGuidance):
    scale: eqx.AbstractVar[Scale]

    @property
    def rows(self) -> dict[str, Array]:
        scale = self.scale
        return {"scale": scale} if isinstance(scale, Array) and scale.ndim else {}

    def scale_at(self, t: RealScalarLike) -> Array:
        scale = self.scale
        return as_floats("scale", scale(t) if callable(scale) else scale)

    def scaled(self, scale: Array, x: State) -> State:
        """A state, times one number or one per sample."""

        if scale.shape not in ((), batch := batch_axes(x, self.process.shape)):
            raise ValueError(
                "`scale` must be one number, or one per sample, with the shape of the "
                f"state's batch axes, {batch}; got shape {scale.shape}."
            )
        return jtu.tree_map(lambda x: append_axes(scale.astype(x.dtype), x.ndim) * x, x)


class ClassifierFreeGuidance(AbstractScaledGuidance):
    flow: ProbabilityFlow
    scale: Scale
    unconditional: ProbabilityFlow
    interval: tuple[float, float] | None = eqx.field(static=True)
    rescale: float = eqx.field(static=True)

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        scale = self.scale_at(t)
        if self.interval is not None:
            low, high = self.interval
            scale = jnp.where((low <= t) & (t <= high), scale, 1)
        given, other = (x.model(t, u, args) for x in (self.flow, self.unconditional))
        guided = add(other, self.scaled(scale, subtract(given, other)))
        return jtu.tree_map(self._rescaled, guided, given) if self.rescale else guided

    def _rescaled(self, x, like):
        axes = tuple(range(-len(self.process.shape), 0))
        std, wanted = (y.std(axes, keepdims=True) for y in (x, like))
        ratio = jnp.where(std > 0, wanted / jnp.where(std > 0, std, 1), 1)
        return x * (1 + self.rescale * (ratio - 1))


@flow_first("classifier_free_guidance(flow)")
def classifier_free_guidance(
    flow: ProbabilityFlow,
    unconditional: ProbabilityFlow | None = None,
    scale: Scale = 2.0,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> ProbabilityFlow:
    r"""A flow whose model extrapolates from an unconditional prediction through a
    conditional one: `unconditional + scale * (conditional - unconditional)`. It evaluates
    the network twice, which [`gddim_eqx.sample`][] counts as one evaluation of the model.

    Predictions are combined as the models return them, in the data's coordinates. Given the
    state, all kinds of prediction are affine functions of the score. So the guidance is the
    same for every kind, and for every process: the score becomes
    $\nabla \log p_t(u) + \text{scale}\,(\nabla \log p_t(u | y) - \nabla \log p_t(u))$.

    **Arguments:**

    - `flow`: the probability flow of a conditional model.
    - `unconditional`: that of another model, with the same process and kind of prediction,
        which receives the same state and `args`. By default it is the first without
        condition, [`gddim_eqx.with_args`][]`(flow, model.no_condition)`. With another
        condition in its place, samples are led away from that.
    - `scale`: the guidance scale: 0 is unconditional, 1 conditional, and larger values
        extrapolate. A number, or one per sample, `(*batch,)`; or a function of time.
        Changing the number does not recompile.
    - `interval`: the times, from the earlier to the later, between which to guide;
        outside the model is the conditional one, but both are evaluated. By default
        always.
    - `rescale`: how far to bring the standard deviation of each guided prediction back
        to that of the conditional one, which large scales exceed: from 0, not at all,
        to 1. It depends on the kind of prediction.

    **Returns:** a [`gddim_eqx.ProbabilityFlow`][].

    **Raises:** `ValueError` if `unconditional` is left out and the model has no
    `no_condition`, or if it predicts something else; for an interval whose ends are not in
    order, and for `rescale` outside [0, 1].

    ??? cite "References"

        J. Ho, T. Salimans, *Classifier-Free Diffusion Guidance*, 2022, equation 6, whose
        w is `scale - 1`. Interval: T. Kynkäänniemi et al., *Applying Guidance in a Limited
        Interval Improves Sample and Distribution Quality in Diffusion Models*, 2024.
        Rescaling: S. Lin et al., *Common Diffusion Noise Schedules and Sample Steps are
        Flawed*, 2024, equations 15 and 16.
    """
    if unconditional is None:
        none = as_model(check_flow(flow).model).no_condition
        if none is None:
            raise ValueError(
                f"This {type(flow.model).__name__} does not say what stands for no "
                "condition, as a `NetworkModel` of a conditional network does, by "
                "`no_condition`. Pass the `unconditional` flow too."
            )
        unconditional = with_args(flow, none)
    wanted = "a `ProbabilityFlow` (pass a scale by name, `scale=2.0`)"
    check_instance("unconditional", unconditional, ProbabilityFlow, wanted)
    # Of processes what is static, as they may be traced.
    kinds = [
        (x.predicts, x.frame, jtu.tree_structure(x.process))
        for x in (check_flow(flow), unconditional)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "`unconditional` must predict the same, under the same process, as `flow`; got "
            f"{kinds[1][:2]} under {type(unconditional.process).__name__} beside "
            f"{kinds[0][:2]} under {type(flow.process).__name__}."
        )
    if interval is not None:
        low, high = (as_constant("interval", x) for x in interval)
        if not low < high:
            raise ValueError(
                f"`interval` must be two times, the earlier first; got ({low}, {high})."
            )
        interval = low, high
    rescale = as_constant("rescale", rescale)
    if not 0 <= rescale <= 1:
        raise ValueError(f"`rescale` must be in [0, 1]; got {rescale}.")
    scale = _as_scale(scale)
    return guided_flow(
        ClassifierFreeGuidance(flow, scale, unconditional, interval, rescale)
    )


class ClassifierGuidance(AbstractScaledGuidance):
    flow: ProbabilityFlow
    scale: Scale
    log_likelihood: Callable

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        def total(u):
            values = self.log_likelihood(t, u, args)
            batch = batch_axes(u, self.process.shape)
            if jnp.shape(values) != batch:
                raise ValueError(
                    "`log_likelihood` must return one number per sample, of shape "
                    f"{batch}; it returned {jnp.shape(values)}."
                )
            return values.sum()

        gradient = self.process.from_data(jax.grad(total)(u))
        u = self.process.from_data(u)
        gradient = self.scaled(self.scale_at(t), gradient)
        change = apply(self.process.factor(t).transpose(), gradient)
        noise = subtract(self.flow.noise(t, u, args), change)
        return self.flow.prediction(t, u, noise)


@flow_first("classifier_guidance(flow, log_likelihood)")
def classifier_guidance(
    flow: ProbabilityFlow, log_likelihood: Callable, scale: Scale = 1.0
) -> ProbabilityFlow:
    r"""A flow whose model adds the gradient of a log likelihood to the score: $\nabla \log
    p_t(u) + \text{scale}\,\nabla_u \log p(y \mid u_t = u)$.

    The likelihood may be a classifier trained on noisy states, or an approximation based
    on the data prediction, as in inverse problems.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `log_likelihood`: called as `log_likelihood(t, u, args)` with the state in the
        data's coordinates, like the model; returns one number per sample, `(*batch,)`.
    - `scale`: the factor that multiplies its gradient, in any of the forms accepted by
        [`gddim_eqx.classifier_free_guidance`][].

    **Returns:** a [`gddim_eqx.ProbabilityFlow`][].

    ??? cite "Reference"

        P. Dhariwal, A. Nichol, *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS
        2021, section 4.
    """
    check_instance("log_likelihood", log_likelihood, Callable, "callable")
    return guided_flow(ClassifierGuidance(flow, _as_scale(scale), log_likelihood))


class DataGuidance(AbstractGuidance):
    flow: ProbabilityFlow
    function: Callable

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        process = self.process
        u = process.from_data(u)
        initial = self.flow.denoised(t, u, args)
        x, (_, *rest) = process.decode(initial), jtu.tree_leaves(initial)
        changed = self.function(t, x, args)
        if jnp.shape(changed) != x.shape:
            raise ValueError(
                f"`function` must return data of shape {x.shape}; it returned "
                f"{jnp.shape(changed)}."
            )
        position = jtu.tree_leaves(process.encode(changed.astype(x.dtype)))[0]
        initial = join_components([position, *rest])
        mean = apply(process.transition(t, jnp.zeros_like(t)), initial)
        noise = apply(process.factor(t).inverse(), subtract(u, mean))
        return self.flow.prediction(t, u, noise, initial)


@flow_first("data_guidance(flow, function)")
def data_guidance(flow: ProbabilityFlow, function: Callable) -> ProbabilityFlow:
    """A flow whose data prediction is modified by a function: clipped, thresholded, or
    replaced where the data are known.

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `function`: called as `function(t, x, args)` with the data prediction,
        `(*batch, *shape)`; returns its replacement. For example
        [`gddim_eqx.Clip`][] or [`gddim_eqx.DynamicThreshold`][]. The prediction of
        an initial velocity, if any, is unchanged.

    **Returns:** a [`gddim_eqx.ProbabilityFlow`][].
    """
    check_instance("function", function, Callable, "callable")
    return guided_flow(DataGuidance(flow, function))


class Clip(eqx.Module):
    """Clips data to an interval. For [`gddim_eqx.data_guidance`][].

    **Arguments:**

    - `low`, `high`: the interval.
    """

    low: float = constant_field("low", -1.0)
    high: float = constant_field("high", 1.0)

    def __check_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Need `low` < `high`; got {self.low} and {self.high}.")

    def __call__(self, t: RealScalarLike, x: Array, args: Args) -> Array:
        return jnp.clip(x, self.low, self.high)


class DynamicThreshold(eqx.Module):
    """Clips each sample to a quantile of its own absolute values, and rescales it to
    [-bound, bound] if that quantile exceeds `bound`. For [`gddim_eqx.data_guidance`][].

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `quantile`: which quantile of a sample's absolute values to clip to, in (0, 1].
    - `bound`: data are in [-bound, bound].

    ??? cite "Reference"

        C. Saharia et al., *Photorealistic Text-to-Image Diffusion Models with Deep Language
        Understanding*, NeurIPS 2022, section 2.3.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    quantile: float = constant_field("quantile", 0.995)
    bound: float = constant_field("bound", 1.0)

    def __check_init__(self):
        if not 0 < self.quantile <= 1 or not self.bound > 0:
            raise ValueError(
                "Need 0 < `quantile` <= 1 and a positive `bound`; got "
                f"{self.quantile} and {self.bound}."
            )

    def __call__(self, t: RealScalarLike, x: Array, args: Args) -> Array:
        axes = tuple(range(-len(self.shape), 0))
        limit = jnp.quantile(jnp.abs(x), self.quantile, axis=axes, keepdims=True)
        limit = jnp.where(limit > self.bound, limit, self.bound)
        return jnp.clip(x, -limit, limit) * (self.bound / limit)


def _as_scale(scale: Scale) -> Scale:
    """Convert to an array, so that changing the number does not recompile."""
    return scale if callable(scale) else as_floats("scale", scale)
