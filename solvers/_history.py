from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Inexact, Int, PyTree, Real

from gddim_eqx._custom_types import BoolScalarLike, RealScalarLike, State
from gddim_eqx._exponential import Residual, StepCoefficients
from gddim_eqx._linear import coefficient_dtype


class Nodes(eqx.Module):
    """The new evaluation and the stored ones, as nodes of interpolation: node 0 is the new
    one, and node k + 1 is slot k."""

    values: list[State]
    times: Real[Array, " nodes"]
    coordinate: Real[Array, " nodes"]
    # 0 for the new one, 1 for the one before, and so on.
    age: Int[Array, " nodes"]
    # How many are stored.
    count: Int[Array, ""]

    def valid(self, number: int) -> Bool[Array, " nodes"]:
        """The newest few nodes, as far as there are as many."""
        return self.age < jnp.minimum(self.count + 1, number)


class LastStep(NamedTuple):
    """What a corrector needs of the last step: the linear part and the noise, applied to
    the state; the moments; and the coordinate at its start."""

    base: State
    moments: Inexact[Array, "number n n *spectrum"]
    start: Real[Array, ""]


class History(eqx.Module):
    """The most recent evaluations, in a ring buffer."""

    times: Real[Array, " slots"]
    coordinate: Real[Array, " slots"]
    values: PyTree[Inexact[Array, "slots ..."]]
    # How many of the slots hold evaluations along the current solution.
    count: Int[Array, ""]
    # The slot that is overwritten next.
    slot: Int[Array, ""]
    # Where, in the time of `diffeqsolve`, the last step ended.
    end: Real[Array, ""]
    # For correctors that need it.
    last: LastStep | None
    # In noise space, on reverse diffusions.
    residual: Residual | None

    @staticmethod
    def empty(
        slots: int,
        t0: RealScalarLike,
        y0: State,
        last: LastStep | None,
        residual: Residual | None,
    ) -> "History":
        """A history without evaluations."""
        times, zero = jnp.zeros(slots, coefficient_dtype(y0)), jnp.zeros((), jnp.int32)
        values = jtu.tree_map(lambda y: jnp.zeros((slots, *y.shape), y.dtype), y0)
        end = jnp.asarray(t0)
        return History(times, times, values, zero, zero, end, last, residual)

    def length(self, t0: RealScalarLike, made_jump: BoolScalarLike) -> Int[Array, ""]:
        """How many stored evaluations are history of a step from `t0`: none, if they were
        stored before a jump, or along a solution that ended elsewhere."""
        count = jnp.where(self.end == t0, self.count, 0)
        return count if made_jump is False else jnp.where(made_jump, 0, count)

    def nodes(self, value: State, s: Array, start: Array, count: Int[Array, ""]) -> Nodes:
        """The nodes of a step from `s`, where the coordinate is `start`."""
        slots = self.times.shape[0]
        age = (self.slot - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots + 1
        stored = [jtu.tree_map(lambda x, k=k: x[k], self.values) for k in range(slots)]

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
        """The history after a step, whose new evaluation a step of no length does not
        keep: the same slot is overwritten again."""
        slots, slot, kept = self.times.shape[0], self.slot, (~still).astype(jnp.int32)
        last = None if self.last is None else LastStep(base, c.moments, c.start)
        return History(
            self.times.at[slot].set(nodes.times[0]),
            self.coordinate.at[slot].set(c.start),
            jtu.tree_map(lambda x, y: x.at[slot].set(y), self.values, nodes.values[0]),
            jnp.minimum(nodes.count + kept, slots - 1 + kept),
            (slot + kept) % slots,
            jnp.asarray(t1),
            last,
            residual,
        )
