import functools as ft
import hashlib
import itertools
import operator
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
from jaxtyping import Array, PyTree

from .._custom_types import Key
from .._linear import check_real
from .._misc import check_count, check_instance, check_key, show
from .._pixels import dequantise, highest_level
from .._sharding import Placement


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


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
        # A list is one source.
        is_list = lambda x: isinstance(x, list) and x is data
        self.sources, self._treedef = jtu.tree_flatten(data, is_leaf=is_list)
        self.number = _common_length(self.sources)
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
        pairs = zip(epochs.tolist(), within.tolist())
        return np.array([_order(self.seed, e, self.number)[i] for e, i in pairs])

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
        content = hashlib.sha256()
        some = np.unique(np.linspace(0, self.number - 1, 64).astype(int))
        whole = lambda source: _is_array(source) and source.nbytes <= 2**26
        with self._lock:
            rows = [x if whole(x) else _rows(x, some) for x in self.sources]
        leaves = [np.asarray(leaf) for leaf in jtu.tree_leaves(rows)]
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
            try:
                for next_n in itertools.count(n + ahead):
                    yield ready.pop(0).result()
                    ready.append(pool.submit(self.__getitem__, next_n))
            finally:
                pool.shutdown(cancel_futures=True)


def _common_length(sources: list[Any]) -> int:
    """**Raises:** `ValueError` unless all are samples, and equally many."""
    for source in sources:
        if not (operator.length_hint(source) and hasattr(source, "__getitem__")):
            raise ValueError(
                "`data` must hold samples: an array with a leading axis, or an object with "
                f"`len(data)` and `data[index]`; got {show(source)}."
            )
    lengths = [len(source) for source in sources]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"All leaves of `data` must be equally long; got lengths {lengths}."
        )
    return lengths[0]


@ft.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(number)


def _rows(source: Any, indices: np.ndarray) -> PyTree[np.ndarray]:
    """Samples of a source, stacked."""
    samples = source[indices] if _is_array(source) else [source[int(i)] for i in indices]
    try:
        stack = lambda *leaves: np.stack(leaves)
        stacked = samples if _is_array(source) else jtu.tree_map(stack, *samples)
    except ValueError as error:
        raise ValueError(
            f"The samples of a {type(source).__name__} must have the same structure and "
            f"shape: {error}. For data and conditions, pass a tuple: `(data, condition)`."
        ) from error
    for leaf in jtu.tree_leaves(stacked):
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise ValueError(f"`data` must be numbers; got {leaf.dtype}.")
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
        x, condition = split_condition(batch)
        x = self._augment(check_key(key), x)
        return x if condition is None else (x, condition)

    def _augment(self, key, x):
        flip_key, noise_key = jr.split(key)
        if self.flip:
            if x.ndim != 4:
                raise ValueError(
                    "`flip` is for images, `(batch, height, width, channels)`; got an "
                    f"array of shape {x.shape}."
                )
            flipped = jr.bernoulli(flip_key, shape=(len(x), 1, 1, 1))
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
    if _is_array(batch):
        return batch, None
    size = f" of {len(batch)}" if isinstance(batch, tuple) else ""
    raise ValueError(
        "A batch must be an array of data, or a pair `(data, condition)`; got a "
        f"{type(batch).__name__}{size}. Convert it with the `prepare` of the `Trainer`."
    )
