import inspect
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._custom_types import Args, Key, PredictionName, RealScalarLike, State
from .._linear import (
    add,
    apply,
    batch_axes,
    check_state,
    coefficient_dtype,
    join_components,
)
from .._misc import check_per_sample, show
from .._model import check_normal_data, normal_data, NormalData, precondition
from .._process import AbstractProcess, as_time, require_process
from .._term import AbstractModel
from ._condition import AbstractConditionalNetwork, LabelEmbedding


class NetworkModel(AbstractModel):
    """A model `model(t, u, args)` of states, from a network `network(t, x)` of arrays.

    The components of a state are joined along their last axis: all channels of the data
    first, then all channels of the velocity, as in the authors' code. A state without a
    velocity is passed as it is. The network is applied to each sample of a batch.
    """

    process: AbstractProcess
    network: Callable
    mixed_score: bool = eqx.field(static=True)
    data_std: float | None = eqx.field(static=True)
    data: NormalData | None

    def __init__(
        self,
        process: AbstractProcess,
        network: Callable,
        mixed_score: bool = False,
        data_std: float | int | None = None,
        data: NormalData | None = None,
    ):
        r"""**Arguments:**

        - `process`: the forward process.
        - `network`: called as `network(t, x)` on the time and the joined components of one
            sample, of shape `(*shape[:-1], num_components * shape[-1])`; where the model is
            given `args`, as `network(t, x, condition)` with those of the sample; and with
            `key=key` where it is given a key, for dropout. It returns an array of the
            shape of `x`, or with `data_std` of the data's `shape`.
        - `mixed_score`: for processes with a velocity, such as [`gddim_eqx.CLD`][], whether
            to add $R_t^{-1} (0, v)$ to the output: the noise if the velocity were nothing
            but noise, so that the network has less to learn. The model then predicts noise
            in the frame $R_t$. (As in the authors' code; Dockhorn et al. 2022 do
            similarly for one component.)
        - `data_std`: the standard deviation of the data, to precondition the network. The
            network's output is then the data minus their posterior mean given the state,
            divided by their posterior standard deviation, both as if the data were normal
            with mean 0: of order 1 at all times. The model predicts data.
            (Karras et al. 2022 for VE; here for every process.) This
            speeds up learning, as a small error at high noise levels does not become a
            large one in the data, nor does a rounding error.
        - `data`: the same with the mean and the covariance of the data, in place of
            `data_std`. They are not trained.

        Train a preconditioned network with `DenoisingLoss(process, "data",
        weighting="noise")`, for the paper's loss, or with
        [`gddim_eqx.training.DataWeighting`][].

        **Raises:** `ValueError` for `mixed_score` with a process without velocity, or a
        preconditioned network; for `data` of another shape than the process; and for a
        covariance that differs between directions other than those in which the process
        acts, if it does not act on all data alike.
        """
        require_process(process)
        if not callable(network):
            raise ValueError(f"`network` must be callable; got {show(network)}.")
        if not process.shape:
            raise ValueError(
                "Data of a `NetworkModel` need an axis along which components are joined; "
                "the process has shape (). Use a process of shape (1,)."
            )
        if mixed_score and process.num_components == 1:
            raise ValueError(
                "`mixed_score` is for processes with a velocity, such as `CLD`; got "
                f"{type(process).__name__}."
            )
        if data_std is not None or data is not None:
            check_normal_data(process, data_std, data)
            if mixed_score:
                raise ValueError("Pass `mixed_score` or `data_std`, not both.")
        self.process, self.network, self.mixed_score = process, network, mixed_score
        self.data_std, self.data = None if data_std is None else float(data_std), data

    @property
    def predicts(self) -> PredictionName | None:
        """`"data"` for a preconditioned network."""
        return None if self.data_std is None and self.data is None else "data"

    @property
    def no_condition(self) -> Any:
        network = self.network
        known = isinstance(network, AbstractConditionalNetwork)
        return network.no_condition if known else None

    def normal_data(self, process: AbstractProcess) -> NormalData | None:
        """The normal data from which a preconditioned network predicts the deviation."""
        return normal_data(process, self.data_std, self.data)

    def check_args(self, args: Args) -> None:
        """Check the condition, outside `jax.jit`, as far as the network can tell.

        **Raises:** `ValueError` for labels out of range, for NaN, and for anything but
        arrays.
        """
        for leaf in jtu.tree_leaves(args):
            if not eqx.is_array_like(leaf):
                raise ValueError(
                    f"The condition `args` must be arrays of numbers; got {show(leaf)}."
                )
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and jnp.isnan(leaf).any():
                raise ValueError("The condition `args` holds NaN.")
        embedding = getattr(self.network, "condition", None)
        if args is not None and isinstance(embedding, LabelEmbedding):
            embedding.check(args)

    def __call__(
        self, t: RealScalarLike, u: State, args: Args = None, *, key: Key | None = None
    ) -> State:
        """**Arguments:**

        - `t`: the time of the whole batch.
        - `u`: the state, in data coordinates, with any batch axes: one in training and
            sampling.
        - `args`: the condition of each sample: arrays with the batch axes of the state, or
            a pytree of these. `None` for a network without conditions.
        - `key`: a random key for dropout; without it there is no dropout.

        **Returns:** the prediction, a state like `u`.
        """
        process = self.process
        u = check_state(u, process.num_components, process.shape, "The state")
        leaves, t = jtu.tree_leaves(u), as_time(t)
        batch = batch_axes(u, process.shape)
        size = math.prod(batch)
        check_per_sample("The condition `args`", args, batch)
        flat = lambda x: jnp.reshape(x, (size, *jnp.shape(x)[len(batch) :]))
        x, condition = jtu.tree_map(flat, (jnp.concatenate(leaves, axis=-1), args))
        keys = None if key is None else jr.split(key, size)
        y = jax.vmap(self._of_one, in_axes=(None, 0, 0, 0))(t, x, condition, keys)
        data = self.normal_data(process)
        number = process.num_components if data is None else 1
        shape = (*process.shape[:-1], number * process.shape[-1])
        returned = y.shape[1:] if isinstance(y, jax.Array) else type(y).__name__
        if returned != shape:
            raise ValueError(
                f"The network must return an array of shape {shape}; it returned "
                f"{returned}."
            )
        parts = jnp.split(y, number, axis=-1)
        parts = [part.reshape(*batch, *process.shape) for part in parts]
        t = t.astype(coefficient_dtype(u))
        if data is not None:
            u = process.from_data(u)
            return process.to_data(precondition(process, data, t, u, parts[0]))
        noise = join_components(parts)
        if not self.mixed_score:
            return noise
        alone = join_components([jnp.zeros_like(leaves[0]), *leaves[1:]])
        alone = apply(process.factor(t).inverse(), process.from_data(alone))
        return add(noise, process.to_data(alone))

    def _of_one(self, t, x, condition, key):
        inputs = (t, x) if condition is None else (t, x, condition)
        options = {} if key is None else dict(key=key)
        _check_call(self.network, inputs, options)
        return self.network(*inputs, **options)


def _check_call(network, inputs, options):
    try:
        inspect.signature(network).bind(*inputs, **options)
    except ValueError:  # Some callables have no signature.
        return
    except TypeError as error:
        names = ["t", "x", "condition"][: len(inputs)] + [f"{name}=" for name in options]
        raise ValueError(
            f"The network was called as `network({', '.join(names)})`, but {error}. The "
            "condition is the `args` of the model: leave them out for a network without."
        ) from None
