"""The law of a state whose data are normal."""

import abc
import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact

from .._custom_types import Args, Key, PredictionName, RealScalarLike, State
from .._linear import (
    AbstractBasis,
    append_axes,
    apply,
    batch_axes,
    between,
    BlockLinearOperator,
    check_state,
    coefficient_dtype,
    Covariance,
    dot,
    IdentityBasis,
    join_components,
    latent_given,
    matmul,
    square_root_of_sum,
)
from .._misc import check_count, check_key, show
from .._process import AbstractProcess, require_process, time_for
from .._term import AbstractModel, check_prediction, make_prediction, PerturbationKernel


class Channel(NamedTuple):
    """How a state depends on the data: their coefficients in a basis, times a signal, and
    noise."""

    signal: Inexact[Array, "n *spectrum"]
    root: Inexact[Array, "n n *spectrum"]
    """A square root of the covariance of the noise."""
    basis: AbstractBasis
    shape: tuple[int, ...]

    @classmethod
    def of(cls, process: AbstractProcess, t: Array) -> "Channel":
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        root = process.cholesky(t).blocks
        return cls(signal.blocks[:, 0], root, process.basis, process.shape)

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same for all coefficients."""
        return self.signal[0].size == self.root[0, 0].size == 1

    def whiten(
        self, variances: Inexact[Array, " #size"]
    ) -> tuple[BlockLinearOperator, Inexact[Array, "n 1 #size"]]:
        """The inverse of a root of the covariance of a state whose data have independent
        coefficients with these variances, and its product with the signal."""
        n, size = len(self.signal), math.prod(self.shape)
        noise = _flat(self.root.reshape(n * n, *self.root.shape[2:]), self.shape)
        signal = _flat(self.signal, self.shape)
        noise, spread = noise.reshape(n, n, -1), signal * jnp.sqrt(variances)[None]
        spectrum = max(noise.shape[-1], spread.shape[-1])
        columns = jnp.zeros((2, n, n, spectrum), noise.dtype)
        columns = columns.at[0].set(noise).at[1, :, 0].set(spread)
        inverse = BlockLinearOperator(square_root_of_sum(columns), (size,)).inverse()
        return inverse, matmul(inverse.blocks, signal[:, None])


class Law(NamedTuple):
    """What follows for a state, in the basis of states."""

    pull: State
    """Minus the score."""
    data: Inexact[Array, "..."]
    """The posterior mean of the data."""
    log_density: Inexact[Array, "*batch"]


def law_of_normal(
    channel: Channel, u: State, mean: Inexact[Array, "*shape"], covariance: Covariance
) -> Law:
    """**Arguments:** the channel, a state in its basis, and the moments of the data in
    their own coordinates."""
    basis, shape = channel.basis, channel.shape
    batch, size = batch_axes(u, shape), math.prod(shape)
    inner, rest, vectors, excess = covariance.in_basis(basis, channel.is_uniform, shape)

    there, back = between(basis, inner, shape)
    # With the data `columns @ latent + remainder`, where the coefficients of the remainder
    # in the inner basis are independent, `white` is the state given the latent variables,
    # divided by a root of its covariance.
    inverse, gains = channel.whiten(rest)
    mean = basis.forward(mean)
    residual = [
        there(x - like(a * mean, x))
        for a, x in zip(channel.signal, jtu.tree_leaves(u), strict=True)
    ]
    white = jnp.stack(jtu.tree_leaves(inverse.mv(join_components(residual))))
    volume = -sum(jnp.log(inverse.blocks[i, i]) for i in range(len(white)))
    volume = jnp.broadcast_to(volume, (size,)).sum()
    square, data = jnp.zeros(len(white[0]), white.dtype), jnp.zeros_like(white[0])
    if vectors is not None:
        assert excess is not None
        columns = vectors * jnp.sqrt(excess)[None]
        precision = (gains**2).sum((0, 1))
        latent, total = latent_given((gains * white).sum(0), columns, precision)
        data = dot(latent, columns.T)
        white = white - gains * data[None]
        square, volume = (latent**2).sum(1), volume + jnp.log(total).sum()
    data = data + rest[None] * (gains * white).sum(0)
    square = square + (white**2).sum((0, 2))
    constant = volume + 0.5 * len(white) * size * math.log(2 * math.pi)
    pull = inverse.transpose().mv(join_components(list(white)))
    pull, data = jtu.tree_map(lambda x: back(x, (*batch, *shape)), (pull, data))
    log_density = (-0.5 * square).reshape(batch) - constant
    return Law(pull, like(mean, data) + data, log_density)


def _flat(x, shape):
    """With one axis in place of those of the spectrum: of size 1 if all are the same."""
    x = jnp.broadcast_to(x, (len(x), *shape)) if x[0].size > 1 else x
    return x.reshape(len(x), -1)


def like(x: Array, array: Array) -> Array:
    """With leading axes of size 1, for those of an array."""
    return jnp.expand_dims(x, tuple(range(array.ndim - x.ndim)))


def _cast(tree, dtype):
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


class AbstractData(eqx.Module):
    """Data whose predictions are known in closed form under every process."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    def no_condition(self) -> int | None:
        """The label that stands for all data; `None` if models take no labels."""
        return None

    @abc.abstractmethod
    def law(
        self, channel: Channel, u: State, args: Args = None, has_density: bool = True
    ) -> Law:
        """The law of a state in the basis of a channel; without its density, if that is
        not needed."""

    @abc.abstractmethod
    def _sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        pass

    def sample(self, key: Key, n: int) -> Inexact[Array, "n *shape"]:
        """Draw samples.

        **Arguments:**

        - `key`: a random key.
        - `n`: the number of samples.

        **Returns:** data, `(n, *shape)`.
        """
        check_key(key)
        check_count("n", n, least=0)
        return self._sample(key, n)

    def log_density(
        self,
        u: State,
        process: AbstractProcess | None = None,
        t: RealScalarLike = 0.0,
        args: Args = None,
    ) -> Inexact[Array, "*batch"]:
        """The log density of data, or of states under a process.

        **Arguments:**

        - `u`: data, `(*batch, *shape)`; or, with a process, states in its basis.
        - `process`: a forward process for data of this shape.
        - `t`: the time of the states.
        - `args`: the labels of a labelled mixture.

        **Returns:** one number per sample, in nats. NaN if there is no noise in a direction
        in which the data do not vary.

        **Raises:** `ValueError` for data or states of another shape.
        """
        if process is None:
            u = check_state(u, 1, self.shape, "The data")
        else:
            check_shape(process, self.shape)
            u = check_state(u, process.num_components, self.shape, "The state")
        dtype = coefficient_dtype(u)
        u, data = _cast((u, self), dtype)
        if process is None:
            one, none = jnp.ones(1, dtype), jnp.zeros((1, 1), dtype)
            channel = Channel(one, none, IdentityBasis(), self.shape)
        else:
            channel = Channel.of(process, time_for(u, t))
        return data.law(channel, u, args).log_density

    def model(
        self, process: AbstractProcess, predicts: PredictionName = "noise"
    ) -> "ExactModel":
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


