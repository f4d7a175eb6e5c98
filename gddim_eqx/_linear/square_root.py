import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .operator import append_axes, matmul


def square_root_of_sum(columns):
    """The Cholesky factor of the sum of `column @ column.T`, computed by orthogonalising
    the rows, so that no argument of a square root can be negative."""
    n = columns.shape[1]
    root = jnp.zeros(columns.shape[1:], columns.dtype)
    basis = []
    for i in range(n):
        row = columns[:, i]
        for j, other in enumerate(basis):
            along = (row * other).sum((0, 1))
            root = root.at[i, j].set(along)
            row = row - along[None, None] * other
        square = (row**2).sum((0, 1))
        length = jnp.sqrt(jnp.where(square > 0, square, 1))
        root = root.at[i, i].set(jnp.where(square > 0, length, 0))
        basis.append(jnp.where((square > 0)[None, None], row / length[None, None], 0))
    return root


def align(
    root: Inexact[Array, "n n *spectrum"], target: Inexact[Array, "n n *spectrum"]
) -> Inexact[Array, "n n *spectrum"]:
    """Another square root of the same covariance, close to a target.

    A step that builds noise of the exact covariance from the increments of a Brownian path
    converges pathwise only if its square root of the covariance is close to the one that
    multiplies the increments in the equation.

    **Arguments:**

    - `root`: blocks of a square root of the covariance.
    - `target`: blocks of the target, up to scale. Columns of zeros are ignored.

    **Returns:** the blocks of `root` times an orthogonal matrix.
    """
    product = matmul(transposed(root), target)
    basis = _orthogonal_like(product)
    n = len(root)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    # One rotation is exact for two columns.
    for i, j in pairs * (1 if n == 2 else 4):
        basis = _rotate(basis, product, i, j)
    return matmul(root, basis)


def _rotate(basis, product, i, j):
    """Rotate two columns of a basis such that `basis.T @ product` is symmetric in them, as
    it is in all for the closest orthogonal matrix to the product."""
    a, b = basis[:, i], basis[:, j]
    at = lambda x, k: (x * product[:, k]).sum(0)
    cosine, sine = at(a, i) + at(b, j), at(b, i) - at(a, j)
    square = cosine**2 + sine**2
    known = square > 0
    length = jnp.sqrt(jnp.where(known, square, 1))
    cosine = jnp.where(known, cosine / length, 1)[None]
    sine = jnp.where(known, sine / length, 0)[None]
    basis = basis.at[:, i].set(cosine * a + sine * b)
    return basis.at[:, j].set(cosine * b - sine * a)


def _orthogonal_like(target):
    """The orthogonal matrix whose last column is parallel to the target's, whose last two
    columns span the same plane as the target's, and so on."""
    # Not `jnp.linalg.qr`, whose derivative does not exist where columns are zero.
    n = target.shape[0]
    eye = jnp.eye(n, dtype=target.dtype).reshape(n, n, *[1] * (target.ndim - 2))
    basis = jnp.broadcast_to(eye, target.shape)
    for k in reversed(range(n)):
        # Columns after k of the current basis are final.
        column = matmul(transposed(basis), target[:, k : k + 1])[:, 0]
        column = jnp.where(append_axes(jnp.arange(n) <= k, column.ndim), column, 0)
        square = (column**2).sum(0, keepdims=True)
        column = jnp.where(square > 0, column, eye[k])
        column = column / jnp.sqrt(jnp.where(square > 0, square, 1))
        # Map the k-th axis to the column: a Householder reflection, without cancellation,
        # and the other sign of the axis if it maps that to minus the column.
        normal = column + jnp.where(column[k][None] >= 0, 1, -1) * eye[k]
        turn = eye - normal[:, None] * normal[None] / (1 + jnp.abs(column[k]))[None, None]
        basis = matmul(basis, turn.at[:, k].set(column))
    return basis


def transposed(blocks):
    return jnp.swapaxes(blocks, 0, 1)
