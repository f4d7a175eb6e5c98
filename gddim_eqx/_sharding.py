from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._misc import show


class Placement(eqx.Module):
    """The sharding of arrays over devices: of batches, and optionally of parameters. For
    training and sampling.

    With `shard_parameters` the parameters, their EMA and the optimiser's state are sharded
    over the devices, each array along its longest axis that divides evenly (FSDP, ZeRO
    stage 3). XLA gathers a layer's parameters when it needs them. Use it for models that do
    not fit on one device; it costs communication.
    """

    mesh: Mesh = eqx.field(static=True)
    shard_parameters: bool = eqx.field(static=True)

    def __init__(
        self, devices: Sequence[Any] | None = None, shard_parameters: bool = False
    ):
        """**Arguments:**

        - `devices`: the devices to use; by default all devices of all processes.
        - `shard_parameters`: whether each device holds only a shard of the parameters.
        """
        devices = jax.devices() if devices is None else devices
        if not (len(devices) and all(isinstance(x, jax.Device) for x in devices)):
            raise ValueError(
                f"`devices` must be some of `jax.devices()`; got {show(devices)}."
            )
        self.mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
        self.shard_parameters = shard_parameters

    @property
    def batch(self) -> NamedSharding:
        """The sharding of arrays with a leading batch axis."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of replicated arrays."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shard(self, batch: PyTree) -> Any:
        """Inside `jax.jit`, constrain a batch to be sharded over the devices."""
        return jax.lax.with_sharding_constraint(batch, self.batch)

    def check_batch(self, size: int) -> None:
        """**Raises:** `ValueError` for a batch that cannot be sharded evenly."""
        if size % self.mesh.size:
            raise ValueError(
                f"A batch of {size} cannot be divided over {self.mesh.size} devices. Use "
                f"{size - size % self.mesh.size or self.mesh.size} or another multiple of "
                f"{self.mesh.size}."
            )

    def of(self, tree: PyTree) -> Any:
        """The sharding of every array of a training state.

        **Arguments:**

        - `tree`: a pytree of arrays, or of their shapes. Other leaves get `None`.
        """
        is_array = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
        return jtu.tree_map(self._of_array, eqx.filter(tree, is_array))

    def _of_array(self, x: Any) -> NamedSharding:
        axes = [n for n, size in enumerate(x.shape) if size % self.mesh.size == 0]
        if not self.shard_parameters or not axes or 0 in x.shape:
            return self.replicated
        longest = max(axes, key=lambda n: x.shape[n])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, "data"))

    def put(self, tree: PyTree) -> Any:
        """Place every array of a training state on its devices, outside `jax.jit`.

        **Arguments:**

        - `tree`: a pytree, the same on all processes.
        """
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jtu.tree_map(self._put_array, arrays), rest)

    def _put_array(self, x: jax.Array) -> jax.Array:
        values = np.asarray(jr.key_data(x) if is_key(x) else x)
        # The data of a key have one more axis than the key.
        sharding = self.replicated if is_key(x) else self._of_array(x)
        array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        return jr.wrap_key_data(array, impl=jr.key_impl(x)) if is_key(x) else array

    def constrain(self, tree: PyTree) -> Any:
        """Inside `jax.jit`, constrain every array of a training state to its sharding."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        arrays = jax.lax.with_sharding_constraint(arrays, self.of(arrays))
        return eqx.combine(arrays, rest)

    def gather(self, tree: PyTree) -> Any:
        """Outside `jax.jit`, gather a whole tree onto the first device of every process, as
        local arrays. All processes must call this."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        arrays = jax.jit(lambda x: x, out_shardings=self.replicated)(arrays)
        here = jax.local_devices()[0]
        local = jtu.tree_map(lambda x: jax.device_put(x.addressable_data(0), here), arrays)
        return eqx.combine(local, rest)


def is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
