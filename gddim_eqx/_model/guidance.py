from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._custom_types import Args, FrameName, PredictionName, RealScalarLike, State
from .._linear import append_axes, apply, batch_axes, join_components, subtract
from .._misc import as_constant, as_floats, as_shape, check_args, constant_field, show
from .._process import AbstractProcess
from .._term import init_takes_flow, ProbabilityFlow


# The guidance classes wrap a model and are models themselves, called as
# `model(t, u, args)`, so they can be nested.

Scale = ArrayLike | Callable[[RealScalarLike], ArrayLike]


class WithArgs(eqx.Module):
    """A model that receives these `args`, the same for every sample, in place of those that
    it is called with."""

    model: Callable
    args: PyTree

    def __init__(self, model: Callable, args: PyTree):
        """**Arguments:**

        - `model`: a model that takes a condition per sample, such as a
            [`gddim_eqx.nn.NetworkModel`][].
        - `args`: the condition of one sample: a pytree of arrays without batch axes. `None`
            for a model without condition beside one with.
        """
        _check_callable(model=model)
        self.model, self.args = model, jtu.tree_map(jnp.asarray, args)
        check_args(model, self.args)

    @property
    def process(self) -> AbstractProcess | None:
        return getattr(self.model, "process", None)

    @property
    def preconditioned_for(self) -> str | None:
        return getattr(self.model, "preconditioned_for", None)

    def __call__(self, t: RealScalarLike, u: State, args: Args = None) -> State:
        if self.process is None:
            raise ValueError(
                "`WithArgs` needs a model with a `process`, which tells the batch axes, "
                "such as a `NetworkModel`; got "
                f"{type(self.model).__name__}. Use `lambda t, u, args: model(t, u, ...)`."
            )
        batch = batch_axes(u, self.process.shape)
        each = lambda x: jnp.broadcast_to(x, (*batch, *x.shape))
        return self.model(t, u, jtu.tree_map(each, self.args))


class ClassifierFreeGuidance(eqx.Module):
    r"""A model that extrapolates from an unconditional prediction through a conditional
    one: `unconditional + scale * (conditional - unconditional)`. It evaluates the network
    twice, which [`gddim_eqx.sample`][] counts as one evaluation of the model.

    Predictions are combined as the models return them, in the data's coordinates. Given the
    state, all kinds of prediction are affine functions of the score. So the guidance is the
    same for every kind, and for every process: the score becomes
    $\nabla \log p_t(u) + \text{scale}\,(\nabla \log p_t(u | y) - \nabla \log p_t(u))$.

    ??? cite "References"

        J. Ho, T. Salimans, *Classifier-Free Diffusion Guidance*, 2022, equation 6, whose
        w is `scale - 1`. Interval: T. Kynkäänniemi et al., *Applying Guidance in a Limited
        Interval Improves Sample and Distribution Quality in Diffusion Models*, 2024.
        Rescaling: S. Lin et al., *Common Diffusion Noise Schedules and Sample Steps are
        Flawed*, 2024, equations 15 and 16.
    """

    conditional: Callable
    unconditional: Callable
    scale: Scale
    interval: tuple[float, float] | None = eqx.field(static=True)
    rescale: float = eqx.field(static=True)

    def __init__(
        self,
        conditional: Callable,
        unconditional: Callable | None = None,
        scale: Scale = 2.0,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ):
        """**Arguments:**

        - `conditional`, `unconditional`: models with the same kind of prediction, of any
            kind. Both receive the state and `args`. By default, the second is the first
            without condition, `WithArgs(model, model.no_condition)`: see
            [`gddim_eqx.WithArgs`][]. With another condition in its place, samples are led
            away from that.
        - `scale`: the guidance scale: 0 is unconditional, 1 conditional, and larger values
            extrapolate. A number, or one per sample, `(*batch,)`; or a function of time.
            Changing the number does not recompile.
        - `interval`: the times, from the earlier to the later, between which to guide;
            outside the model is the conditional one, but both are evaluated. By default
            always.
        - `rescale`: how far to bring the standard deviation of each guided prediction back
            to that of the conditional one, which large scales exceed: from 0, not at all,
            to 1. Needs a conditional model with a `process`, such as a
            [`gddim_eqx.nn.NetworkModel`][], and depends on the kind of prediction.

        **Raises:** `ValueError` if `unconditional` is left out and the model has no
        `no_condition`; for an interval whose ends are not in order, and for
        `rescale` outside [0, 1].
        """
        if unconditional is None:
            unconditional = _without_condition(conditional)
        _check_callable(conditional=conditional, unconditional=unconditional)
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
        if rescale and getattr(conditional, "process", None) is None:
            raise ValueError(
                "`rescale` needs a conditional model with a `process`, which tells the "
                "axes of a sample, such as a `NetworkModel`; got "
                f"{type(conditional).__name__}."
            )
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = _as_scale(scale)
        self.interval, self.rescale = interval, rescale

    @property
    def process(self) -> AbstractProcess | None:
        return getattr(self.conditional, "process", None)

    @property
    def rows(self) -> dict[str, Array]:
        """What has one row per sample."""
        return _rows_of(self.scale)

    def check_args(self, args: Args) -> None:
        """As in [`gddim_eqx.nn.NetworkModel`][], by the conditional model."""
        check_args(self.conditional, args)

    @property
    def preconditioned_for(self) -> str | None:
        return getattr(self.conditional, "preconditioned_for", None)

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        scale = jnp.asarray(_at(self.scale, t))
        if self.interval is not None:
            low, high = self.interval
            scale = jnp.where((low <= t) & (t <= high), scale, 1)
        given = self.conditional(t, u, args)
        guided = jtu.tree_map(
            lambda a, b: b + _per_sample(scale, a, self.process) * (a - b),
            given,
            self.unconditional(t, u, args),
        )
        return self._rescaled(guided, given) if self.rescale else guided

    def _rescaled(self, guided, given):
        assert self.process is not None
        axes = tuple(range(-len(self.process.shape), 0))

        def per_leaf(x, like):
            std = x.std(axes, keepdims=True)
            ratio = like.std(axes, keepdims=True) / jnp.where(std > 0, std, 1)
            ratio = jnp.where(std > 0, ratio, 1)
            return x * (1 + self.rescale * (ratio - 1))

        return jtu.tree_map(per_leaf, guided, given)


