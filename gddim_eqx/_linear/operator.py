import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Inexact

from .._custom_types import State
from .state import add, join_components


class BlockLinearOperator(lx.AbstractLinearOperator):
    r"""A linear operator made of one small $n \times n$ block per coordinate.

    A state has $n$ components, each shaped like the data (one for VP, position and
    velocity for CLD). At each coordinate of the data the operator mixes the $n$
    components by a block; it never mixes coordinates. Drift, diffusion, transition,
    covariance and its square roots all have this form, in the basis of the state.

    - one block for all coordinates: `blocks` has shape `(n, n)`;
    - one block per coordinate or frequency: `(n, n, *spectrum)`, where `spectrum` has as
      many axes as the data and broadcasts to its shape.

    It is closed under `+`, `-`, `@`, multiplication by scalars, `.T`,
    [`inverse`][gddim_eqx.BlockLinearOperator.inverse] and
    [`cholesky`][gddim_eqx.BlockLinearOperator.cholesky]. As a
    `lineax.AbstractLinearOperator`, it works with `lineax.linear_solve` and as the vector
    field of a `diffrax.ControlTerm`.
    """

    blocks: Inexact[Array, "n n *spectrum"]
    shape: tuple[int, ...] = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        blocks: Inexact[Array, "n n *spectrum"],
        shape: tuple[int, ...],
        tags: object | frozenset[object] = frozenset(),
    ):
        """**Arguments:**

        - `blocks`: the blocks, of shape `(n, n)` or `(n, n, *spectrum)`.
        - `shape`: the shape of one data sample.
        - `tags`: `lineax` tags, such as `lineax.positive_semidefinite_tag`. Unchecked.

        **Raises:** `ValueError` if the shapes are incompatible.
        """
        shape = tuple(shape)
        spectrum = jnp.shape(blocks)[2:]
        fits = spectrum == () or (
            len(spectrum) == len(shape)
            and all(a in (1, b) for a, b in zip(spectrum, shape))
        )
        if jnp.ndim(blocks) < 2 or blocks.shape[0] != blocks.shape[1] or not fits:
            raise ValueError(
                "`blocks` must have shape (n, n), or (n, n, *spectrum) with `spectrum` "
                f"broadcastable to the data's shape {shape} axis by axis; got "
                f"{jnp.shape(blocks)}."
            )
        self.blocks = blocks
        self.shape = shape
        self.tags = tags if isinstance(tags, frozenset) else frozenset([tags])

    @property
    def num_components(self) -> int:
        return self.blocks.shape[0]

    def _like(self, blocks, tags: object = frozenset()) -> "BlockLinearOperator":
        return BlockLinearOperator(blocks, self.shape, tags)

    def astype(self, dtype) -> "BlockLinearOperator":
        """The same operator with its blocks in another dtype."""
        return self._like(self.blocks.astype(dtype), self.tags)

    def mv(self, vector: State) -> State:
        """Apply the operator to a state.

        **Arguments:**

        - `vector`: a state whose leaves have shape `(*batch, *shape)`.

        **Returns:** a state of the same structure and shape.

        **Raises:** `ValueError` unless `vector` has `n` leaves whose shapes end in
        `shape`.
        """
        leaves, treedef = jtu.tree_flatten(vector)
        n, rank = self.num_components, len(self.shape)
        if len(leaves) != n or any(
            jnp.shape(x)[jnp.ndim(x) - rank :] != self.shape for x in leaves
        ):
            raise ValueError(
                f"This operator acts on states of {n} component(s) of shape (*batch, "
                f"{', '.join(map(str, self.shape))}); got leaves of shape "
                f"{[jnp.shape(x) for x in leaves]}."
            )

        def entry(i, j, x):
            block = self.blocks[i, j]
            axes = tuple(range(x.ndim - rank)) if block.ndim else ()
            return jnp.expand_dims(block, axes) * x

        rows = [[entry(i, j, x) for j, x in enumerate(leaves)] for i in range(n)]
        out = [ft.reduce(jnp.add, row) for row in rows]
        return jtu.tree_unflatten(treedef, out)

    def as_matrix(self) -> Inexact[Array, "size size"]:
        """The dense matrix. Rows and columns are first all coordinates of the first
        component, in C order, then those of the second, and so on."""
        diagonals = self._diagonals()
        n, _, size = diagonals.shape
        matrix = diagonals[..., None] * jnp.eye(size, dtype=diagonals.dtype)[None, None]
        return matrix.transpose(0, 2, 1, 3).reshape(n * size, n * size)

    def _diagonals(self) -> Inexact[Array, "n n size"]:
        """The blocks at every coordinate of the data."""
        n, blocks = self.num_components, append_axes(self.blocks, 2 + len(self.shape))
        return jnp.broadcast_to(blocks, (n, n, *self.shape)).reshape(n, n, -1)

    def transpose(self) -> "BlockLinearOperator":
        if lx.is_symmetric(self):
            return self
        return self._like(jnp.swapaxes(self.blocks, 0, 1), lx.transpose_tags(self.tags))

    def in_structure(self):
        leaf = jax.ShapeDtypeStruct(self.shape, self.blocks.dtype)
        return join_components([leaf] * self.num_components)

    def out_structure(self):
        return self.in_structure()

    def inverse(self) -> "BlockLinearOperator":
        """The inverse operator, block by block. A singular block gives `inf` or `nan`."""
        b = self.blocks
        if self.num_components == 1:
            inverse = 1 / b
        elif self.num_components == 2:
            determinant = b[0, 0] * b[1, 1] - b[0, 1] * b[1, 0]
            adjugate = [[b[1, 1], -b[0, 1]], [-b[1, 0], b[0, 0]]]
            inverse = jnp.array(adjugate) / determinant[None, None]
        elif self.num_components == 3:
            rows = [jnp.cross(b[i - 2], b[i - 1], axis=0) for i in range(3)]
            determinant = (b[0] * rows[0]).sum(0)
            inverse = jnp.stack(rows, axis=1) / determinant[None, None]
        else:
            inverse = _last_to_first(jnp.linalg.inv(_first_to_last(b)))
        definite = lx.positive_semidefinite_tag
        return self._like(inverse, self.tags & frozenset([definite, lx.symmetric_tag]))

    def cholesky(self) -> "BlockLinearOperator":
        r"""The Cholesky factor of this operator, block by block: lower triangular $L$ with
        $L L^\top$ equal to it. A block that is not positive definite gives `nan`."""
        factor = _last_to_first(jnp.linalg.cholesky(_first_to_last(self.blocks)))
        return self._like(factor, lx.lower_triangular_tag)

    def __add__(self, other) -> Any:
        if not isinstance(other, BlockLinearOperator):
            return super().__add__(other)
        a, b = _same_rank(self, other)
        return self._like(a + b, self.tags & other.tags & _CLOSED_UNDER_SUM)

    def __sub__(self, other) -> Any:
        return self + (-other)

    def __mul__(self, other):
        other = jnp.asarray(other)
        if other.shape != ():
            raise ValueError(f"Can only multiply by scalars; got shape {other.shape}.")
        return self._like(self.blocks * other, self.tags & _CLOSED_UNDER_SCALING)

    def __truediv__(self, other):
        return self * (1 / jnp.asarray(other))

    def __neg__(self):
        return self._like(-self.blocks, self.tags & _CLOSED_UNDER_SCALING)

    def __matmul__(self, other) -> Any:
        if not isinstance(other, BlockLinearOperator):
            return super().__matmul__(other)
        a, b = _same_rank(self, other)
        tags = self.tags & other.tags & _CLOSED_UNDER_PRODUCT
        return self._like(matmul(a, b), tags)


