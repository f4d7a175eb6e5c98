import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Key, PredictionName
from .._linear import batch_axes, check_state, join_components
from .._misc import as_constant, as_floats, check_count, check_key, show
from .._process import AbstractProcess, require_process, time_for
from .._term import check_prediction, make_prediction, Marginal


class GaussianMixture(eqx.Module):
    r"""A mixture of isotropic Gaussians of equal width as the data distribution,
    $\sum_k w_k\,\mathcal{N}(\mu_k, s^2 I)$.

    It remains a Gaussian mixture under any linear process, so exact predictions are known
    in closed form: a model without a network, for testing and comparing samplers.
    """

    means: Inexact[Array, "components *shape"]
    scale: float = eqx.field(static=True)
    weights: Inexact[Array, " components"]

    def __init__(
        self,
        means: ArrayLike | list,
        scale: float = 0.0,
        weights: ArrayLike | list | None = None,
    ):
        """**Arguments:**

        - `means`: `(components, *shape)`, where `shape` is that of one data sample.
        - `scale`: the common standard deviation; 0 for point masses.
        - `weights`: `(components,)`, positive; normalised internally. Equal by default.

        **Raises:** `ValueError` if these are invalid.
        """
        means = as_floats("means", means)
        if means.ndim == 0 or means.shape[0] == 0:
            raise ValueError(
                "`means` must have shape (components, *shape) with at least one "
                f"component; got {means.shape}."
            )
        scale = as_constant("scale", scale)
        if scale < 0:
            raise ValueError(f"`scale` must not be negative; got {scale}.")
        number = means.shape[0]
        raw = np.ones(number)
        try:
            # On the host, even while JAX is tracing.
            raw = raw if weights is None else np.asarray(weights, np.float64)
        except (TypeError, ValueError):
            raw = np.zeros(0)
        if raw.shape != (number,) or not ((raw > 0) & np.isfinite(raw)).all():
            raise ValueError(
                f"`weights` must be {number} positive numbers, one per component; got "
                f"{show(weights)}."
            )
        self.means = means
        self.scale = scale
        self.weights = jnp.asarray(raw / raw.sum(), means.dtype)

    def sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        """Draw samples.

        **Arguments:**

        - `key`: a random key.
        - `n`: the number of samples.

        **Returns:** data, `(n, *shape)`.
        """
        check_key(key)
        check_count("n", n, least=0)
        which, around = jr.split(key)
        k = jr.choice(which, self.means.shape[0], (n,), p=self.weights)
        means = self.means[k]
        return means + self.scale * jr.normal(around, means.shape, means.dtype)

    def model(
        self, process: AbstractProcess, predicts: PredictionName = "noise"
    ) -> Callable:
        r"""The exact model of these data under a process.

        **Arguments:**

        - `process`: a forward process for data of this shape.
        - `predicts`: what the model returns, as in [`gddim_eqx.ProbabilityFlow`][]. Noise
            is with respect to $R_t$.

        **Returns:** a model for [`gddim_eqx.ProbabilityFlow`][], called as
        `model(t, u, args)`.

        **Raises:** `ValueError` if the process is for data of another shape, or the
        prediction is not defined for it.
        """
        require_process(process)
        check_prediction(process, predicts, "R")
        if process.shape != self.means.shape[1:]:
            raise ValueError(
                f"This mixture has data of shape {self.means.shape[1:]}, but the process "
                f"is for data of shape {process.shape}."
            )
        return _MixtureModel(self, process, predicts)


class _MixtureModel(eqx.Module):
    mixture: GaussianMixture
    process: AbstractProcess
    predicts: PredictionName = eqx.field(static=True)

    def __call__(self, t, u, args):
        del args
        process, shape = self.process, self.process.shape
        u = check_state(u, process.num_components, shape, "The state")
        given, t = jtu.tree_leaves(u)[0].dtype, time_for(u, t)
        # In single precision if states are in half precision.
        dtype = t.dtype
        u = jtu.tree_map(lambda x: x.astype(dtype), u)
        means = process.basis.forward(self.mixture.means.astype(dtype))
        means = means.reshape(means.shape[0], -1)

        # The mean of each mixture component is multiplied by `direction`. The covariance is
        # the same for all components.
        factor = process.factor(t)
        direction = (
            process.transition(t, jnp.zeros_like(t)).blocks[:, 0] * process.data_scale
        )
        covariance = process.covariance(t)
        spread = direction[:, None] * direction[None] * self.mixture.scale**2
        precision = (covariance + eqx.tree_at(lambda c: c.blocks, factor, spread)).inverse()

        def per_coordinate(x):
            return jnp.broadcast_to(x.reshape(x.shape or (1,) * len(shape)), shape)

        n = process.num_components
        precise = precision.mv(process.from_data(u))
        a = [per_coordinate(direction[i]) for i in range(n)]
        pulls = [_pad(ai, p) * p for ai, p in zip(a, jtu.tree_leaves(precise), strict=True)]
        stiffness = [
            a[i] * a[j] * per_coordinate(precision.blocks[i, j])
            for i in range(n)
            for j in range(n)
        ]
        size = math.prod(shape)
        batch = batch_axes(u, shape)
        highest = jax.lax.Precision.HIGHEST
        pull = sum(p.reshape(-1, size) for p in pulls)
        fit = jnp.matmul(pull, means.T, precision=highest)
        penalty = 0.5 * sum((k.reshape(1, size) * means**2).sum(1) for k in stiffness)
        logits = (
            fit
            - jnp.asarray(penalty)[None]
            + jnp.log(self.mixture.weights.astype(dtype))[None]
        )
        posterior = jax.nn.softmax(logits, axis=-1)
        mean = jnp.matmul(posterior, means, precision=highest).reshape(*batch, *shape)

        residual = [
            x - _pad(ai, mean) * mean
            for ai, x in zip(a, jtu.tree_leaves(process.from_data(u)), strict=True)
        ]
        residual = jtu.tree_unflatten(jtu.tree_structure(u), residual)
        noise = (factor.T @ precision).mv(residual)
        # The posterior mean of the data. Not from the noise, which says nothing about them
        # where the signal is zero.
        pulled = jtu.tree_leaves(precision.mv(residual))
        shift = sum(_pad(ai, x) * x for ai, x in zip(a, pulled))
        data = mean + self.mixture.scale**2 * shift
        data = join_components([data, *[jnp.zeros_like(data)] * (n - 1)])
        prediction = make_prediction(self.predicts, "R")
        value = prediction.target(Marginal(process, t), data, noise)
        return jtu.tree_map(lambda x: x.astype(given), process.to_data(value))


def _pad(x, like):
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))
