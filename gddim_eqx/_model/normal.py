import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Inexact

from .._custom_types import Args, PredictionName, RealScalarLike, State
from .._linear import (
    AbstractBasis,
    apply,
    check_state,
    Covariance,
    IdentityBasis,
    join_components,
)
from .._misc import as_floats, check_instance
from .._process import AbstractProcess, require_process, time_for
from .._term import check_prediction, make_prediction, Marginal


class NormalData(eqx.Module):
    r"""Normal data, $\mathcal{N}(\mu, C)$, whose predictions are known in closed form under
    every process."""

    mean: Inexact[Array, "*shape"]
    covariance: Covariance

    def __init__(
        self,
        mean: ArrayLike,
        covariance: ArrayLike | tuple[ArrayLike, ArrayLike, ArrayLike],
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
                eigenvectors, `(size, rank)`, and the variance in all other directions.
        - `basis`: the basis of the variances, such as [`gddim_eqx.CosineBasis`][]; by
            default the data's own coordinates.
        """
        self.mean = as_floats("mean", mean)
        basis = IdentityBasis() if basis is None else basis
        check_instance("basis", basis, AbstractBasis, "such as `CosineBasis()`")
        size = math.prod(self.mean.shape)
        if isinstance(covariance, tuple):
            values, vectors, rest = (as_floats("covariance", x) for x in covariance)
        else:
            given = as_floats("covariance", covariance)
            if given.shape != (size, size):
                self.covariance = Covariance(given, basis)
                return
            values, vectors = jnp.linalg.eigh(given)
            rest = jnp.maximum(values[0], 0)
        self.covariance = Covariance(rest, basis, vectors, jnp.maximum(values - rest, 0))

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
        return _NormalModel(self, process, predicts)


class Measurement(NamedTuple):
    """What a state says about the data: their coefficients in the process' basis, with
    independent normal noise of standard deviation 1 in each component."""

    values: tuple[Array, ...]
    """$L_t^{-1} u$, with the Cholesky factor $L_t$ of the covariance."""
    gains: Inexact[Array, "n *spectrum"]
    r"""What multiplies the data in them, $L_t^{-1} \Psi(t, 0)$ times `data_scale`."""

    @classmethod
    def of(cls, process: AbstractProcess, t: Array, u: State) -> "Measurement":
        """**Arguments:** the process, the time, which is not 0, and a state in the basis
        of states."""
        root = process.cholesky(t).inverse()
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        return cls(tuple(jtu.tree_leaves(apply(root, u))), (root @ signal).blocks[:, 0])

    @property
    def precision(self) -> Inexact[Array, "*spectrum"]:
        return (self.gains**2).sum(0)

    def residual(self, data: Array) -> tuple[Array, ...]:
        """The noise in the measurement, if these are the coefficients of the data."""
        return tuple(x - _like(a, data) * data for a, x in zip(self.gains, self.values))

    def pull(self, residual: tuple[Array, ...]) -> Array:
        """The transpose of the measurement."""
        pulls = [_like(a, x) * x for a, x in zip(self.gains, residual)]
        return ft.reduce(jnp.add, pulls)


def _like(x, array):
    """With leading axes of size 1."""
    return jnp.expand_dims(x, tuple(range(array.ndim - x.ndim)))


def posterior_mean(
    process: AbstractProcess,
    measurement: Measurement,
    mean: Inexact[Array, "*shape"],
    covariance: Covariance,
) -> Inexact[Array, "..."]:
    """The mean of normal data given a state, in the process' basis.

    **Arguments:** the process, the state, and mean and covariance of the data, the mean in
    the data's own coordinates."""
    given = covariance.given(measurement.precision, process.basis, process.shape)
    mean = _like(process.basis.forward(mean), measurement.values[0])
    return mean + given.mv(measurement.pull(measurement.residual(mean)))


class _NormalModel(eqx.Module):
    data: NormalData
    process: AbstractProcess
    predicts: PredictionName = eqx.field(static=True)

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        del args
        process = self.process
        u = check_state(u, process.num_components, process.shape, "The state")
        given, t = jtu.tree_leaves(u)[0].dtype, time_for(u, t)
        # In single precision if states are in half precision.
        u = process.from_data(jtu.tree_map(lambda x: x.astype(t.dtype), u))
        data = jtu.tree_map(lambda x: x.astype(t.dtype), self.data)
        # At time 0 there may be no noise, and then the state is the data.
        clean = t <= 0
        safe = jnp.where(clean, process.t_min, t)
        measurement = Measurement.of(process, safe, u)
        mean = posterior_mean(process, measurement, data.mean, data.covariance)
        mean = jnp.where(clean, jtu.tree_leaves(u)[0] / process.data_scale, mean)
        noise = join_components(measurement.residual(mean))
        frame = process.factor(safe).inverse() @ process.cholesky(safe)
        rest = [jnp.zeros_like(mean)] * (process.num_components - 1)
        initial = join_components([mean, *rest])
        prediction = make_prediction(self.predicts, "R")
        value = prediction.target(Marginal(process, t), initial, apply(frame, noise))
        return jtu.tree_map(lambda x: x.astype(given), process.to_data(value))
