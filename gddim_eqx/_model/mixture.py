import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Args, Key, State
from .._linear import (
    AbstractBasis,
    append_axes,
    batch_axes,
    Covariance,
    dot,
    IdentityBasis,
    join_components,
)
from .._misc import as_constant, as_floats, check_count, check_key, show
from .clusters import cluster, nearest
from .law import AbstractData, Channel, Law, law_of_normal
from .moments import moments_of
from .normal import NormalData


class GaussianMixture(AbstractData):
    r"""A mixture of Gaussians as the data distribution,
    $\sum_k w_k\,\mathcal{N}(\mu_k, C_k)$; unless given others, isotropic ones of equal
    width, $C_k = s^2 I$.

    It remains a Gaussian mixture under any linear process, so exact predictions are known
    in closed form: a model without a network, for testing and comparing samplers.
    """

    means: Inexact[Array, "components *shape"]
    scale: float = eqx.field(static=True)
    weights: Inexact[Array, " components"]
    covariances: Covariance | None
    """Those of all components, stacked; `None` if isotropic."""
    labelled: bool = eqx.field(static=True)

    def __init__(
        self,
        means: ArrayLike | list,
        scale: float = 0.0,
        weights: ArrayLike | list | None = None,
        *,
        labelled: bool = False,
        covariances: Covariance | None = None,
    ):
        """**Arguments:**

        - `means`: `(components, *shape)`, where `shape` is that of one data sample; or a
            list of [`gddim_eqx.NormalData`][], whose covariances are all of the same form.
        - `scale`: the common standard deviation; 0 for point masses. Not with a list of
            normal data.
        - `weights`: `(components,)`, positive; normalised internally. Equal by default.
        - `labelled`: whether models take the component of each sample as a condition, an
            integer in `args`. The number of components, then, stands for all of them.
        - `covariances`: the field that stores those of a list of normal data.

        **Raises:** `ValueError` if these are invalid.
        """
        self.covariances, self.labelled = covariances, labelled
        if isinstance(means, list) and any(isinstance(x, NormalData) for x in means):
            means, self.covariances = _stacked(means)
            if scale != 0:
                raise ValueError("Normal data have covariances of their own: no `scale`.")
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

    @classmethod
    def from_samples(
        cls,
        data: Any,
        components: int,
        *,
        labelled: bool = False,
        key: Key | None = None,
        basis: AbstractBasis | None = None,
        rank: int | None = None,
    ) -> "GaussianMixture":
        """A mixture whose components have the means and covariances of parts of the data:
        of clusters by k-means, or of classes.

        **Arguments:**

        - `data`: as in [`gddim_eqx.NormalData.from_samples`][]. With `labelled`, pairs of
            samples and integer labels, from 0 to `components - 1`. Otherwise they are
            read twice, and cannot be a generator.
        - `components`: their number.
        - `labelled`: whether components are the classes; and models take labels, as above.
        - `key`: a random key, for k-means.
        - `basis`, `rank`: the form of the covariances, as in
            [`gddim_eqx.NormalData.from_samples`][].

        **Raises:** `ValueError` as there, for any component.
        """
        check_count("components", components)
        if labelled:
            assign = ft.partial(_as_classes, components)
        else:
            centres = cluster(data, components, check_key(key))
            assign = lambda x, _: nearest(x, centres)
        moments, counts = moments_of(data, basis, rank, components, assign)
        normals = [NormalData(*x, basis=basis) for x in moments]
        return cls(normals, weights=counts, labelled=labelled)

    def _sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        which, around = jr.split(key)
        k = jr.choice(which, self.means.shape[0], (n,), p=self.weights)
        means = self.means[k]
        if self.covariances is None:
            return means + self.scale * jr.normal(around, means.shape, means.dtype)

        # One draw of each component, by which memory grows with their number only.
        def add(x, part):
            i, key, covariance = part
            chosen = append_axes(k == i, x.ndim)
            return jnp.where(chosen, x + covariance.sample(key, n, self.shape), x), None

        number = len(self.means)
        parts = jnp.arange(number), jr.split(around, number), self.covariances
        return jax.lax.scan(add, means, parts)[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.means.shape[1:]

    @property
    def no_condition(self) -> int | None:
        """The label that stands for all components, if models take labels."""
        return len(self.means) if self.labelled else None

    def law(
        self, channel: Channel, u: State, args: Args = None, has_density: bool = True
    ) -> Law:
        if self.covariances is not None or has_density:
            return self._by_component(channel, u, args)
        return self._together(channel, u, args)

    def _log_prior(self, args, batch):
        """The logarithms of the weights given labels, `(components, *batch)`."""
        number = len(self.means)
        log_weights = append_axes(jnp.log(self.weights), 1 + len(batch))
        if not self.labelled:
            return log_weights
        if args is None or jnp.shape(args) != batch:
            raise ValueError(
                "This model needs the label of each sample: pass `args`, integers of shape "
                f"{batch}; got {show(args)}. `model.no_condition` stands for all data."
            )
        label = jnp.asarray(args)[None]
        is_it = label == append_axes(jnp.arange(number), label.ndim)
        # Not infinity, for finite derivatives.
        never = jnp.finfo(log_weights.dtype).min / 4
        given = jnp.where(is_it, jnp.zeros_like(log_weights), never)
        log_prior = jnp.where(label == number, log_weights, given)
        return jnp.where((label < 0) | (label > number), jnp.nan, log_prior)

    def _by_component(self, channel, u, args):
        """One after the other, as each may take as much memory as all states."""

        def add(total, part):
            mean, covariance, log_prior = part
            law = law_of_normal(channel, u, mean, covariance)
            joint = law.log_density + log_prior
            both = jnp.logaddexp(total.log_density, joint)
            shares = jnp.exp(total.log_density - both), jnp.exp(joint - both)

            def mix(x, y):
                x_share, y_share = (append_axes(share, x.ndim) for share in shares)
                return x_share * x + y_share * y

            pull = jtu.tree_map(mix, total.pull, law.pull)
            return Law(pull, mix(total.data, law.data), both), None

        like = jtu.tree_leaves(u)[0]
        batch = batch_axes(u, self.shape)
        none = jnp.full(batch, -jnp.inf, like.dtype)
        start = Law(jtu.tree_map(jnp.zeros_like, u), jnp.zeros_like(like), none)
        covariances = self.covariances
        if covariances is None:
            variance = jnp.full_like(self.weights, self.scale**2)
            covariances = Covariance(variance, IdentityBasis())
        parts = self.means, covariances, self._log_prior(args, batch)
        return jax.lax.scan(add, start, parts)[0]

    def _together(self, channel, u, args):
        """As `_by_component`, for equal covariances: by two matrix products."""
        size = math.prod(channel.shape)
        variance = jnp.full(1, self.scale**2, channel.signal.dtype)
        inverse, gains = channel.whiten(variance)
        means = channel.basis.forward(self.means).reshape(-1, size)
        leaves = [x.reshape(-1, size) for x in jtu.tree_leaves(u)]
        white = jnp.stack(jtu.tree_leaves(inverse.mv(join_components(leaves))))
        fit = dot((gains * white).sum(0), means.T)
        penalty = 0.5 * ((gains**2).sum((0, 1))[None] * means**2).sum(1)
        prior = self._log_prior(args, batch_axes(u, self.shape))
        logits = fit - penalty[None] + prior.reshape(len(means), -1).T
        mean = dot(jax.nn.softmax(logits, axis=-1), means)
        white = white - gains * mean[None]
        data = mean + self.scale**2 * (gains * white).sum(0)
        pull = inverse.transpose().mv(join_components(list(white)))
        back = lambda x: x.reshape(jtu.tree_leaves(u)[0].shape)
        return Law(jtu.tree_map(back, pull), back(data), jnp.full((), jnp.nan))


def _stacked(normals: list[NormalData]) -> tuple[Array, Covariance]:
    forms = {
        (jtu.tree_structure(x), *(y.shape for y in jtu.tree_leaves(x))) for x in normals
    }
    if len(forms) > 1 or not all(isinstance(x, NormalData) for x in normals):
        raise ValueError(
            "The components of a mixture must be `NormalData` of one shape, whose "
            "covariances are all of the same form: numbers, variances in the same basis, "
            f"matrices, or of the same rank; got {show(normals)}."
        )
    stacked = jtu.tree_map(lambda *x: jnp.stack(x), *normals)
    return stacked.mean, stacked.covariance


def _as_classes(number: int, x: np.ndarray, labels: Any) -> np.ndarray:
    if labels is None:
        raise ValueError("With `labelled`, `data` must be pairs `(samples, labels)`.")
    if labels.dtype.kind not in "iu" or ((labels < 0) | (labels >= number)).any():
        raise ValueError(
            f"Labels must be integers from 0 to {number - 1}, for `components={number}`; "
            f"got {show(labels)}."
        )
    return labels
