"""Gradient descent on the parameters of a solver."""

import dataclasses
import functools as ft
from collections.abc import Iterator
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._custom_types import Args, State
from .._misc import pin
from .._term import ProbabilityFlow
from ..solvers import GDDIM, LearnedGDDIM
from .inversion import generate
from .start import GaussianStart


# The parameters, and how fast each is learned, in multiples of the learning rate.
SCALES = {"times": 1.0, "weights": 0.2, "rate": 1.0, "shift": 0.1, "slope": 0.5}

Change = dict[str, PyTree[Array]]


class Pilots(NamedTuple):
    """Initial states and the endpoints of the exact flow."""

    u: State
    args: Args
    exact: Array
    batch_size: int

    @classmethod
    def of(cls, flow, u, args, grid, batch_size) -> "Pilots":
        """With the endpoints of the flow on a fine grid."""
        number = len(jtu.tree_leaves(u)[0])
        pilots = cls(u, args, jnp.zeros(number), min(int(batch_size), number))
        end = lambda part: _generate(flow, part.u, solver=GDDIM(), ts=grid, args=part.args)
        return pilots._replace(exact=jnp.concatenate([*map(end, pilots.parts())]))

    def take(self, index: np.ndarray) -> "Pilots":
        number = len(self.exact)

        def pick(x):
            return x[index] if eqx.is_array(x) and x.shape[:1] == (number,) else x

        u, args, exact = jtu.tree_map(pick, (self.u, self.args, self.exact))
        return self._replace(u=u, args=args, exact=exact)

    @property
    def is_split(self) -> bool:
        return self.batch_size < len(self.exact)

    def batches(self) -> Iterator["Pilots"]:
        """Batches of one size, in random order, without end."""
        rng, number = np.random.default_rng(0), len(self.exact)
        while True:
            parts = self.parts(rng.permutation(number)) if self.is_split else [self]
            yield from parts[: max(1, number // self.batch_size)]

    def parts(self, order: np.ndarray | None = None) -> list["Pilots"]:
        order = np.arange(len(self.exact)) if order is None else order
        starts, size = range(0, len(order), self.batch_size), self.batch_size
        return [self.take(order[i : i + size]) for i in starts]


_generate = eqx.filter_jit(generate)


class Learned(eqx.Module):
    """The solver and its times, as a function of changes that are zero at first."""

    solver: dfx.AbstractSolver
    flow: ProbabilityFlow
    ts: Array
    grid: Array
    """A fine grid with the same ends."""
    corrects: bool
    start: GaussianStart | None = None

    def started(self, start: GaussianStart, num_steps: int) -> "Learned":
        """From a start, with its times."""
        ts = start.time_grid(self.flow.process, num_steps, dtype=self.ts.dtype)
        return dataclasses.replace(self, ts=ts, corrects=True, start=start)

    @property
    def num_free(self) -> int:
        return 0 if self.start is None else self.start.num_free

    @property
    def zero(self) -> Change:
        # All steps before the first evaluation count as one.
        steps = len(self.ts) - max(self.num_free, 1)
        times = jnp.zeros(steps, self.ts.dtype)
        if not self.corrects:
            return {"times": times}
        assert isinstance(self.solver, GDDIM)
        solver = LearnedGDDIM(self.solver, self.flow.process, self.ts)
        return {
            "times": times,
            "weights": (solver.predictor, solver.corrector),
            "rate": solver.log_rates,
            "shift": solver.shifts,
            "slope": jnp.zeros((), self.ts.dtype),
        }

    def __call__(self, change: Change) -> tuple[dfx.AbstractSolver, Array]:
        scaled = lambda name: jtu.tree_map(lambda x: SCALES[name] * x, change[name])
        ts = self._times(scaled("times"))
        if not self.corrects:
            return self.solver, ts
        corrections = [*scaled("weights"), scaled("rate"), scaled("shift")]
        if self.start is not None:
            slope = self.start.slope + scaled("slope")
            corrections += [self.start.data, self.num_free, slope]
        assert isinstance(self.solver, GDDIM)
        return LearnedGDDIM(self.solver, self.flow.process, ts, *corrections), ts

    def _times(self, change):
        ts, grid = self.ts, self.grid
        # A coordinate in which the default grid is uniform, and the power of time that is
        # interpolated.
        place, root = jnp.linspace(0, 1, len(grid), dtype=ts.dtype), grid**0.25
        order, free = jnp.argsort(grid), self.num_free
        ends = jnp.concatenate([ts[:1], ts[max(free, 1) :]])
        lengths = jnp.diff(jnp.interp(ends, grid[order], place[order]))
        steps = lengths * jnp.exp(change)
        places = jnp.cumsum(steps[:-1]) / steps.sum()
        if free:
            early = places[0] * jnp.linspace(0, 1, free + 1, dtype=ts.dtype)[1:-1]
            places = jnp.concatenate([early, places])
        inner = jnp.interp(places, place, root) ** 4
        inner = pin((change == 0).all(), ts[1:-1], inner)
        return jnp.concatenate([ts[:1], inner, ts[-1:]])

    def log_distances(self, change: Change, pilots: Pilots) -> np.ndarray:
        logs = [_log_distance(change, self, part) for part in pilots.parts()]
        return np.concatenate(logs)


@eqx.filter_jit
def _log_distance(change, learned, pilots):
    """The logarithm of each pilot's distance from the endpoint of the exact flow."""
    flow, args, (solver, ts) = learned.flow, pilots.args, learned(change)
    inner = solver.init(flow, ts[0], ts[1], pilots.u, args)
    arrays, rest = eqx.partition((pilots.u, inner), eqx.is_array)

    # States are kept, instead of the activations of networks.
    @ft.partial(jax.checkpoint, prevent_cse=False)
    def step(arrays, i):
        y, inner = eqx.combine(arrays, rest)
        y, _, _, inner, _ = solver.step(flow, ts[i], ts[i + 1], y, args, inner, False)
        return eqx.filter((y, inner), eqx.is_array), None

    (y, _), _ = jax.lax.scan(step, arrays, jnp.arange(len(ts) - 1))
    square = (flow.process.decode(y) - pilots.exact) ** 2
    square = square.mean(tuple(range(1, square.ndim)))
    smallest = jnp.finfo(square.dtype).tiny
    return 0.5 * jnp.log(jnp.where(square > smallest, square, smallest))


@eqx.filter_jit
@eqx.filter_value_and_grad
def _objective(change, learned, pilots):
    """The mean logarithm of the distance, and for the samples that are far away also the
    logarithm of the root mean square."""
    logs = _log_distance(change, learned, pilots)
    rms = 0.5 * (jax.nn.logsumexp(2 * logs) - jnp.log(len(logs)))
    return logs.mean() + 0.5 * rms


@eqx.filter_jit
def _average(averaged, chosen, number):
    """The average over the last iterations, of which there were `number` before."""
    decay = jnp.minimum(0.9, number / (number + 2))
    return jtu.tree_map(lambda a, b: b + decay.astype(b.dtype) * (a - b), averaged, chosen)


def descend(
    learned: Learned,
    change: Change,
    names: tuple[str, ...],
    pilots: Pilots,
    steps: int,
    rate: float,
) -> Iterator[tuple[Change, float]]:
    """Adam on some of the parameters, on a batch of pilots per step. Yields their average
    after each step, with the objective before."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimiser = optax.chain(optax.zero_nans(), optax.adam(schedule))
    chosen = averaged = {name: change[name] for name in names}
    state = optimiser.init(chosen)
    for i, some in zip(range(steps), pilots.batches()):
        value, gradient = _objective(change, learned, some)
        gradient = {name: gradient[name] for name in names}
        # Optax multiplies integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        chosen = eqx.apply_updates(chosen, updates)
        change = change | chosen
        averaged = _average(averaged, chosen, np.float32(i if pilots.is_split else 0))
        yield change | averaged, float(value)