_CLOSED_UNDER_PRODUCT = frozenset([lx.lower_triangular_tag, lx.upper_triangular_tag])
_CLOSED_UNDER_SCALING = _CLOSED_UNDER_PRODUCT | {lx.symmetric_tag}
_CLOSED_UNDER_SUM = _CLOSED_UNDER_SCALING | {lx.positive_semidefinite_tag}


def _same_rank(one: BlockLinearOperator, other: BlockLinearOperator) -> tuple[Array, Array]:
    if one.num_components != other.num_components or one.shape != other.shape:
        raise ValueError(
            "Can only combine operators on the same states; got "
            f"{one.num_components} component(s) of shape {one.shape} and "
            f"{other.num_components} of shape {other.shape}."
        )
    ndim = max(one.blocks.ndim, other.blocks.ndim)
    return append_axes(one.blocks, ndim), append_axes(other.blocks, ndim)


def apply(operator: BlockLinearOperator, state: State) -> State:
    """Apply an operator to a state, in the dtype of the state."""
    state = jtu.tree_map(jnp.asarray, state)
    return operator.astype(jnp.result_type(*jtu.tree_leaves(state))).mv(state)


def combine(
    shape: tuple[int, ...], pairs: list[tuple[Inexact[Array, "n n *_"], State]]
) -> State:
    """The sum of operators, given by their blocks, applied to states."""
    products = [apply(BlockLinearOperator(b, shape), state) for b, state in pairs]
    return ft.reduce(add, products)


