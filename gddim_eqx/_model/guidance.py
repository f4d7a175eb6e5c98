from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike

from .._custom_types import Args, FrameName, PredictionName, RealScalarLike, State
from .._linear import append_axes, apply, batch_axes, join_components, subtract
from .._misc import as_floats, as_shape, constant_field
from .._process import AbstractProcess
from .._term import init_takes_flow, ProbabilityFlow


# The guidance classes wrap a model and are models themselves, called as
# `model(t, u, args)`, so they can be nested.

Scale = ArrayLike | Callable[[RealScalarLike], ArrayLike]


class ClassifierFreeGuidance(eqx.Module):
    """A model that extrapolates from an unconditional prediction through a conditional one:
    `unconditional + scale * (conditional - unconditional)`.

    ??? cite "Reference"

        J. Ho, T. Salimans, *Classifier-Free Diffusion Guidance*, 2022, equation 6, whose
        w is `scale - 1`.
    """

    conditional: Callable
    unconditional: Callable
    scale: Scale

    def __init__(self, conditional: Callable, unconditional: Callable, scale: Scale):
        """**Arguments:**

        - `conditional`, `unconditional`: models with the same kind of prediction, of any
            kind. Both receive the state and `args`. For a single network that takes its
            label from `args`, pass `net` and `lambda t, u, args: net(t, u, no_label)`.
        - `scale`: the guidance scale: 0 is unconditional, 1 conditional, and larger values
            extrapolate. A number, or one per sample, `(*batch,)`; or a function of time,
            for example to guide only in an interval. Changing the number does not
            recompile.
        """
        _check_callable(conditional=conditional, unconditional=unconditional)
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = _as_scale(scale)

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        without, scale = self.unconditional(t, u, args), _at(self.scale, t)
        return jtu.tree_map(
            lambda a, b: b + _per_sample(scale, a) * (a - b),
            self.conditional(t, u, args),
            without,
        )


class _Wrapper(eqx.Module):
    """A model that modifies another's predictions, and predicts the same quantity."""

    flow: ProbabilityFlow

    @property
    def process(self) -> AbstractProcess:
        return self.flow.process


class ClassifierGuidance(_Wrapper):
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
        gradient = jtu.tree_map(lambda x: _per_sample(scale, x) * x, gradient)
        change = apply(self.process.factor(t).transpose(), gradient)
        noise = subtract(noise, change)
        return self.flow.prediction(t, u, noise)


class DataGuidance(_Wrapper):
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
        mean = apply(
            process.transition(t, jnp.zeros_like(t)), join_components([position, *rest])
        )
        residual = subtract(u, mean)
        noise = apply(process.factor(t).inverse(), residual)
        return self.flow.prediction(t, u, noise)


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
        if not callable(function):
            raise ValueError(f"`{name}` must be callable; got {function!r}.")


def _as_scale(scale: Scale) -> Scale:
    """Convert to an array, so that changing the number does not recompile."""
    return scale if callable(scale) else as_floats("scale", scale)


def _per_sample(scale: ArrayLike, x: Array) -> Array:
    scale = as_floats("scale", scale).astype(x.dtype)
    if scale.shape != x.shape[: scale.ndim]:
        raise ValueError(
            "`scale` must be one number, or one per sample, with the shape of the state's "
            f"batch axes; got shape {scale.shape} for a state of shape {x.shape}."
        )
    return append_axes(scale, x.ndim)


def _at(scale: Scale, t: RealScalarLike) -> ArrayLike:
    return scale(t) if callable(scale) else scale
