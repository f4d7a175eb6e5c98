import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact

from .._custom_types import Key
from .._misc import as_floats
from .basis import AbstractBasis, IdentityBasis


dot = ft.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Covariance(eqx.Module):
    r"""The covariance of data: $B^\top \mathrm{diag}(r)\,B + V \mathrm{diag}(e)\,V^\top$,
    with variances $r$ in an orthogonal basis, and in addition eigenvectors $V$ with excess
    variances $e$, where $r$ is a scalar."""

    variances: Inexact[Array, "..."]
    """A scalar, or of the shape of the data."""
    basis: AbstractBasis
    vectors: Inexact[Array, "*components size rank"] | None = None
    """Orthonormal columns, for flattened data in the data's own coordinates."""
    excess: Inexact[Array, "*components rank"] | None = None

    def astype(self, dtype) -> "Covariance":
        return jax.tree_util.tree_map(lambda x: x.astype(dtype), self)

    def root_given(
        self,
        precision: Inexact[Array, "*spectrum"],
        basis: AbstractBasis,
        x: Inexact[Array, "..."],
        shape: tuple[int, ...],
        inverse: bool = False,
    ) -> Inexact[Array, "..."]:
        r"""Multiply by the symmetric square root of the covariance given a measurement,
        $(C^{-1} + D)^{-1}$, or by its inverse.

        **Arguments:**

        - `precision`: $D$, of coefficients in a basis: a scalar, or one number for each.
        - `basis`: that basis.
        - `x`: coefficients in it, `(*batch, *shape)`.
        - `shape`: the shape of the data.

        **Raises:** `ValueError` where it would take a decomposition at every time."""
        uniform = precision.size == 1
        inner, rest, vectors, excess = self.in_basis(basis, uniform, shape)
        if vectors is not None and not uniform:
            raise ValueError(
                "The square root of the covariance of data given a state is not known in "
                "closed form, as the process acts on each coefficient in a basis of its "
                "own. Give the data a single variance, or variances in the basis of the "
                f"process: `NormalData(mean, variances, basis={basis!r})`."
            )
        precision = precision if uniform else jnp.broadcast_to(precision, shape)
        precision, power = precision.reshape(-1), -0.5 if inverse else 0.5
        # Differentiable by the precision also where the variance is 0.
        scale = lambda v: v**power * (1 + v * precision) ** -power
        there, back = between(basis, inner, shape)
        flat = there(x)
        y = scale(rest)[None] * flat
        if vectors is not None and excess is not None:
            change = scale(rest + excess) - scale(rest)
            y = y + dot(dot(flat, vectors) * change[None], vectors.T)
        return back(y, x.shape)

    def in_basis(self, basis: AbstractBasis, uniform: bool, shape: tuple[int, ...]):
        """The variances, flattened, the eigenvectors and the excess in a basis: in this
        one, or, if what acts there is `uniform`, in one where there are no eigenvectors, or
        fewer. The latter is returned first."""
        rest, vectors, excess = self.variances.reshape(-1), self.vectors, self.excess
        size = math.prod(shape)
        if vectors is None:
            if rest.size == 1 or self.basis == basis:
                return basis, rest, None, None
            if uniform:
                return self.basis, rest, None, None
            eye = jnp.eye(size, dtype=rest.dtype).reshape(size, *shape)
            vectors = self.basis.inverse(eye).reshape(size, size).T
            rest, excess = rest.min(keepdims=True), rest - rest.min(keepdims=True)
        elif uniform and excess is not None and vectors.shape[1] == size:
            return _Eigenbasis(vectors), rest + excess, None, None
        elif uniform:
            return self.basis, rest, vectors, excess
        columns = basis.forward(vectors.T.reshape(-1, *shape))
        return basis, rest, columns.reshape(vectors.shape[::-1]).T, excess

    def sample(self, key: Key, n: int, shape: tuple[int, ...]) -> Array:
        """Draw `n` samples with mean 0, `(n, *shape)`."""
        keys, dtype = jr.split(key), self.variances.dtype
        noise = jr.normal(keys[0], (n, *shape), dtype)
        std = jnp.broadcast_to(jnp.sqrt(self.variances), shape)[None]
        x = self.basis.inverse(std * noise)
        if self.vectors is None or self.excess is None:
            return x
        latent = jr.normal(keys[1], (n, len(self.excess)), dtype)
        latent = jnp.sqrt(self.excess)[None] * latent
        return x + dot(latent, self.vectors.T).reshape(x.shape)


def between(
    basis: AbstractBasis, inner: AbstractBasis, shape: tuple[int, ...]
) -> tuple[Callable[[Array], Array], Callable[[Array, tuple[int, ...]], Array]]:
    """From coefficients in a basis, `(*batch, *shape)`, to those in another, `(number,
    size)`, and back to a given shape."""

    def there(x):
        x = x if inner == basis else inner.forward(basis.inverse(x))
        return x.reshape(-1, math.prod(shape))

    def back(x, to):
        x = x.reshape(to)
        return x if inner == basis else basis.forward(inner.inverse(x))

    return there, back


