import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._custom_types import Args, Key, RealScalarLike, State
from .._process import AbstractProcess, check_process, CLD
from .._state import batch_axes, check_state, join_components, Phase


class NetworkModel(eqx.Module):
    """A model `model(t, u, args)` of states, from a network `network(t, x)` of arrays.

    The components of a state are joined along their last axis: all channels of the data
    first, then all channels of the velocity, as in the authors' code. A state without a
    velocity is passed as it is. The network is applied to each sample of a batch.
    """

    process: AbstractProcess
    network: Callable
    mixed_score: bool = eqx.field(static=True)

    def __init__(
        self, process: AbstractProcess, network: Callable, mixed_score: bool = False
    ):
        r"""**Arguments:**

        - `process`: the forward process.
        - `network`: called as `network(t, x)`, or as `network(t, x, key=key)` where a key
            is given for dropout, on the time and the joined components of one sample, of
            shape `(*shape[:-1], num_components * shape[-1])`. It returns as much.
        - `mixed_score`: for [`gddim_eqx.CLD`][], whether $R_t^{-1} (0, v)$ is added to
            what the network returns, so that it has less to learn: the noise in the
            velocity if that were all there is. It predicts noise in the frame of $R_t$
            then. (The authors' code; Dockhorn et al. 2022 have the like for one
            component.)

        **Raises:** `ValueError` for `mixed_score` with a process without velocity.
        """
        check_process(process)
        if not callable(network):
            raise ValueError(f"`network` must be callable; got {network!r}.")
        if mixed_score and not isinstance(process, CLD):
            raise ValueError(
                "`mixed_score` is for processes with a velocity, such as `CLD`; got "
                f"{type(process).__name__}."
            )
        self.process, self.network, self.mixed_score = process, network, mixed_score

    def __call__(
        self, t: RealScalarLike, u: State, args: Args = None, *, key: Key | None = None
    ) -> State:
        """**Arguments:**

        - `t`: the time of the whole batch.
        - `u`: the state, in data coordinates, with any batch axes.
        - `args`: not used.
        - `key`: a random key for dropout; without it there is none.

        **Returns:** the prediction, a state like `u`.
        """
        process = self.process
        check_state(u, process.num_components, process.shape, "The state")
        leaves = jtu.tree_leaves(u)
        batch = batch_axes(u, process.shape)
        x = jnp.concatenate(leaves, axis=-1)
        x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
        t = jnp.asarray(t)
        if key is None:
            y = jax.vmap(lambda x: self.network(t, x))(x)
        else:
            keys = jr.split(key, x.shape[0])
            y = jax.vmap(lambda x, key: self.network(t, x, key=key))(x, keys)
        if y.shape != x.shape:
            raise ValueError(
                f"The network must return an array of shape {x.shape[1:]}, like its input; "
                f"it returned {y.shape[1:]}."
            )
        parts = jnp.split(y, process.num_components, axis=-1)
        noise = join_components([part.reshape(*batch, *process.shape) for part in parts])
        if not self.mixed_score:
            return noise
        inverse = process.factor(t).inverse()
        alone = inverse.mv(Phase(jnp.zeros_like(u.x), u.v))
        return jtu.tree_map(jnp.add, noise, alone)
