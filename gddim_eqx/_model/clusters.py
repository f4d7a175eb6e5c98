"""K-means."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.random as jr
import numpy as np
from scipy.cluster.vq import kmeans2, vq

from .._custom_types import Key
from .moments import samples_of


_MOST = 10_000


def cluster(data: Any, number: int, key: Key) -> np.ndarray:
    """The centres of clusters of the data, or of a random part of them: by Lloyd's
    algorithm, from centres that are drawn one by one, by the squared distance to those
    before (Arthur and Vassilvitskii 2007).

    **Raises:** `ValueError` for data that cannot be read again."""
    if isinstance(data, Iterator):
        raise ValueError(
            "To find clusters, data are read twice, but an iterator can be read once. Pass "
            "an array, or `gddim_eqx.training.Batches`."
        )
    with jax.ensure_compile_time_eval():
        seed = np.asarray(jr.bits(key, (4,)))
    random = np.random.default_rng(seed)
    x = _some(data, random)
    if len(np.unique(x, axis=0)) < number:
        raise ValueError(f"There are fewer than {number} different samples.")
    # By the name that old versions know, too.
    options: Any = dict(seed=random)
    return kmeans2(x, number, iter=50, minit="++", **options)[0]


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre."""
    return vq(x.reshape(len(x), -1), centres)[0]


def _some(data, random):
    """A random part of the samples, flattened: those with the smallest of random marks."""
    kept, marks = np.zeros(0), np.zeros(0)
    for x, _ in samples_of(data):
        x = x.reshape(len(x), -1)
        kept = np.concatenate([kept, x]) if len(kept) else x
        marks = np.concatenate([marks, random.random(len(x))])
        chosen = np.argsort(marks)[:_MOST]
        kept, marks = kept[chosen], marks[chosen]
    return kept
