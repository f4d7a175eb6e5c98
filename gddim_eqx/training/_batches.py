import functools as ft
import hashlib
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact, PyTree, Shaped

from .._custom_types import Key
from .._linear import check_real
from .._misc import check_count, check_instance, check_key, show
from .._pixels import dequantise, highest_level
from .._sharding import Placement


class Batches:
    """Batches of data, shuffled anew in each epoch.

    Batch n is a function of the seed and of n, so no position needs to be saved: to resume
    after n steps, ask for batch n. It does not depend on the number of devices, each of
    which gets a shard, or of processes, each of which reads what its devices need. Every
    sample occurs once per epoch; a batch may span the end of one epoch and the beginning of
    the next.

    This is why no data loading library is used: one that streams from disk has a position
    to save, and an order that depends on the number of processes.

    !!! example

        ```python
        import gddim_eqx as gd
        import numpy as np

        images, labels = np.zeros((100, 8, 8, 1), np.uint8), np.arange(100) % 10
        batches = gd.training.Batches((images, labels), 16)
        x, condition = batches[0]
        ```
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int = 0,
        placement: Placement | None = None,
    ):
        """**Arguments:**

        - `data`: an array of shape `(number, *shape)`, or a `numpy.memmap`; or, for data
            that do not fit in memory, any object with `len(data)` and `data[index]`, which
            returns a sample. Or a pytree of these of equal length, such as a pair
            `(data, condition)` for a conditional model. A batch has the same structure.
        - `batch_size`: the batch size, over all devices and processes.
        - `seed`: the seed for shuffling.
        - `placement`: the sharding over devices; by default batches are on JAX's first.

        **Raises:** `ValueError` for no data, or a batch that cannot be sharded evenly.
        """
        check_count("batch_size", batch_size)
        check_count("seed", seed, least=0)
        check_instance("placement", placement, Placement | None, "a `Placement()`")
        data = _stacked(data) if isinstance(data, list) else data
        self.sources, self._treedef = jtu.tree_flatten(data)
        self.number = _common_length(self.sources)
        if isinstance(data, tuple):
            _check_not_nan(data[1:])
        if placement is not None:
            placement.check_batch(batch_size)
        self.batch_size, self.seed = batch_size, seed
        self.placement = placement
        # Objects that read files seldom expect two threads.
        self._lock = threading.Lock()

    def indices(self, n: int) -> np.ndarray:
        """The indices of the samples in batch n, counted from 0."""
        places = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        epochs, within = np.divmod(places, self.number)
        orders = {e: _order(self.seed, e, self.number) for e in np.unique(epochs).tolist()}
        return np.array([orders[e][i] for e, i in zip(epochs.tolist(), within.tolist())])

    def __iter__(self) -> Iterator[PyTree[np.ndarray]]:
        """All samples once, in the order of the data, on the host."""
        for n in range(0, self.number, self.batch_size):
            yield self._read(np.arange(n, min(n + self.batch_size, self.number)))

    def __getitem__(self, n: int) -> PyTree[Array]:
        """Batch n, on its devices."""
        if self.placement is None:
            return jax.device_put(self.read(n))
        indices, size = self.indices(n), self.batch_size
        sharding = self.placement.batch
        # Each process reads what its devices need.
        parts = sharding.addressable_devices_indices_map((size,)).items()
        shards = [jax.device_put(self._read(indices[i]), device) for device, i in parts]

        def join(*leaves):
            shape = (size, *leaves[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, leaves)

        return jtu.tree_map(join, *shards)

    def read(self, n: int) -> PyTree[np.ndarray]:
        """Batch n, whole, on the host."""
        return self._read(self.indices(n))

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others, for the `config` of
        [`gddim_eqx.training.Checkpoints`][], serialisable as JSON: the shape and dtype of
        each leaf, with the number of samples, and a hash of the contents. It covers arrays
        of up to 64 MiB completely; of larger ones, and of other objects, 64 samples. It is
        of no use for objects whose samples are random.
        """
        content, leaves = hashlib.sha256(), []
        some = np.unique(np.linspace(0, self.number - 1, 64).astype(int))
        for source in self.sources:
            whole = _is_array(source) and source.nbytes <= 2**26
            with self._lock:
                rows = source if whole else _rows(source, some)
            leaves += [np.asarray(leaf) for leaf in jtu.tree_leaves(rows)]
        for leaf in leaves:
            content.update(leaf.tobytes())
        return {
            "shapes": [[self.number, *leaf.shape[1:]] for leaf in leaves],
            "dtypes": [str(leaf.dtype) for leaf in leaves],
            "content": content.hexdigest(),
        }

    def _read(self, indices: np.ndarray) -> PyTree[np.ndarray]:
        with self._lock:
            lengths = [len(source) for source in self.sources]
            if set(lengths) != {self.number}:
                raise ValueError(
                    f"`data` had {self.number} samples when `Batches` was made, but its "
                    f"leaves now have {lengths}. Make new `Batches` for data that changed."
                )
            rows = [_rows(x, indices) for x in self.sources]
        return jtu.tree_unflatten(self._treedef, rows)

    def iterate_from(self, n: int, ahead: int = 2) -> Generator[PyTree[Array], None, None]:
        """Iterate over batches n, n + 1 and so on without end, prefetched by threads.

        **Arguments:**

        - `n`: the first batch.
        - `ahead`: the number of batches to prefetch, each by a thread of its own.
        """
        with ThreadPoolExecutor(ahead) as pool:
            ready = [pool.submit(self.__getitem__, n + i) for i in range(ahead)]
            n += ahead
            try:
                while True:
                    yield ready.pop(0).result()
                    ready.append(pool.submit(self.__getitem__, n))
                    n += 1
            finally:
                pool.shutdown(cancel_futures=True)


