from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Args, RealScalarLike, State
from .._linear import add, append_axes, apply, batch_axes, join_components, subtract
from .._misc import check_choice, check_count, check_instance, check_positive
from .._process import AbstractProcess, as_time
from .._term import flow_first, ProbabilityFlow
from .guidance import AbstractGuidance, guided_flow
from .law import like


class PosteriorGuidance(AbstractGuidance):
    flow: ProbabilityFlow
    y: Array
    measurement: Callable
    noise: float = eqx.field(static=True)
    method: str = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)
    assumed_std: float = eqx.field(static=True)

    @property
    def rows(self) -> dict[str, Array]:
        """What has one row per sample."""
        x = jax.ShapeDtypeStruct((1, *self.process.shape), float)
        measured = jax.eval_shape(self.measurement, x)
        return {"y": self.y} if self.y.ndim >= measured.ndim else {}

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        process, t = self.process, as_time(t)
        batch = batch_axes(u, process.shape)
        u = process.from_data(u)
        problem, early = _Problem.of(process, t), t
        from_zero = process.t_zero_signal <= process.t_end
        if from_zero:
            # A little signal, without which the covariance does not follow from the model.
            early = jnp.minimum(t, jnp.asarray(0.999 * process.t_zero_signal, t.dtype))
        covariance = _Problem.of(process, early) if from_zero else problem

        predict = lambda u: process.decode(self.flow.denoised(early, u, args))
        x, sensitivity = jax.linearize(predict, u)
        measured, forward = jax.linearize(self.measurement, x)
        back = lambda z: jax.linear_transpose(forward, x)(z)[0]
        residual = self._residual(measured, batch)
        z = self._solve(covariance, sensitivity, forward, back, residual, len(batch))
        noise, root = self.flow.noise(t, u, args), process.factor(t).transpose()
        if self.method != "moments" and not from_zero:
            score = jax.linear_transpose(sensitivity, u)(back(z))[0]
            return self.flow.prediction(t, u, subtract(noise, apply(root, score)))
        change = sensitivity(covariance.per_signal(back(z)))
        score = problem.score(change)
        initial = add(self.flow.denoised(t, u, args), process.encode(change))
        return self.flow.prediction(t, u, subtract(noise, apply(root, score)), initial)

    def _residual(self, measured, batch):
        y = self.y.astype(measured.dtype)
        shape = measured.shape[len(batch) :]
        if measured.shape[: len(batch)] != batch:
            raise ValueError(
                f"`measurement` returned an array of shape {measured.shape} for a batch of "
                f"shape {batch}; it must be {batch} and the shape of a measurement."
            )
        if y.shape not in (shape, measured.shape):
            raise ValueError(
                f"`y` has shape {y.shape}; for a batch of shape {batch}, and by "
                f"`measurement`, it must be {shape} for all samples, or {measured.shape}."
            )
        return jnp.broadcast_to(y, measured.shape) - measured

    def _solve(self, problem, sensitivity, forward, back, residual, rank):
        """The inverse of the covariance of the measurement, times the residual."""
        variance = jnp.asarray(self.noise**2, residual.dtype)
        if self.method == "dps":
            return residual / variance

        def spread(v):
            if self.method == "moments":
                return sensitivity(problem.per_signal(v))
            return problem.with_normal_data(v, self.assumed_std)

        apply = lambda z: forward(spread(back(z))) + variance * z
        return _minimal_residual(apply, residual, self.num_iterations, rank)