def _without_condition(model: Callable) -> WithArgs:
    _check_callable(conditional=model)
    if (none := getattr(model, "no_condition", None)) is None:
        raise ValueError(
            f"This {type(model).__name__} does not say what stands for no condition, as a "
            "`NetworkModel` of a conditional network does, by `no_condition`. Pass the "
            "`unconditional` model too."
        )
    return WithArgs(model, none)


class AbstractGuidance(eqx.Module):
    """A model that modifies another's predictions, and predicts the same quantity."""

    flow: ProbabilityFlow

    @property
    def process(self) -> AbstractProcess:
        return self.flow.process

    def check_args(self, args: Args) -> None:
        """As in [`gddim_eqx.nn.NetworkModel`][], by the model that is guided."""
        check_args(self.flow.model, args)


class ClassifierGuidance(AbstractGuidance):
    r"""A model that adds the gradient of a log likelihood to the score: $\nabla \log p_t(u)
    + \text{scale}\,\nabla_u \log p(y \mid u_t = u)$.

    The likelihood may be a classifier trained on noisy states, or an approximation based
    on the data prediction, as in inverse problems.

    ??? cite "Reference"

        P. Dhariwal, A. Nichol, *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS
        2021, section 4.
    """

    log_likelihood: Callable
    scale: Scale

    @init_takes_flow
    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        log_likelihood: Callable,
        scale: Scale = 1.0,
        predicts: PredictionName = "noise",
        factor: FrameName = "R",
    ):
        """**Arguments:**

        - `process`, `model`: the forward process, and the model. Alternatively, pass a
            [`gddim_eqx.ProbabilityFlow`][] in place of these, `predicts` and `factor`.
        - `log_likelihood`: called as `log_likelihood(t, u, args)` with the state in the
            data's coordinates, like the model; returns one number per sample, `(*batch,)`.
        - `scale`: the factor that multiplies its gradient, in any of the forms accepted by
            [`gddim_eqx.ClassifierFreeGuidance`][].
        - `predicts`, `factor`: what the model predicts, as in
            [`gddim_eqx.ProbabilityFlow`][]; the guided model predicts the same.
        """
        _check_callable(log_likelihood=log_likelihood)
        self.flow = ProbabilityFlow(process, model, predicts, factor)
        self.log_likelihood = log_likelihood
        self.scale = _as_scale(scale)

    @property
    def rows(self) -> dict[str, Array]:
        """What has one row per sample."""
        return _rows_of(self.scale)

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
        noise, scale = self.flow.noise(t, u, args), _at(self.scale, t)
        gradient = jtu.tree_map(lambda x: _per_sample(scale, x, self.process) * x, gradient)
        change = apply(self.process.factor(t).transpose(), gradient)
        noise = subtract(noise, change)
        return self.flow.prediction(t, u, noise)


