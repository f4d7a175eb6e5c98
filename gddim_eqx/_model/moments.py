"""Moments of data in one pass, in double precision on the host."""

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._linear import AbstractBasis, check_real
from .._misc import check_count, check_instance, show
from .._pixels import highest_level


_CHUNK = 512


def samples_of(data: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Parts of the data, `(number, *shape)`, and their labels or `None`.

    **Raises:** `ValueError` for anything but finite samples of one shape."""
    if hasattr(data, "shape") or isinstance(data, tuple):
        data = [data]
    elif isinstance(data, Sized) or not isinstance(data, Iterable):
        raise ValueError(
            "`data` must be an array, a pair of arrays `(data, labels)`, or an iterable of "
            f"batches of these; got {show(data)}. Stack samples by `numpy.stack`, or wrap "
            "them by `gddim_eqx.training.Batches`; of a loader of batches, pass "
            "`iter(loader)`."
        )
    shape, number = None, 0
    for batch in data:
        x, labels = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
        shape = np.shape(x)[1:] if shape is None else shape
        if np.ndim(x) == 0 or np.shape(x)[1:] != shape:
            raise ValueError(
                "`data` must be samples of one shape, (number, *shape); got an array of "
                f"shape {np.shape(x)}"
                + (f" after one for samples of shape {shape}." if np.ndim(x) else ".")
            )
        if labels is not None and np.shape(labels) != (len(x),):
            raise ValueError(
                f"There must be one label per sample, ({len(x)},); got shape "
                f"{np.shape(labels)}."
            )
        number += len(x)
        for n in range(0, len(x), _CHUNK):
            part = slice(n, n + _CHUNK)
            yield _as_double(x[part]), None if labels is None else np.asarray(labels[part])
    if number == 0:
        raise ValueError("`data` must hold samples; got none.")


def _as_double(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer):
        # As in training.
        return x / (highest_level(x.dtype) / 2) - 1
    check_real(x.dtype, "The data")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        wrong = int((~np.isfinite(x.reshape(len(x), -1))).any(1).sum())
        raise ValueError(
            f"The data must be finite, but {wrong} of {len(x)} samples are not."
        )
    return x


def moments_of(
    data: Any,
    basis: AbstractBasis | None,
    rank: int | None,
    number: int = 1,
    assign: Callable[[np.ndarray, Any], np.ndarray] | None = None,
) -> tuple[list[tuple[np.ndarray, Any]], np.ndarray]:
    """Mean and covariance, as for [`gddim_eqx.NormalData`][], of each of a number of
    groups, to which `assign` assigns samples; and the sizes of the groups."""
    check_instance("basis", basis, AbstractBasis | None, "such as `CosineBasis()`")
    if not (basis is None or rank is None):
        raise ValueError("Pass `basis` or `rank`, not both.")
    if rank is not None:
        check_count("rank", rank)
    sums, shape = [_Sums(basis, rank) for _ in range(number)], ()
    for x, labels in samples_of(data):
        shape = x.shape[1:]
        groups = np.zeros(len(x), int) if assign is None else assign(x, labels)
        for i, group in enumerate(sums):
            group.add(x[groups == i])
    where = [f", in component {i}" if number > 1 else "" for i in range(number)]
    found = [group.moments(shape, name) for group, name in zip(sums, where)]
    return found, np.array([group.count for group in sums])


class _Sums:
    def __init__(self, basis: AbstractBasis | None, rank: int | None):
        self.basis, self.rank, self.count = basis, rank, 0
        self.total, self.mean, self.scatter = 0.0, np.zeros(()), np.zeros(())

    def add(self, x: np.ndarray) -> None:
        if len(x) == 0:
            return
        x = self._convert(x, inverse=False).reshape(len(x), -1)
        mean = x.mean(0)
        # Squares around the mean of all (Chan, Golub and LeVeque 1979).
        n, change = self.count + len(x), mean - self.mean
        between = change * math.sqrt(self.count * len(x) / n)
        rows = np.concatenate([x - mean, between[None]])
        self.mean = self.mean + change * (len(x) / n)
        self.count, self.total = n, self.total + (rows**2).sum()
        if self.basis is not None:
            self.scatter = self.scatter + (rows**2).sum(0)
        elif self.rank is None:
            self.scatter = self.scatter + rows.T @ rows
        else:
            # The largest principal components, and more, as others may grow to be.
            kept = 2 * self.rank + 32
            for n in range(0, len(rows), kept):
                part = rows[n : n + kept]
                part = np.concatenate([self.scatter, part]) if self.scatter.ndim else part
                _, vectors = np.linalg.eigh(part @ part.T)
                self.scatter = vectors[:, -kept:].T @ part

    def moments(self, shape: tuple[int, ...], where: str) -> tuple[np.ndarray, Any]:
        size, rank = math.prod(shape), self.rank
        if rank is not None and rank >= size:
            raise ValueError(
                f"`rank` must be less than {size}, the size of a sample; got {rank}."
            )
        needed = 2 if self.basis is not None else (size if rank is None else rank) + 1
        if self.count < needed:
            raise ValueError(
                f"This covariance takes at least {needed} samples of shape {shape}; got "
                f"{self.count}{where}. Pass a smaller `rank=`, for the largest eigenvalues "
                "and one variance in all other directions, or `basis=`, for independent "
                "coefficients in a basis."
            )
        if self.total <= self.count * 1e-24 * (self.mean**2).sum():
            raise ValueError(f"All samples are equal{where}: data must vary.")
        mean = self._convert(self.mean.reshape(1, *shape), inverse=True)[0]
        freedom = self.count - 1
        if self.basis is not None:
            return mean, (self.scatter / freedom).reshape(shape)
        if rank is None:
            return mean, self.scatter / freedom
        _, std, vectors = np.linalg.svd(self.scatter, full_matrices=False)
        values = std[:rank] ** 2 / freedom
        rest = max(self.total / freedom - values.sum(), 0) / (size - rank)
        return mean, (np.maximum(values, rest), vectors[:rank].T, rest)

    def _convert(self, x: np.ndarray, inverse: bool) -> np.ndarray:
        if self.basis is None:
            return x
        with jax.enable_x64(True):
            turn = self.basis.inverse if inverse else self.basis.forward
            return np.asarray(turn(jnp.asarray(x)))
