import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .basis import AbstractBasis


_highest = jax.lax.Precision.HIGHEST


class Covariance(eqx.Module):
    r"""The covariance of data: $B^\top \mathrm{diag}(r)\,B + V \mathrm{diag}(e)\,V^\top$,
    with variances $r$ in an orthogonal basis, and in addition eigenvectors $V$ with excess
    variances $e$, where $r$ is a scalar."""

    variances: Inexact[Array, "..."]
    """A scalar, or of the shape of the data."""
    basis: AbstractBasis
    vectors: Inexact[Array, "size rank"] | None = None
    """Orthonormal columns, for flattened data in the data's own coordinates."""
    excess: Inexact[Array, " rank"] | None = None

    def astype(self, dtype) -> "Covariance":
        return jax.tree_util.tree_map(lambda x: x.astype(dtype), self)

    def given(
        self,
        precision: Inexact[Array, "*spectrum"],
        basis: AbstractBasis,
        shape: tuple[int, ...],
    ) -> "ConditionalCovariance":
        r"""The covariance given a measurement of all coefficients in a basis, $(C^{-1} +
        D)^{-1}$.

        **Arguments:**

        - `precision`: $D$: a scalar, or one number per coefficient.
        - `basis`: the basis of the coefficients.
        - `shape`: the shape of the data.
        """
        vectors, excess, rest = self.vectors, self.excess, self.variances.reshape(-1)
        inner, aligned = basis, rest.size == 1 or self.basis == basis
        if precision.size == 1 and not (aligned and vectors is None):
            inner = self.basis
        elif vectors is None and not aligned:
            size = math.prod(shape)
            eye = jnp.eye(size, dtype=rest.dtype).reshape(size, *shape)
            vectors = self.basis.inverse(eye).reshape(size, size).T
            rest, excess = rest.min(keepdims=True), rest - rest.min(keepdims=True)
        if vectors is not None and inner is basis:
            columns = basis.forward(vectors.T.reshape(-1, *shape))
            vectors = columns.reshape(vectors.shape[::-1]).T
        precision = jnp.broadcast_to(precision, shape) if precision.size > 1 else precision
        return ConditionalCovariance(
            precision.reshape(-1), rest, vectors, excess, inner, basis, shape
        )


class ConditionalCovariance(eqx.Module):
    r"""The covariance $(C^{-1} + D)^{-1}$ of data given a measurement. In the coordinates
    of `inner`, $D$ and the remainder $r$ of $C$ are diagonal."""

    precision: Inexact[Array, " #size"]
    rest: Inexact[Array, " #size"]
    vectors: Inexact[Array, "size rank"] | None
    excess: Inexact[Array, " rank"] | None
    inner: AbstractBasis
    basis: AbstractBasis
    shape: tuple[int, ...] = eqx.field(static=True)

    def mv(self, pull: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
        """Multiply coefficients in `basis`, `(*batch, *shape)`."""
        x, back = self._flat(pull)
        rest, precision = self.rest[None], self.precision[None]
        shrink = 1 / (1 + rest * precision)
        if self.vectors is None:
            return back(rest * shrink * x)
        assert self.excess is not None
        # With data `vectors @ latent + remainder`, first the latent variables given the
        # measurement, then the remainder given both.
        scale = jnp.sqrt(self.excess)[None]
        columns = self.vectors * scale
        latent = jnp.matmul(shrink * x, columns, precision=_highest)
        gain = precision * shrink
        if precision.size == 1:
            latent = latent / (1 + gain * scale**2)
        else:
            eye = jnp.eye(len(self.excess), dtype=columns.dtype)
            total = eye + jnp.matmul(columns.T * gain, columns, precision=_highest)
            latent = jax.scipy.linalg.cho_solve(
                (jnp.linalg.cholesky(total), True), latent.T
            ).T
        explained = jnp.matmul(latent, columns.T, precision=_highest)
        return back(shrink * (explained + rest * x))

    def root_mv(
        self, x: Inexact[Array, "..."], inverse: bool = False
    ) -> Inexact[Array, "..."]:
        """Multiply coefficients in `basis` by the symmetric square root, or its inverse.

        **Raises:** `ValueError` where it would take a decomposition at every time."""
        if self.vectors is not None and self.precision.size > 1:
            raise ValueError(
                "The square root of the covariance of data given a state is not known in "
                "closed form, as the process acts on each coefficient in a basis of its "
                "own. Give the data a single variance, or variances in the basis of the "
                f"process: `NormalData(mean, variances, basis={self.basis!r})`."
            )
        power = -0.5 if inverse else 0.5
        scale = lambda variance: (variance / (1 + variance * self.precision)) ** power
        x, back = self._flat(x)
        y = scale(self.rest)[None] * x
        if self.vectors is not None:
            assert self.excess is not None
            change = scale(self.rest + self.excess) - scale(self.rest)
            along = jnp.matmul(x, self.vectors, precision=_highest) * change[None]
            y = y + jnp.matmul(along, self.vectors.T, precision=_highest)
        return back(y)

    def _flat(self, x):
        """Coefficients in `inner`, `(number, size)`, and the way back."""
        batch = x.shape[: x.ndim - len(self.shape)]
        same = self.inner == self.basis
        x = x if same else self.inner.forward(self.basis.inverse(x))

        def back(x):
            x = x.reshape(*batch, *self.shape)
            return x if same else self.basis.forward(self.inner.inverse(x))

        return x.reshape(-1, math.prod(self.shape)), back
