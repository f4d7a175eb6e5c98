"""Predictions of data as those of normal data and a deviation of order 1."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from .._custom_types import State
from .._linear import AbstractBasis, join_components
from .._misc import check_instance, check_positive
from .._process import AbstractProcess
from .law import Channel, check_shape, law_of_normal
from .normal import NormalData


def precondition(
    process: AbstractProcess,
    data: NormalData,
    t: Array,
    u: State,
    output: Inexact[Array, "..."],
) -> State:
    """The posterior mean of normal data given a state, plus the square root of their
    posterior covariance times an output.

    **Arguments:** the process, the data, the time, a state in the basis of states, and an
    output in the data's coordinates.

    **Returns:** a data prediction in the basis of states."""
    given = jtu.tree_leaves(u)[0].dtype
    # In single precision if states are in half precision.
    data = jtu.tree_map(lambda x: jax.lax.stop_gradient(x.astype(t.dtype)), data)
    u = jtu.tree_map(lambda x: x.astype(t.dtype), u)
    clean, t = _without_noise(process, t)
    x = law_of_normal(Channel.of(process, t), u, data.mean, data.covariance).data
    output = process.basis.forward(output.astype(t.dtype))
    x = x + data.covariance.root_given(*_precision(process, t), output, process.shape)
    x = jnp.where(clean, jtu.tree_leaves(u)[0] / process.data_scale, x).astype(given)
    return join_components([x, *[jnp.zeros_like(x)] * (process.num_components - 1)])


def error_of_output(
    process: AbstractProcess, data: NormalData, t: Array, error: State
) -> Inexact[Array, "..."]:
    """The error of the output of `precondition` that has this error of the prediction. In
    the basis of states."""
    data = jtu.tree_map(lambda x: x.astype(t.dtype), data)
    error = jtu.tree_leaves(error)[0].astype(t.dtype)
    given = _precision(process, _without_noise(process, t)[1])
    return data.covariance.root_given(*given, error, process.shape, inverse=True)


def _precision(process: AbstractProcess, t: Array) -> tuple[Array, AbstractBasis]:
    """The precision with which a state measures the data, and the basis in which it is
    diagonal."""
    signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
    gains = (process.cholesky(t).inverse() @ signal).blocks[:, 0]
    return (gains**2).sum(0), process.basis


def _without_noise(process: AbstractProcess, t: Array) -> tuple[Array, Array]:
    """Whether there is no noise yet, so that the state is the data; and a time at which
    there is some."""
    clean = (process.covariance(t).blocks[0, 0] <= 0).any()
    return clean, jnp.where(clean, process.t_min, t)


def normal_data(
    process: AbstractProcess, data_std: float | None, data: NormalData | None = None
) -> NormalData | None:
    """The data, or independent ones with mean 0; `None` if given neither."""
    if data_std is None:
        return data
    return NormalData(jnp.zeros(process.shape), data_std**2)


def check_normal_data(
    process: AbstractProcess, data_std: float | int | None, data: Any
) -> None:
    """**Raises:** `ValueError` unless given one of these, for which `precondition` is
    defined."""
    if data_std is not None:
        check_positive(data_std=data_std)
        if data is not None:
            raise ValueError("Pass `data_std` or `data`, not both.")
        return
    check_instance("data", data, NormalData, "a `NormalData(mean, covariance)`")
    check_shape(process, data.shape)
    zero = jnp.zeros(process.shape)
    state = join_components([zero] * process.num_components)
    t = jnp.asarray(process.t_max)
    jax.eval_shape(lambda data: precondition(process, data, t, state, zero), data)