@flow_first("posterior_guidance(flow, y, measurement, noise)")
def posterior_guidance(
    flow: ProbabilityFlow,
    y: Inexact[ArrayLike, "..."],
    measurement: Callable,
    noise: float,
    method: Literal["moments", "pigdm", "dps"] = "moments",
    *,
    num_iterations: int = 5,
    data_std: float = 1.0,
) -> ProbabilityFlow:
    r"""A flow whose model samples data given a measurement, $y = A(x) + n$ with normal
    noise $n$, for inverse problems such as inpainting, deblurring and super-resolution.

    Given the state, data are approximated by a normal distribution, whose mean is the data
    prediction $\hat x_t$. Given the measurement, too, its mean is

    $$\hat x_t + V A^\top (A V A^\top + \sigma^2)^{-1} (y - A(\hat x_t)),$$

    which is the data prediction of the guided model. A nonlinear $A$ is linearised at
    $\hat x_t$, so samples may be biased where it is far from linear. The methods differ in
    the covariance $V$ of the data given the state.

    - `"moments"`: the covariance that the model itself implies. With the mean coefficient
        $m$ and covariance $\Sigma$ of the state given data, a product with it is a JVP:
        $V v = \frac{\partial \hat x_t}{\partial u} \frac{m v}{m^\top \Sigma^{-1} m}$. This
        holds for every process, whatever its number of components. It is exact for normal
        data.
    - `"pigdm"`: $V$ is the covariance for data that are normal with standard deviation
        `data_std`, as in PiGDM.
    - `"dps"`: $V$ is zero in the matrix that is inverted, as in diffusion posterior
        sampling, so that $\sigma$ sets the strength of guidance.

    The last two replace $V A^\top$ by the derivative of the data prediction, as published,
    except that DPS also normalises by the residual. The linear system is solved as by
    GMRES, separately for each sample. Samples are states at `t_min`: for a small $\sigma$,
    pass `denoise="exact"` to [`gddim_eqx.sample`][].

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `y`: the measurement, the same for all samples, or one for each, `(*batch,
        *y_shape)`.
    - `measurement`: $A$, a function of data `(*batch, *shape)` with any batch axes,
        which returns `(*batch, *y_shape)`; it treats samples independently.
    - `noise`: $\sigma$, the standard deviation of the noise in the measurement.
    - `method`: see above.
    - `num_iterations`: of the linear solver. With `"moments"`, each costs a JVP of the
        model. As many as `y` has elements solve the system.
    - `data_std`: the standard deviation of the data, for `"pigdm"`.

    **Returns:** a [`gddim_eqx.ProbabilityFlow`][].

    **Raises:** `ValueError` for invalid arguments; when evaluated, for a measurement
    whose shape is not that of `y`.

    ??? cite "References"

        Moments: F. Rozet, G. Andry, F. Lanusse, G. Louppe, *Learning Diffusion Priors from
        Observations by Expectation Maximization*, NeurIPS 2024, section 4.2. PiGDM: J.
        Song, A. Vahdat, M. Mardani, J. Kautz, *Pseudoinverse-Guided Diffusion Models for
        Inverse Problems*, ICLR 2023. DPS: H. Chung, J. Kim, M. McCann, M. Klasky, J. C. Ye,
        *Diffusion Posterior Sampling for General Noisy Inverse Problems*, ICLR 2023.
    """
    check_instance("measurement", measurement, Callable, "callable")
    check_choice("method", method, ("moments", "pigdm", "dps"))
    check_count("num_iterations", num_iterations)
    check_positive(noise=noise, data_std=data_std)
    y = jnp.asarray(y)
    if jnp.iscomplexobj(y):
        raise ValueError(
            "`y` must be real; got a complex array. Stack the real and imaginary "
            "parts, in `y` and in `measurement`."
        )
    numbers = int(num_iterations), float(data_std)
    y, noise = y.astype(float), float(noise)
    return guided_flow(PosteriorGuidance(flow, y, measurement, noise, method, *numbers))


class _Problem(NamedTuple):
    """Maps between data and states at one time."""

    process: AbstractProcess
    mean: Array
    """$m$, the coefficient of the data in the mean of each component."""
    information: Array
    r"""$\Sigma^{-1} m$."""
    signal: Array
    r"""$m^\top \Sigma^{-1} m$."""

    @classmethod
    def of(cls, process, t):
        mean = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        information = (process.covariance(t).inverse() @ mean).blocks[:, 0]
        mean = append_axes(mean.blocks[:, 0], information.ndim)
        return cls(process, mean, information, (mean * information).sum(0))

    def _state(self, coefficients, v):
        v = self.process.basis.forward(v)
        return join_components([like(c, v).astype(v.dtype) * v for c in coefficients])

    def per_signal(self, v):
        """The change of a state by which data change by the covariance times `v`."""
        signal = jnp.where(self.signal > 0, self.signal, jnp.inf)
        return self._state(self.mean / signal[None], v)

    def score(self, v):
        """The change of the score if the data prediction changes by `v`."""
        return self._state(self.information, v)

    def with_normal_data(self, v, std):
        v = self.process.basis.forward(v)
        precision = like(1 / std**2 + self.signal, v).astype(v.dtype)
        return self.process.basis.inverse(v / precision)


def _minimal_residual(apply, b, number, rank):
    """Approximately solve `apply(x) = b` for each sample of a batch, by generalised
    conjugate residuals: as GMRES, as the covariance that a network implies need not be
    symmetric or positive."""
    axes = tuple(range(rank, b.ndim))
    dot = lambda a, b: (a * b).sum(axes, keepdims=True)
    tolerance = jnp.finfo(b.dtype).eps ** 2

    def step(carry, i):
        x, residual, directions, images = carry
        image = apply(residual)
        shares = jax.vmap(dot, (None, 0))(image, images)
        direction = residual - (shares * directions).sum(0)
        image = image - (shares * images).sum(0)
        # Not where the residual has vanished, and for finite derivatives there.
        moves = dot(residual, residual) > tolerance * dot(b, b)
        size = dot(image, image)
        moves &= size > 0
        scale = jnp.where(moves, 1 / jnp.sqrt(jnp.where(moves, size, 1)), 0)
        direction, image = scale * direction, scale * image
        length = dot(residual, image)
        x, residual = x + length * direction, residual - length * image
        return (x, residual, directions.at[i].set(direction), images.at[i].set(image)), None

    none = jnp.zeros((number, *b.shape), b.dtype)
    start = jnp.zeros_like(b), b, none, none
    return jax.lax.scan(step, start, jnp.arange(number))[0][0]
