"""K-means."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.random as jr
import numpy as np

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
    centres = x[random.integers(len(x), size=1)]
    while len(centres) < number:
        square = _squares(x, centres).min(1)
        chosen = random.choice(len(x), p=square / square.sum())
        centres = np.concatenate([centres, x[chosen : chosen + 1]])
    for _ in range(100):
        which = nearest(x, centres)
        before, held = centres, [which == i for i in range(number)]
        centres = np.stack([x[w].mean(0) if w.any() else c for w, c in zip(held, before)])
        if (centres == before).all():
            break
    return centres


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre."""
    return _squares(x.reshape(len(x), -1), centres).argmin(1)


def _squares(x, centres):
    squares = (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)[None]
    return np.maximum(squares, 0)


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