class DataGuidance(AbstractGuidance):
    """A model whose data prediction is modified by a function: clipped, thresholded, or
    replaced where the data are known."""

    function: Callable

    @init_takes_flow
    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        function: Callable,
        predicts: PredictionName = "noise",
        factor: FrameName = "R",
    ):
        """**Arguments:**

        - `process`, `model`: the forward process, and the model. Alternatively, pass a
            [`gddim_eqx.ProbabilityFlow`][] in place of these, `predicts` and `factor`.
        - `function`: called as `function(t, x, args)` with the data prediction,
            `(*batch, *shape)`; returns its replacement. For example
            [`gddim_eqx.Clip`][] or [`gddim_eqx.DynamicThreshold`][]. The prediction of
            an initial velocity, if any, is unchanged.
        - `predicts`, `factor`: what the model predicts, as in
            [`gddim_eqx.ProbabilityFlow`][]; the guided model predicts the same.
        """
        _check_callable(function=function)
        self.flow = ProbabilityFlow(process, model, predicts, factor)
        self.function = function

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        process = self.process
        u = process.from_data(u)
        position, *rest = jtu.tree_leaves(self.flow.denoised(t, u, args))
        x = process.basis.inverse(position) / process.data_scale
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


class Clip(eqx.Module):
    """Clips data to an interval. For [`gddim_eqx.DataGuidance`][]."""

    low: float = constant_field("low", -1.0)
    high: float = constant_field("high", 1.0)

    def __check_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Need `low` < `high`; got {self.low} and {self.high}.")

    def __call__(self, t: RealScalarLike, x: Array, args: Args) -> Array:
        return jnp.clip(x, self.low, self.high)


Clip.__init__.__doc__ = """**Arguments:**

- `low`, `high`: the interval.
"""


class DynamicThreshold(eqx.Module):
    """Clips each sample to a quantile of its own absolute values, and rescales it to
    [-bound, bound] if that quantile exceeds `bound`. For [`gddim_eqx.DataGuidance`][].

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


DynamicThreshold.__init__.__doc__ = """**Arguments:**

- `shape`: the shape of one data sample.
- `quantile`: which quantile of a sample's absolute values to clip to, in (0, 1].
- `bound`: data are in [-bound, bound].
"""


def _check_callable(**functions: Callable) -> None:
    for name, function in functions.items():
        if callable(function):
            continue
        hint = ""
        if isinstance(function, ProbabilityFlow):
            hint = " Of a `ProbabilityFlow`, pass the `model`."
        elif name == "unconditional":
            hint = " Pass a scale by name, `scale=2.0`."
        raise ValueError(f"`{name}` must be callable; got {show(function)}.{hint}")


def _as_scale(scale: Scale) -> Scale:
    """Convert to an array, so that changing the number does not recompile."""
    return scale if callable(scale) else as_floats("scale", scale)


def _rows_of(scale: Scale) -> dict[str, Array]:
    return {"scale": scale} if isinstance(scale, Array) and scale.ndim else {}


def _per_sample(scale: ArrayLike, x: Array, process: AbstractProcess | None) -> Array:
    scale = as_floats("scale", scale).astype(x.dtype)
    known = scale.ndim if process is None else x.ndim - len(process.shape)
    if scale.shape not in ((), x.shape[:known]):
        raise ValueError(
            "`scale` must be one number, or one per sample, with the shape of the state's "
            f"batch axes; got shape {scale.shape} for a state of shape {x.shape}."
        )
    return append_axes(scale, x.ndim)


def _at(scale: Scale, t: RealScalarLike) -> ArrayLike:
    return scale(t) if callable(scale) else scale
