from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Inexact, Shaped

from .._custom_types import Key
from .._linear import check_real
from .._misc import check_count, check_instance, check_key
from .._pixels import dequantise
from .._sharding import Placement


class Batches:
    """Batches of data in memory, shuffled anew in each epoch.

    Batch n is a function of the seed and of n, so no position needs to be saved: to resume
    after n steps, ask for batch n. It does not depend on the number of devices, each of
    which gets a shard, or of processes, each of which reads what its devices need. Every
    sample occurs once per epoch; a batch may span the end of one epoch and the beginning of
    the next.

    This is why no data loading library is used: one that streams from disk has a position
    to save, and an order that depends on the number of processes.
    """

    def __init__(
        self,
        data: np.ndarray,
        batch_size: int,
        seed: int = 0,
        placement: Placement | None = None,
    ):
        """**Arguments:**

        - `data`: an array of shape `(number, *shape)`, or a `numpy.memmap`.
        - `batch_size`: the batch size, over all devices and processes.
        - `seed`: the seed for shuffling.
        - `placement`: the sharding over devices; by default batches are on JAX's first.

        **Raises:** `ValueError` for no data, or a batch that cannot be sharded evenly.
        """
        check_count("batch_size", batch_size)
        check_count("seed", seed, least=0)
        check_instance("placement", placement, Placement | None, "a `Placement()`")
        data = np.asarray(data) if isinstance(data, (list, tuple)) else data
        if np.ndim(data) < 1 or len(data) == 0:
            raise ValueError(
                f"`data` must hold samples; got an array of shape {np.shape(data)}."
            )
        if not (jnp.issubdtype(data.dtype, jnp.number) or data.dtype == bool):
            raise ValueError(f"`data` must be numbers; got {data.dtype}.")
        if placement is not None:
            placement.check_batch(batch_size)
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.placement = placement
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, n: int) -> np.ndarray:
        """The indices of the samples in batch n, counted from 0."""
        number = len(self.data)
        places = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        epochs, within = np.divmod(places, number)
        indices = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch))[within[chosen]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            random = np.random.default_rng([self.seed, epoch])
            self._orders[epoch] = random.permutation(len(self.data))
        return self._orders[epoch]

    def __getitem__(self, n: int) -> Array:
        """Batch n, on its devices."""
        indices = self.indices(n)
        if self.placement is None:
            return jax.device_put(self.data[indices])

        def rows(part):
            # Only the first axis is sharded.
            return self.data[indices[part[0]]]

        shape = (self.batch_size, *self.data.shape[1:])
        return jax.make_array_from_callback(shape, self.placement.batch, rows)

    def iterate_from(self, n: int, ahead: int = 2) -> Generator[Array, None, None]:
        """Iterate over batches n, n + 1 and so on without end, prefetched by a thread.

        **Arguments:**

        - `n`: the first batch.
        - `ahead`: the number of batches to prefetch.
        """
        with ThreadPoolExecutor(1) as pool:
            ready = [pool.submit(self.__getitem__, n + i) for i in range(ahead)]
            n += ahead
            try:
                while True:
                    yield ready.pop(0).result()
                    ready.append(pool.submit(self.__getitem__, n))
                    n += 1
            finally:
                pool.shutdown(cancel_futures=True)


class Augmentation(eqx.Module):
    """Convert stored images to training data, on the device.

    The full range of `uint8`, `uint16` and `bool` is scaled to [-1, 1]; floating-point
    numbers stay as they are.

    **Arguments:**

    - `flip`: whether to flip images horizontally, each with probability one half.
    - `dequantise`: whether to dequantise integers by uniform noise, as in
        [`gddim_eqx.dequantise`][]. The paper does not.

    **Raises:** `ValueError` for other integers, whose range is not known, and for `flip` of
    data that are not images.
    """

    flip: bool = eqx.field(default=False, static=True)
    dequantise: bool = eqx.field(default=False, static=True)

    def __call__(
        self, key: Key, x: Shaped[Array, "batch *shape"]
    ) -> Inexact[Array, "batch *shape"]:
        check_key(key)
        flip_key, noise_key = jr.split(key)
        if self.flip:
            if x.ndim != 4:
                raise ValueError(
                    "`flip` is for images, `(batch, height, width, channels)`; got an "
                    f"array of shape {x.shape}."
                )
            flipped = jr.bernoulli(flip_key, shape=(len(x), *[1] * (x.ndim - 1)))
            x = jnp.where(flipped, jnp.flip(x, -2), x)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            check_real(x.dtype, "The batch")
            return x
        highest = _highest_level(x.dtype)
        if self.dequantise:
            x = x.astype(jnp.uint8) if x.dtype == bool else x
            return dequantise(noise_key, x, highest + 1, dtype=jnp.float32)
        return x.astype(jnp.float32) / (highest / 2) - 1


def _highest_level(dtype) -> int:
    known = {"bool": 1, "uint8": 255, "uint16": 65535}
    if str(dtype) not in known:
        raise ValueError(
            "Images must have dtype uint8 or uint16, whose levels are scaled to [-1, 1], "
            f"or a floating-point dtype; got {dtype}, whose range is not known. Convert "
            "them to one of these."
        )
    return known[str(dtype)]