def check_shape(process: AbstractProcess, shape: tuple[int, ...]) -> None:
    """**Raises:** `ValueError` unless a process is for data of this shape."""
    require_process(process)
    if process.shape != shape:
        raise ValueError(
            f"These data have shape {shape}, but the process is for data of shape "
            f"{process.shape}."
        )


class ExactModel(AbstractModel):
    """The model of data whose law is known."""

    data: AbstractData
    process: AbstractProcess
    kind: PredictionName = eqx.field(static=True)

    def __check_init__(self):
        check_shape(self.process, self.data.shape)
        check_prediction(self.process, self.kind, "R")

    @property
    def predicts(self) -> PredictionName:
        return self.kind

    @property
    def no_condition(self) -> int | None:
        """The label that stands for all data; `None` for a model that takes none."""
        return self.data.no_condition

    def check_args(self, args: Args) -> None:
        """As in [`gddim_eqx.nn.NetworkModel`][]."""
        if (none := self.no_condition) is None or args is None:
            return
        labels = np.asarray(args)
        if labels.dtype.kind not in "iu" or ((labels < 0) | (labels > none)).any():
            raise ValueError(
                f"The condition must be integer labels from 0 to {none}, which stands for "
                f"all components; got {show(args)}."
            )

    def __call__(self, t: RealScalarLike, u: State, args: Args = None) -> State:
        process = self.process
        u = check_state(u, process.num_components, process.shape, "The state")
        given, t = jtu.tree_leaves(u)[0].dtype, time_for(u, t)
        # In single precision if states are in half precision.
        u, data = _cast((u, self.data), t.dtype)
        u = process.from_data(u)
        channel = Channel.of(process, t)
        # At time 0 there may be no noise, in directions in which data do not vary.
        some = 1e-18 * jnp.eye(process.num_components, dtype=t.dtype)
        some = append_axes(jnp.where(t <= 0, some, 0), channel.root.ndim)
        law = data.law(channel._replace(root=channel.root + some), u, args, False)
        if self.kind == "score":
            value = jtu.tree_map(jnp.negative, law.pull)
        else:
            rest = [jnp.zeros_like(law.data)] * (process.num_components - 1)
            initial = join_components([law.data, *rest])
            noise = apply(process.factor(t).transpose(), law.pull)
            prediction = make_prediction(self.kind, "R")
            value = prediction.target(PerturbationKernel(process, t), initial, noise)
        return _cast(process.to_data(value), given)
