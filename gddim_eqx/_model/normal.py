from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Args, Key, State
from .._linear import AbstractBasis, Covariance, make_covariance
from .._misc import as_floats, check_instance
from .law import AbstractData, Channel, Law, law_of_normal
from .moments import moments_of


class NormalData(AbstractData):
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
        check_instance("basis", basis, AbstractBasis | None, "such as `CosineBasis()`")
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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.mean.shape

    def law(
        self, channel: Channel, u: State, args: Args = None, has_density: bool = True
    ) -> Law:
        del args, has_density
        return law_of_normal(channel, u, self.mean, self.covariance)

    def _sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        return self.mean[None] + self.covariance.sample(key, n, self.mean.shape)