def matmul(
    a: Inexact[Array, "n n *#spectrum"], b: Inexact[Array, "n k *#spectrum"]
) -> Inexact[Array, "n k *_"]:
    """The product of blocks of equal rank."""
    # Elementwise rather than a dot product: `n` is tiny, this fuses, and no backend reduces
    # its precision. Nor a sum over an axis: for arrays of seven axes or more XLA's CPU
    # compiler (jax 0.10.2) makes programs of these that crash.
    products = [a[:, k, None] * b[None, k] for k in range(len(b))]
    return ft.reduce(jnp.add, products)


def append_axes(x: Array, ndim: int) -> Array:
    """Append axes of size one to an array until it has `ndim` axes."""
    return jnp.expand_dims(x, tuple(range(x.ndim, ndim)))


def _first_to_last(blocks):
    return jnp.moveaxis(blocks, (0, 1), (-2, -1))


def _last_to_first(blocks):
    return jnp.moveaxis(blocks, (-2, -1), (0, 1))


@lx.linearise.register(BlockLinearOperator)
@lx.materialise.register(BlockLinearOperator)
def _(operator):
    return operator


@lx.conj.register(BlockLinearOperator)
def _(operator):
    return BlockLinearOperator(operator.blocks.conj(), operator.shape, operator.tags)


@lx.diagonal.register(BlockLinearOperator)
def _(operator):
    return jnp.diagonal(operator._diagonals()).T.reshape(-1)


@lx.tridiagonal.register(BlockLinearOperator)
def _(operator):
    matrix = operator.as_matrix()
    return jnp.diagonal(matrix), jnp.diagonal(matrix, -1), jnp.diagonal(matrix, 1)


_definite = {lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}
# The tags that imply each property. Operators of one component are diagonal.
for query, implied_by in (
    (lx.is_diagonal, {lx.diagonal_tag}),
    (lx.is_tridiagonal, {lx.diagonal_tag}),
    (lx.is_lower_triangular, {lx.diagonal_tag, lx.lower_triangular_tag}),
    (lx.is_upper_triangular, {lx.diagonal_tag, lx.upper_triangular_tag}),
    (lx.is_symmetric, {lx.diagonal_tag, lx.symmetric_tag, *_definite}),
):

    @query.register(BlockLinearOperator)
    def _(operator, implied_by=implied_by):
        return operator.num_components == 1 or bool(implied_by & operator.tags)


for query, tag in (
    (lx.is_positive_semidefinite, lx.positive_semidefinite_tag),
    (lx.is_negative_semidefinite, lx.negative_semidefinite_tag),
    (lx.has_unit_diagonal, lx.unit_diagonal_tag),
):

    @query.register(BlockLinearOperator)
    def _(operator, tag=tag):
        return tag in operator.tags
