from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Args, Key, PredictionName, RealScalarLike, State
from .._linear import AbstractBasis, Covariance, make_covariance
from .._misc import as_floats, check_count, check_instance, check_key
from .._process import AbstractProcess
from .law import Channel, ExactModel, Law, law_of_normal, log_density
from .moments import moments_of


class NormalData(eqx.Module):
    r"""Normal data, $\mathcal{N}(\mu, C)$, whose predictions are known in closed form under
    every process."""

    mean: Inexact[Array, "*shape"]
    covariance: Covariance

    def __init__(
        self,
        mean: ArrayLike | list,
        covariance: ArrayLike | list | tuple[ArrayLike, ArrayLike, ArrayLike] | Covariance,
        *,
        basis: AbstractBasis | None = None,
    ):
        r"""**Arguments:**

        - `mean`: the mean of the data, of the `shape` of one sample.
        - `covariance`: one of
            - a number: the variance of every coordinate;
            - the variances of independent coefficients in `basis`, of the `shape` of one
                sample;
            - the covariance matrix of flattened samples, `(size, size)`;
            - a tuple of the largest eigenvalues of that matrix, `(rank,)`, their
                eigenvectors, `(size, rank)`, and the variance in all other directions;
            - the `covariance` of other normal data of this shape.
        - `basis`: the basis of the variances, such as [`gddim_eqx.CosineBasis`][]; by
            default the data's own coordinates.

        **Raises:** `ValueError` for moments of other shapes, that are not finite, or that
        no distribution has.
        """
        self.mean = as_floats("mean", mean)
        if not (isinstance(self.mean, Tracer) or jnp.isfinite(self.mean).all()):
            raise ValueError("`mean` must be finite, but holds NaN or infinity.")
        if basis is not None:
            check_instance("basis", basis, AbstractBasis, "such as `CosineBasis()`")
        shape, dtype = self.mean.shape, self.mean.dtype
        self.covariance = make_covariance(covariance, basis, shape, dtype)

    @classmethod
    def from_samples(
        cls, data: Any, *, basis: AbstractBasis | None = None, rank: int | None = None
    ) -> "NormalData":
        """Normal data with the mean and covariance of samples, which are read once, and
        not kept.

        **Arguments:**

        - `data`: samples, `(number, *shape)`; or an iterable of batches, such as
            [`gddim_eqx.training.Batches`][]. Of pairs `(data, labels)` the first are used.
            The full range of `uint8`, `uint16` and `bool` is scaled to [-1, 1], as in
            training.
        - `basis`: for independent coefficients in a basis, whose variances are found.
        - `rank`: for the largest eigenvalues of the covariance, this many, and the same
            variance in all other directions. They are found without the matrix, and are
            exact if they stand out.

        Without the last two, the whole covariance matrix, which takes more samples than
        they have dimensions.

        **Raises:** `ValueError` for too few samples, for samples that are all equal or not
        finite, and for integers of other types.
        """
        (moments,), _ = moments_of(data, basis, rank)
        return cls(*moments, basis=basis)

    @property
    def basis(self) -> AbstractBasis:
        """The basis of the variances."""
        return self.covariance.basis

    @property
    def std(self) -> Array:
        """The standard deviation of a coordinate, in root mean square."""
        excess = self.covariance.excess
        more = 0.0 if excess is None else excess.sum() / self.mean.size
        return jnp.sqrt(self.covariance.variances.mean() + more)

    def sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        """Draw samples.

        **Arguments:**

        - `key`: a random key.
        - `n`: the number of samples.

        **Returns:** data, `(n, *shape)`.
        """
        check_key(key)
        check_count("n", n, least=0)
        return self.mean[None] + self.covariance.sample(key, n, self.mean.shape)

    def log_density(
        self,
        u: State,
        process: AbstractProcess | None = None,
        t: RealScalarLike = 0.0,
    ) -> Inexact[Array, "*batch"]:
        """The log density of data, or of states under a process.

        **Arguments:**

        - `u`: data, `(*batch, *shape)`; or, with a process, states in its basis.
        - `process`: a forward process for data of this shape.
        - `t`: the time of the states.

        **Returns:** one number per sample, in nats. NaN if there is no noise in a direction
        in which the data do not vary.

        **Raises:** `ValueError` for data or states of another shape.
        """
        return log_density(self, NormalData.law, u, process, t)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.mean.shape

    def law(self, channel: Channel, u: State, args: Args = None) -> Law:
        del args
        return law_of_normal(channel, u, self.mean, self.covariance)

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
        return ExactModel(self, process, predicts)
