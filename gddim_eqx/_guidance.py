from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._custom_types import Args, RealScalarLike, State
from ._operator import apply
from ._process import AbstractProcess, as_shape
from ._state import batch_axes, join_components
from ._term import ProbabilityFlow


# Everything here is a model: it is called as `model(t, u, args)`, and stands where the
# model that it wraps would stand. So wrappers nest.

Scale = RealScalarLike | Callable[[RealScalarLike], RealScalarLike]


class ClassifierFreeGuidance(eqx.Module):
    """A model that leans from an unconditional prediction towards, and past, a conditional
    one: `unconditional + scale * (conditional - unconditional)`.

    ??? cite "Reference"

        J. Ho, T. Salimans, *Classifier-Free Diffusion Guidance*, 2022, equation 6, whose
        w is `scale - 1`.
    """

    conditional: Callable
    unconditional: Callable
    scale: Scale

    def __init__(self, conditional: Callable, unconditional: Callable, scale: Scale):
        """**Arguments:**

        - `conditional`, `unconditional`: models that predict the same, whatever it is.
            Both are called with the state and `args`. Of one network that knows its label
            from `args`: `net` and `lambda t, u, args: net(t, u, no_label)`.
        - `scale`: 0 is unconditional, 1 conditional, and more is beyond. Or a function of
            time, for example to guide in an interval only.
        """
        _check_callable(conditional=conditional, unconditional=unconditional)
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        without, scale = self.unconditional(t, u, args), _at(self.scale, t)
        return jtu.tree_map(
            lambda a, b: b + jnp.asarray(scale, a.dtype) * (a - b),
            self.conditional(t, u, args),
            without,
        )


class _Wrapper(eqx.Module):
    """A model that corrects another's predictions, and predicts the same as that."""

    flow: ProbabilityFlow

    @property
    def process(self) -> AbstractProcess:
        return self.flow.process


class ClassifierGuidance(_Wrapper):
    r"""A model whose score has the gradient of a log likelihood added: $\nabla \log p_t(u)
    + \text{scale}\,\nabla_u \log p(y \mid u_t = u)$.

    The likelihood may be a classifier that was trained on noisy states, or a guess made
    from the data that the model predicts, as for inverse problems.

    ??? cite "Reference"

        P. Dhariwal, A. Nichol, *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS
        2021, section 4.
    """

    log_likelihood: Callable
    scale: Scale

    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        log_likelihood: Callable,
        scale: Scale = 1.0,
        predicts: Literal["noise", "data", "score", "velocity"] = "noise",
        factor: Literal["R", "cholesky"] = "R",
    ):
        """**Arguments:**

        - `process`: the forward process.
        - `model`: the model, called as `model(t, u, args)`.
        - `log_likelihood`: called as `log_likelihood(t, u, args)`, in the data's
            coordinates like the model; returns one number per sample, `(*batch,)`.
        - `scale`: what to multiply its gradient with; or a function of time.
        - `predicts`, `factor`: what the model predicts, as in
            [`gddim_eqx.ProbabilityFlow`][]; this predicts the same.
        """
        _check_callable(log_likelihood=log_likelihood)
        self.flow = ProbabilityFlow(process, model, predicts, factor)
        self.log_likelihood = log_likelihood
        self.scale = scale

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
        change = apply(self.process.factor(t).transpose() * scale, gradient)
        noise = jtu.tree_map(lambda a, b: a - b, noise, change)
        return self.flow.prediction(t, u, noise)


class DataGuidance(_Wrapper):
    """A model whose prediction of data is changed by a function: clipped, thresholded, or
    replaced where it is known."""

    function: Callable

    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        function: Callable,
        predicts: Literal["noise", "data", "score", "velocity"] = "noise",
        factor: Literal["R", "cholesky"] = "R",
    ):
        """**Arguments:**

        - `process`: the forward process.
        - `model`: the model, called as `model(t, u, args)`.
        - `function`: called as `function(t, x, args)` with the prediction of data,
            `(*batch, *shape)`; returns what to take in its place. For example
            [`gddim_eqx.Clip`][] or [`gddim_eqx.DynamicThreshold`][]. The prediction of
            an initial velocity, if there is one, stays.
        - `predicts`, `factor`: what the model predicts, as in
            [`gddim_eqx.ProbabilityFlow`][]; this predicts the same.
        """
        _check_callable(function=function)
        self.flow = ProbabilityFlow(process, model, predicts, factor)
        self.function = function

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        process = self.process
        u = process.from_data(u)
        position, *rest = jtu.tree_leaves(self.flow.initial(t, u, args))
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
        residual = jtu.tree_map(lambda a, b: a - b, u, mean)
        noise = apply(process.factor(t).inverse(), residual)
        return self.flow.prediction(t, u, noise)


class Clip(eqx.Module):
    """Clips data to an interval. For [`gddim_eqx.DataGuidance`][]."""

    low: float = -1.0
    high: float = 1.0

    def __check_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Need `low` < `high`; got {self.low} and {self.high}.")

    def __call__(self, t: RealScalarLike, x: Array, args: Args) -> Array:
        return jnp.clip(x, self.low, self.high)


Clip.__init__.__doc__ = """**Arguments:**

- `low`, `high`: the interval.
"""


class DynamicThreshold(eqx.Module):
    """Clips each sample to a quantile of its own absolute values, and scales it back to
    [-bound, bound] where that is exceeded. For [`gddim_eqx.DataGuidance`][].

    ??? cite "Reference"

        C. Saharia et al., *Photorealistic Text-to-Image Diffusion Models with Deep Language
        Understanding*, NeurIPS 2022, section 2.3.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    quantile: float = 0.995
    bound: float = 1.0

    def __check_init__(self):
        if not 0 < self.quantile <= 1 or not self.bound > 0:
            raise ValueError(
                "Need 0 < `quantile` <= 1 and a positive `bound`; got "
                f"{self.quantile} and {self.bound}."
            )

    def __call__(self, t: RealScalarLike, x: Array, args: Args) -> Array:
        axes = tuple(range(-len(self.shape), 0))
        limit = jnp.quantile(jnp.abs(x), self.quantile, axis=axes, keepdims=True)
        limit = jnp.maximum(limit, self.bound)
        return jnp.clip(x, -limit, limit) * (self.bound / limit)


DynamicThreshold.__init__.__doc__ = """**Arguments:**

- `shape`: the shape of one data sample.
- `quantile`: which quantile of a sample's absolute values to clip to, in (0, 1].
- `bound`: data lie in [-bound, bound].
"""


def _check_callable(**functions: Callable) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"`{name}` must be callable; got {function!r}.")


def _at(scale: Scale, t: RealScalarLike) -> RealScalarLike:
    return scale(t) if callable(scale) else scale
