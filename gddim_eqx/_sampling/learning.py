"""Gradient descent on the parameters of a solver."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from .._custom_types import Args, State
from .._misc import pin
from .._model import GaussianMixture, NormalData
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
        rng, size = np.random.default_rng(0), self.batch_size
        while self.is_split:
            order = rng.permutation(len(self.exact))
            for n in range(len(order) // size):
                yield self.take(order[n * size : (n + 1) * size])
        while True:
            yield self

    def parts(self) -> list["Pilots"]:
        index, size = np.arange(len(self.exact)), self.batch_size
        return [self.take(index[i : i + size]) for i in index[::size]]


_generate = eqx.filter_jit(generate)


class ChainedGradient(eqx.Module):
    """The gradient of a chain of steps `state = step(parameters, i, state, args)`. Only one
    step and its pullback are compiled, once each, and states are kept instead of the
    activations of networks."""

    step: Callable[[Any, Int[Array, ""], Any, Args], Any]
    number: int = eqx.field(static=True)

    def forward(self, parameters: Any, state: Any, args: Args) -> list:
        """The states before all steps, and after the last."""
        states = [state]
        for i in range(self.number):
            states.append(_advance(self.step, parameters, jnp.asarray(i), states[-1], args))
        return states

    def backward(self, parameters: Any, states: list, back: Any, args: Args) -> Any:
        """The gradient with respect to the parameters, given that with respect to the last
        state."""
        total = jtu.tree_map(jnp.zeros_like, parameters)
        for i in reversed(range(self.number)):
            at = jnp.asarray(i), states[i], args
            total, back = _pull_back(self.step, parameters, *at, total, back)
        return total


@eqx.filter_jit
def _advance(step, parameters, i, state, args):
    return step(parameters, i, state, args)


@eqx.filter_jit
def _pull_back(step, parameters, i, state, args, total, back):
    def run(parameters, state):
        return eqx.filter(step(parameters, i, state, args), eqx.is_inexact_array)

    _, pull_back = eqx.filter_vjp(run, parameters, state)
    gradient, back = pull_back(back)
    return jtu.tree_map(jnp.add, total, gradient), back


class Learned(eqx.Module):
    """The solver and its times, as a function of changes that are zero at first."""

    solver: dfx.AbstractSolver
    flow: ProbabilityFlow
    ts: Array
    grid: Array
    """A fine grid with the same ends."""
    corrects: bool
    start: GaussianStart | None = None

    def started(self, start: GaussianStart | None, num_steps: int) -> "Learned":
        """From a start, if any, with its times."""
        if start is None:
            return self
        dtype, process = self.ts.dtype, self.flow.process
        ts = start.time_grid(process, num_steps, dtype=dtype)
        return Learned(self.solver, self.flow, ts, self.grid, True, start)

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
        assert isinstance(self.solver, GDDIM)
        start: dict[str, Any] = {}
        if self.start is not None:
            slope = self.start.slope + scaled("slope")
            start = dict(data=self.start.data, num_free=self.num_free, slope=slope)
        corrections: Any = *scaled("weights"), scaled("rate"), scaled("shift")
        process = self.flow.process
        return LearnedGDDIM(self.solver, process, ts, *corrections, **start), ts

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

    def step(self, variables: Any, i: Int[Array, ""], state: Any, given: Any) -> Any:
        fixed, args = given
        solver, ts = eqx.combine(variables, fixed)
        y, inner = state
        ends = ts[i], ts[i + 1]
        y, _, _, inner, _ = solver.step(self.flow, *ends, y, args, inner, False)
        return y, inner

    def _run(self, change: Change, pilots: Pilots):
        """The chain of steps; its parameters, fixed values and states."""
        # Once for all steps: a step continues the one before if their times are equal.
        solver, ts = _make(self, change)
        chain = ChainedGradient(self.step, len(ts) - 1)
        variables, fixed = eqx.partition((solver, ts), _is_variable((solver, ts)))
        first = pilots.u, _init(solver, self.flow, ts, pilots.u, pilots.args)
        given = fixed, pilots.args
        return chain, variables, given, chain.forward(variables, first, given)

    def log_distances(self, change: Change, pilots: Pilots) -> np.ndarray:
        logs = []
        for part in pilots.parts():
            *_, states = self._run(change, part)
            logs.append(_log_distance(self.flow.process, states[-1][0], part.exact))
        return np.concatenate(logs)

    def value_and_gradient(self, change: Change, pilots: Pilots) -> tuple[float, Change]:
        """The objective, and its gradient."""
        chain, variables, given, states = self._run(change, pilots)
        y, inner = states.pop()
        value, back = _objective(y, self.flow.process, pilots.exact)
        unused = jtu.tree_map(jnp.zeros_like, eqx.filter(inner, eqx.is_inexact_array))
        back = chain.backward(variables, states, (back, unused), given)
        return float(value), _pull_back_made(self, change, back)


_make = eqx.filter_jit(lambda learned, change: learned(change))


@eqx.filter_jit
def _pull_back_made(learned, change, back):
    variables = lambda tree: eqx.filter(tree, _is_variable(tree))
    _, pull_back = jax.vjp(lambda change: variables(learned(change)), change)
    return pull_back(back)[0]


def _is_variable(tree):
    """Which leaves have gradients: not those of the data that are known."""
    fixed = lambda x: isinstance(x, NormalData | GaussianMixture)
    is_variable = lambda x: eqx.is_inexact_array(x) and not fixed(x)
    return jtu.tree_map(is_variable, tree, is_leaf=fixed)


@eqx.filter_jit
def _init(solver, flow, ts, u, args):
    return solver.init(flow, ts[0], ts[1], u, args)


@eqx.filter_jit
def _log_distance(process, y, exact):
    square = (process.decode(y) - exact) ** 2
    square = square.mean(tuple(range(1, square.ndim)))
    smallest = jnp.finfo(square.dtype).tiny
    return 0.5 * jnp.log(jnp.where(square > smallest, square, smallest))


@eqx.filter_jit
@eqx.filter_value_and_grad
def _objective(y, process, exact):
    """The mean logarithm of the distance, and for the samples that are far away also the
    logarithm of the root mean square."""
    logs = _log_distance(process, y, exact)
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
        value, gradient = learned.value_and_gradient(change, some)
        gradient = {name: gradient[name] for name in names}
        # Optax multiplies integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        chosen = eqx.apply_updates(chosen, updates)
        change = change | chosen
        averaged = _average(averaged, chosen, np.float32(i if pilots.is_split else 0))
        yield change | averaged, value
