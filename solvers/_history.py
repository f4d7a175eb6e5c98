from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import BoolScalarLike, RealScalarLike, State
from gddim_eqx._exponential import AbstractCoordinate, StepCoefficients
from gddim_eqx._linear import coefficient_dtype

from ._corrector import AbstractCorrector


class Places(NamedTuple):
    """Where evaluations lie."""

    time: Real[Array, " *nodes"]
    coordinate: Real[Array, " *nodes"]
    error_coordinate: Real[Array, " *nodes"]
    # The length in time of the step that ended there, before whose correction the model was
    # evaluated; the largest number with noise, which affects the value anyway.
    corrected: Real[Array, " *nodes"]


class Nodes(eqx.Module):
    """Evaluations as interpolation nodes: node 0 is the new one, and node k + 1 is slot k
    of the history."""

    values: list[State]
    places: Places
    stored: Bool[Array, " nodes"]

    def span(self) -> Real[Array, ""]:
        """How long before the new evaluation, in time, the oldest is."""
        lengths = jnp.abs(self.places.time - self.places.time[0])
        return jnp.where(self.stored, lengths, 0).max()


def rank_by_distance(
    x: Inexact[Array, " nodes"],
    places: Places,
    stored: Bool[Array, " nodes"],
    moves: Bool[Array, ""],
    closest: float,
) -> Int[Array, " nodes"]:
    """The position of each node among those to use, by their distance from node 0.

    Of two nodes that are too close, the farther is dropped, even if the nearer is
    dropped too: the difference of their values would say more about their errors than
    about the derivative. So is a node whose distances from the nearer ones, at most 1 each,
    have a tiny product. The rank of a dropped node is the number of nodes.

    **Arguments:**

    - `x`: the nodes, in a coordinate that is 0 at the start of the step and 1 at its
        end.
    - `places`: where they lie.
    - `stored`: which of them may be used.
    - `moves`: whether the step has a length; otherwise only equal nodes are too close.
    - `closest`: drop a node if a newer one lies within this fraction of the step, and
        of the step that ended at the node.
    """
    number, between = len(x), lambda a: jnp.abs(a[:, None] - a[None])
    # XLA may compute the same number twice, with other rounding.
    distance = jnp.where(np.arange(number) == 0, -1, jnp.abs(x - x[0]))
    this, other = distance[:, None], distance[None]
    precedes = (other < this) | (other == this) & np.tri(number, k=-1, dtype=bool)
    precedes &= stored[None] & ~np.eye(number, dtype=bool)
    gaps = jnp.where(precedes, between(x), 1)
    uncertain = between(places.time) < closest * places.corrected[:, None]
    too_close = uncertain & (gaps <= jnp.where(moves, closest, 0))
    # A divided difference divides rounding errors by this product.
    resolved = 50 * float(jnp.finfo(x.dtype).eps) ** 0.5
    unresolved = jnp.minimum(gaps, 1).prod(1) <= jnp.where(moves, resolved, 0)
    used = stored & ~too_close.any(1) & ~unresolved
    rank = (precedes & used[None]).sum(1, dtype=jnp.int32)
    return jnp.where(used, rank, number)


def unstacked(values: PyTree[Inexact[Array, "nodes ..."]]) -> list[State]:
    """The values at the nodes, from arrays with a leading axis for the nodes."""
    number = len(jtu.tree_leaves(values)[0])
    at = lambda k: lambda x: lax.index_in_dim(x, k, keepdims=False)
    return [jtu.tree_map(at(k), values) for k in range(number)]


class LastStep(NamedTuple):
    """What is needed to correct the end of the previous step."""

    base: State
    """The result of the linear part and the noise."""
    moments: Inexact[Array, "number n n *spectrum"]
    start: Real[Array, ""]
    """The coordinate at its start."""
    parts: tuple[AbstractCoordinate, AbstractCorrector]
    """The arrays and numbers of the coordinate and the corrector, which may depend on the
    step; for others Diffrax's loop has no place."""


class History(eqx.Module):
    """The most recent evaluations that are useful for interpolation."""

    places: Places
    values: PyTree[Inexact[Array, "slots ..."]]
    # Which of the slots hold evaluations.
    stored: Bool[Array, " slots"]
    # Where the previous step ended, in the time of `diffeqsolve`.
    end: Real[Array, ""]
    # Only for correctors that need it.
    last: LastStep | None

    @staticmethod
    def empty(
        slots: int, t0: RealScalarLike, y0: State, last: LastStep | None
    ) -> "History":
        """An empty history."""
        zeros = jnp.zeros(slots, coefficient_dtype(y0))
        values = jtu.tree_map(lambda y: jnp.zeros((slots, *y.shape), y.dtype), y0)
        stored, end = jnp.zeros(slots, bool), jnp.asarray(t0)
        return History(Places(zeros, zeros, zeros, zeros), values, stored, end, last)

    def known(self, t0: RealScalarLike, made_jump: BoolScalarLike) -> Bool[Array, " slots"]:
        """Which stored evaluations a step from `t0` may use: none if they precede a jump,
        or belong to a solution that ended elsewhere."""
        # Diffrax passes the end of a step on as it is.
        return self.stored & (self.end == t0) & ~jnp.asarray(made_jump)

    def nodes(
        self, value: State, s: Array, c: StepCoefficients, known: Bool[Array, " slots"]
    ) -> Nodes:
        """The nodes of a step from `s` that starts with a new evaluation."""
        if c.noise is None:
            length = jnp.where(known, jnp.abs(self.places.time - s), jnp.inf).min()
            length = jnp.where(length == jnp.inf, 0, length)
        else:
            # Every value is affected by the noise of its step.
            length = jnp.full_like(s, jnp.finfo(s.dtype).max)
        place = Places(s, c.start, c.error_start, length)

        # Those of other slots are finite, but not used.
        def all_places(new, old):
            return jnp.concatenate([new[None], jnp.where(known, old, new)])

        return Nodes(
            [value, *unstacked(self.values)],
            jtu.tree_map(all_places, place, self.places),
            jnp.concatenate([jnp.ones(1, bool), known]),
        )

    def push(
        self,
        value: State,
        nodes: Nodes,
        rank: Int[Array, " nodes"],
        t: Array,
        t1: RealScalarLike,
        last: LastStep | None,
    ) -> "History":
        """The history after a step to `t`, which has used the nodes of these ranks.

        The new evaluation replaces one that is too close to others; or else takes an empty
        slot; or else replaces the farthest. So the history still spans several steps after
        a very short one.
        """
        known = nodes.stored[1:]
        close = known & (rank[1:] == len(rank))
        span = jnp.abs(nodes.places.time[1:] - t)
        # Compared in this order.
        preference = jnp.where(close, 2, jnp.where(known, 0, 1))
        least = preference == preference.max()
        slot = jnp.argmax(jnp.where(least, span, -1)).astype(jnp.int32)
        replace = lambda x, y: lax.dynamic_update_index_in_dim(x, y, slot, 0)
        return History(
            jtu.tree_map(lambda x, y: replace(x, y[0]), self.places, nodes.places),
            jtu.tree_map(replace, self.values, value),
            replace(known, True),
            jnp.asarray(t1),
            last,
        )
