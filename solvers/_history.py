from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import BoolScalarLike, RealScalarLike, State
from gddim_eqx._exponential import Residual, StepCoefficients
from gddim_eqx._linear import coefficient_dtype


class Nodes(eqx.Module):
    """The new evaluation and the history as interpolation nodes: node 0 is the new
    evaluation, and node k + 1 is slot k."""

    values: list[State]
    times: Real[Array, " nodes"]
    coordinate: Real[Array, " nodes"]
    # 0 for the new evaluation, 1 for the previous one, and so on.
    age: Int[Array, " nodes"]
    # How many are stored.
    count: Int[Array, ""]

    def valid(self, number: int) -> Bool[Array, " nodes"]:
        """A mask of the newest `number` nodes, or of all if there are fewer."""
        return self.age < jnp.minimum(self.count + 1, number)

    def with_end(self, t: Array, end: Array) -> "Nodes":
        """The times and coordinates with another evaluation at the end of the step."""
        zero = jnp.zeros(1, jnp.int32)
        return Nodes(
            [],
            jnp.append(t, self.times),
            jnp.append(end, self.coordinate),
            jnp.append(zero, self.age + 1),
            self.count + 1,
        )


class LastStep(NamedTuple):
    """What a corrector needs from the previous step: the result of the linear part and the
    noise; the moments; and the coordinate at its start."""

    base: State
    moments: Inexact[Array, "number n n *spectrum"]
    start: Real[Array, ""]


class History(eqx.Module):
    """A ring buffer of the most recent evaluations."""

    times: Real[Array, " slots"]
    coordinate: Real[Array, " slots"]
    values: PyTree[Inexact[Array, "slots ..."]]
    # How many of the slots hold evaluations along the current solution.
    count: Int[Array, ""]
    # The slot that is overwritten next.
    slot: Int[Array, ""]
    # Where the previous step ended, in the time of `diffeqsolve`.
    end: Real[Array, ""]
    # Only for correctors that need it.
    last: LastStep | None
    # Only in noise space on reverse diffusions.
    residual: Residual | None

    @staticmethod
    def empty(
        slots: int,
        t0: RealScalarLike,
        y0: State,
        last: LastStep | None,
        residual: Residual | None,
    ) -> "History":
        """An empty history."""
        times, zero = jnp.zeros(slots, coefficient_dtype(y0)), jnp.zeros((), jnp.int32)
        values = jtu.tree_map(lambda y: jnp.zeros((slots, *y.shape), y.dtype), y0)
        end = jnp.asarray(t0)
        return History(times, times, values, zero, zero, end, last, residual)

    def length(self, t0: RealScalarLike, made_jump: BoolScalarLike) -> Int[Array, ""]:
        """The number of stored evaluations that a step from `t0` may use: none if they
        precede a jump, or belong to a solution that ended elsewhere."""
        count = jnp.where(self.end == t0, self.count, 0)
        return count if made_jump is False else jnp.where(made_jump, 0, count)

    def nodes(self, value: State, s: Array, start: Array, count: Int[Array, ""]) -> Nodes:
        """The nodes of a step from `s`, at which the coordinate is `start`."""
        slots = self.times.shape[0]
        age = self.slot - jnp.arange(slots, dtype=jnp.int32)
        age = jnp.where(age > 0, age, age + slots)
        pick = lambda k: lambda x: lax.index_in_dim(x, k, keepdims=False)
        stored = [jtu.tree_map(pick(k), self.values) for k in range(slots)]

        def all_times(new, old):
            return jnp.concatenate([new[None], jnp.where(age <= count, old, new)])

        return Nodes(
            [value, *stored],
            all_times(s, self.times),
            all_times(start, self.coordinate),
            jnp.concatenate([jnp.zeros(1, jnp.int32), age]),
            count,
        )

    def push(
        self,
        nodes: Nodes,
        c: StepCoefficients,
        still: Bool[Array, ""],
        t1: RealScalarLike,
        base: State,
        residual: Residual | None,
    ) -> "History":
        """The history after a step. A step of size zero does not keep its evaluation: the
        next step overwrites the same slot."""
        slots, slot, kept = self.times.shape[0], self.slot, (~still).astype(jnp.int32)
        replace = lambda x, y: lax.dynamic_update_index_in_dim(x, y, slot, 0)
        following = slot + kept
        last = None if self.last is None else LastStep(base, c.moments, c.start)
        return History(
            replace(self.times, nodes.times[0]),
            replace(self.coordinate, c.start),
            jtu.tree_map(replace, self.values, nodes.values[0]),
            # A full history loses its oldest value, unless the slot stays free.
            jnp.minimum(nodes.count + kept, slots - 1 + kept),
            jnp.where(following == slots, 0, following),
            jnp.asarray(t1),
            last,
            residual,
        )