def _stacked(samples: list) -> np.ndarray:
    try:
        return np.asarray(samples)
    except ValueError as error:
        raise ValueError(
            "`data` that are a list must be samples of one shape. For data and conditions, "
            f"pass a tuple: `(data, condition)`. ({error})"
        ) from error


def _common_length(sources: list[Any]) -> int:
    """**Raises:** `ValueError` unless all are samples, and equally many."""
    for source in sources:
        try:
            empty = len(source) == 0
        except TypeError:
            empty = True
        if empty or not hasattr(source, "__getitem__"):
            raise ValueError(
                "`data` must hold samples: an array with a leading axis, or an object with "
                f"`len(data)` and `data[index]`; got {show(source)}."
            )
        if _is_array(source):
            _check_numbers(source)
    lengths = [len(source) for source in sources]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"All leaves of `data` must be equally long; got lengths {lengths}."
        )
    return lengths[0]


@ft.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(number)


def _is_array(source: Any) -> bool:
    return isinstance(source, (np.ndarray, jax.Array))


def _check_numbers(x: Any) -> None:
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise ValueError(f"`data` must be numbers; got {x.dtype}.")


def _check_not_nan(condition: Any) -> None:
    for leaf in jtu.tree_leaves(condition):
        # What is on disk is not read for this.
        in_memory = _is_array(leaf) and not isinstance(leaf, np.memmap)
        if in_memory and jnp.issubdtype(leaf.dtype, jnp.inexact):
            wrong = np.flatnonzero(np.isnan(leaf).reshape(len(leaf), -1).any(-1))
            if len(wrong):
                raise ValueError(
                    f"The condition holds NaN, in {len(wrong)} samples; the first has "
                    f"index {wrong[0]}."
                )


def _rows(source: Any, indices: np.ndarray) -> PyTree[np.ndarray]:
    """Samples of a source, stacked."""
    if _is_array(source):
        return source[indices]
    samples = [source[int(index)] for index in indices]
    try:
        stacked = jtu.tree_map(lambda *leaves: np.stack(leaves), *samples)
    except ValueError as error:
        raise ValueError(
            f"The samples of a {type(source).__name__} must have the same structure and "
            f"shape: {error}."
        ) from error
    for leaf in jtu.tree_leaves(stacked):
        _check_numbers(leaf)
    return stacked


class Augmentation(eqx.Module):
    """Convert stored images to training data, on the device. Of a batch that is a pair of
    data and condition, the condition stays as it is.

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

    def __call__(self, key: Key, batch: PyTree) -> Any:
        check_key(key)
        x, condition = split_condition(batch)
        x = self._augment(key, x)
        return x if condition is None else (x, condition)

    def _augment(
        self, key: Key, x: Shaped[Array, "batch *shape"]
    ) -> Inexact[Array, "batch *shape"]:
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
        highest = highest_level(x.dtype)
        if self.dequantise:
            x = x.astype(jnp.uint8) if x.dtype == bool else x
            return dequantise(noise_key, x, highest + 1, dtype=jnp.float32)
        return x.astype(jnp.float32) / (highest / 2) - 1


def split_condition(batch: Any) -> tuple[Any, Any]:
    """The data and the condition of a batch, which is `None` if it has none."""
    if isinstance(batch, tuple) and len(batch) == 2:
        return batch
    if not _is_array(batch):
        size = f" of {len(batch)}" if isinstance(batch, tuple) else ""
        raise ValueError(
            "A batch must be an array of data, or a pair `(data, condition)`; got a "
            f"{type(batch).__name__}{size}. Convert it by the `prepare` of the `Trainer`."
        )
    return batch, None