def latent_given(
    pull: Inexact[Array, "number size"],
    columns: Inexact[Array, "size rank"],
    precision: Inexact[Array, " #size"],
) -> tuple[Inexact[Array, "number rank"], Inexact[Array, " rank"]]:
    """The mean of standard normal variables given a measurement of `columns @ latent` with
    a diagonal precision, and the diagonal of a root of their inverse covariance. Where the
    precision is a number the columns must be orthogonal."""
    if precision.size == 1:
        total = 1 + precision * (columns**2).sum(0)
        return dot(pull, columns) / total[None], jnp.sqrt(total)
    eye = jnp.eye(columns.shape[1], dtype=columns.dtype)
    root = jnp.linalg.cholesky(eye + dot(columns.T * precision[None], columns))
    latent = jax.scipy.linalg.cho_solve((root, True), dot(pull, columns).T).T
    return latent, jnp.diagonal(root)


def make_covariance(
    covariance: Any, basis: AbstractBasis | None, shape: tuple[int, ...], dtype
) -> Covariance:
    """A covariance in one of the forms that [`gddim_eqx.NormalData`][] takes.

    **Raises:** `ValueError` for anything else. Traced values are not checked."""
    size = math.prod(shape)
    if isinstance(covariance, Covariance):
        rows = size if covariance.vectors is None else len(covariance.vectors)
        if covariance.variances.shape not in ((), shape) or rows != size:
            raise ValueError(f"`covariance` is not that of data of shape {shape}.")
        if basis not in (None, covariance.basis):
            raise ValueError("This covariance has a basis of its own: leave out `basis`.")
        return covariance.astype(dtype)
    given = covariance if isinstance(covariance, tuple) else (covariance,)
    parts = [as_floats("covariance", x) for x in given]
    shapes = [x.shape for x in parts]
    one, rank = len(parts) == 1, shapes[0][:1] if shapes else (0,)
    if not (
        shapes in ([()], [shape], [(size, size)])
        or (rank != (0,) and shapes == [rank, (size, *rank), ()])
    ):
        raise ValueError(
            f"For `mean` of shape {shape}, `covariance` must be a number, variances of "
            f"shape {shape}, a matrix of shape {(size, size)}, or a tuple of eigenvalues "
            f"(rank,), eigenvectors ({size}, rank) and a number; got "
            f"{' and '.join(map(str, shapes)) or 'nothing'}."
        )
    on_host = not any(isinstance(x, Tracer) for x in parts)
    if on_host:
        # In double precision, whatever JAX's.
        parts = [np.asarray(x, np.float64) for x in given]
        if not all(np.isfinite(x).all() for x in parts):
            raise ValueError("`covariance` must be finite, but holds NaN or infinity.")
    if shapes in ([()], [shape]):
        if on_host and parts[0].min() < 0:
            raise ValueError(f"Variances must not be negative; got {parts[0].min()}.")
        basis = IdentityBasis() if basis is None else basis
        return Covariance(jnp.asarray(parts[0], dtype), basis)
    if basis is not None:
        raise ValueError(
            "`basis` is for variances, of the shape of `mean`; a covariance matrix and its "
            "eigenvectors are in the data's own coordinates. Leave it out."
        )
    if one and on_host and np.abs(parts[0] - parts[0].T).max() > _rounding(parts[0]):
        raise ValueError("`covariance` must be symmetric, but this matrix is not.")
    linalg = np.linalg if on_host else jnp.linalg
    values, vectors = linalg.eigh(parts[0]) if one else parts[:2]
    rest = values[0] if one else parts[2]
    if on_host:
        _check_eigenvalues(values, vectors, rest)
    rest = jnp.maximum(jnp.asarray(rest, dtype), 0)
    excess = jnp.maximum(jnp.asarray(values, dtype) - rest, 0)
    return Covariance(rest, IdentityBasis(), jnp.asarray(vectors, dtype), excess)


def _rounding(x: Any) -> float:
    """What is taken for rounding, as of moments in single precision."""
    return 1e-5 * np.abs(x).max()


def _check_eigenvalues(values, vectors, rest):
    if rest < -_rounding(values):
        raise ValueError(
            "`covariance` must be positive semidefinite, but an eigenvalue is "
            f"{float(rest):.3g}; the largest is {values.max():.3g}."
        )
    if values.min() < rest - _rounding(values):
        raise ValueError(
            "The eigenvalues in `covariance` must be the largest, but one is "
            f"{values.min():.3g}, less than the variance in all other directions, "
            f"{float(rest):.3g}."
        )
    if np.abs(vectors.T @ vectors - np.eye(len(values))).max() > 1e-4:
        raise ValueError(
            "The eigenvectors in `covariance` must be orthonormal columns, but these are "
            "not. Divide them by their norms, or pass the matrix."
        )


class _Eigenbasis(AbstractBasis):
    vectors: Inexact[Array, "size size"]

    def forward(self, x):
        return self._times(x, self.vectors)

    def inverse(self, x):
        return self._times(x, self.vectors.T)

    def _times(self, x, matrix):
        flat = x.reshape(-1, len(matrix))
        return dot(flat, matrix).reshape(x.shape)
