"""Gradient descent on the parameters of a solver.

Gradients are accumulated step by step: only one step and its pullback are compiled, once
each, and states are kept instead of the activations of networks.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._custom_types import Args, State
from .._linear import at_least_single, batch_axes, check_state, coefficient_dtype
from .._misc import check_count, pin, show
from .._model import GaussianMixture, NormalData
from .._process import as_grid
from .._term import as_model, check_flow, ProbabilityFlow, StartedModel
from ..solvers import GDDIM, LearnedGDDIM
from .grid import time_grid
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
    features: Callable
    ts: Array
    """The initial grid."""
    grid: Array
    """A fine grid with the same ends."""
    batch_size: int

    @property
    def number(self) -> int:
        return self.exact.shape[0]

    @classmethod
    def of(cls, flow, u, args, num_steps, ts, fewest, features=None, batch_size=None):
        """With the endpoints of the exact flow, in at least `fewest` steps."""
        if isinstance(check_flow(flow).model, StartedModel):
            raise ValueError(
                "Learned times would move across that of the start, and change the number "
                "of evaluations. Pass the flow without it, and to `fit_solver` its `start`."
            )
        process = flow.process
        u = check_state(u, process.num_components, process.shape, "The states `u`")
        batch = batch_axes(u, process.shape)
        if len(batch) != 1:
            raise ValueError(f"`u` must have one batch axis; got shape {batch}.")
        if batch == (0,):
            raise ValueError("`u` holds no states to optimise on; pass a few dozen.")
        for leaf in jtu.tree_leaves(u):
            if not bool(jnp.isfinite(leaf).all()):
                raise ValueError("The states `u` are not finite.")
        if features is not None and not callable(features):
            raise ValueError(f"`features` must be callable; got {show(features)}.")
        batch_size = batch[0] if batch_size is None else batch_size
        check_count("batch_size", batch_size)
        batch_size = min(int(batch_size), batch[0])
        as_model(flow.model).check_args(args)
        as_array = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        args = jtu.tree_map(as_array, args)
        if ts is None:
            ts = time_grid(process, num_steps, dtype=coefficient_dtype(u))
        ts = as_grid(process, ts)
        # Optimised times need more precision than states.
        ts = jnp.minimum(ts.astype(at_least_single(ts.dtype)), process.t_end)
        ends = dict(t0=float(ts[0]), t1=float(ts[-1]))
        number = max(fewest, 8 * (len(ts) - 1))
        grid = time_grid(process, number, **ends, dtype=ts.dtype)
        features = _identity if features is None else features
        pilots = cls(u, args, jnp.zeros(batch), features, ts, grid, batch_size)
        exact = [
            _endpoint(flow, part.u, grid, part.args, features) for part in pilots.parts()
        ]
        return pilots._replace(exact=jnp.concatenate(exact))

    def some(self, chosen: np.ndarray) -> "Pilots":
        number = self.number

        def pick(x):
            return x[chosen] if eqx.is_array(x) and x.shape[:1] == (number,) else x

        u, args, exact = jtu.tree_map(pick, (self.u, self.args, self.exact))
        return self._replace(u=u, args=args, exact=exact)

    @property
    def is_split(self) -> bool:
        return self.batch_size < self.number

    def batches(self) -> Iterator["Pilots"]:
        """Batches of one size, in random order, without end."""
        rng, index = np.random.default_rng(0), np.arange(0)
        while self.is_split:
            if len(index) < self.batch_size:
                index = rng.permutation(self.number)
            yield self.some(index[: self.batch_size])
            index = index[self.batch_size :]
        while True:
            yield self

    def parts(self) -> list["Pilots"]:
        index, size = np.arange(self.number), self.batch_size
        return [self.some(index[i : i + size]) for i in index[::size]]


def _identity(x):
    return x


@eqx.filter_jit
def _endpoint(flow, u, grid, args, features):
    return features(generate(flow, u, solver=GDDIM(), ts=grid, args=args))


class Learned(eqx.Module):
    """The solver and its times, as a function of changes that are zero at first."""

    solver: dfx.AbstractSolver
    flow: ProbabilityFlow
    ts: Array
    grid: Array
    corrects: bool
    start: GaussianStart | None = None

    def started(self, start: GaussianStart, num_steps: int) -> "Learned":
        """From a start, with its times."""
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
        made = LearnedGDDIM(self.solver, self.flow.process, self.ts)
        weights = made.predictor, made.corrector
        return {
            "times": times,
            "weights": weights,
            "rate": made.log_rates,
            "shift": made.shifts,
            "slope": jnp.zeros((), self.ts.dtype),
        }

    def __call__(self, change) -> tuple[dfx.AbstractSolver, Array]:
        change = {
            name: jtu.tree_map(lambda x, name=name: SCALES[name] * x, value)
            for name, value in change.items()
        }
        ts = self._times(change["times"])
        if not self.corrects:
            return self.solver, ts
        assert isinstance(self.solver, GDDIM)
        predictor, corrector = change["weights"]
        start: dict[str, Any] = {}
        if self.start is not None:
            slope = self.start.slope + change["slope"]
            start = dict(data=self.start.data, num_free=self.num_free, slope=slope)
        made = LearnedGDDIM(
            self.solver,
            self.flow.process,
            ts,
            predictor,
            corrector,
            change["rate"],
            change["shift"],
            **start,
        )
        return made, ts

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

    def log_distances(self, change, pilots: Pilots) -> np.ndarray:
        solver, ts = _make(self, change)
        logs = []
        for part in pilots.parts():
            *_, (y, _) = self._run(solver, ts, part)
            logs.append(_log_distance(self.flow.process, y, part.exact, part.features))
        return np.concatenate(logs)

    def _run(self, solver, ts, pilots):
        """The state and the solver's state at all times."""
        state = _start(solver, self.flow, ts, pilots.u, pilots.args)
        states = [(pilots.u, state)]
        for i in range(len(ts) - 1):
            ends = ts[i], ts[i + 1]
            states.append(_advance(solver, self.flow, *ends, *states[-1], pilots.args))
        return states

    def value_and_gradient(self, change, pilots: Pilots):
        """The objective, and its gradient."""
        solver, ts = _make(self, change)
        value, total = 0.0, None
        for part in pilots.parts():
            states = self._run(solver, ts, part)
            share = part.number / pilots.number
            y, state = states.pop()
            at_end, back = _objective(self.flow.process, y, part.exact, part.features)
            value += share * float(at_end)
            unused = jtu.tree_map(jnp.zeros_like, eqx.filter(state, eqx.is_inexact_array))
            back = jtu.tree_map(lambda x: share * x, back), unused
            of_solver, of_ts = None, [jnp.zeros((), ts.dtype)] * len(ts)
            for i in reversed(range(len(ts) - 1)):
                ends = ts[i], ts[i + 1]
                pulled = _pull_back(solver, self.flow, *ends, *states[i], part.args, back)
                more, start, end, *back = pulled
                back = tuple(back)
                of_solver = more if of_solver is None else _sum(of_solver, more)
                of_ts[i], of_ts[i + 1] = of_ts[i] + start, of_ts[i + 1] + end
            gradient = _pull_back_made(self, change, (of_solver, jnp.stack(of_ts)))
            total = gradient if total is None else _sum(total, gradient)
        return value, total


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
def _sum(a, b):
    return jtu.tree_map(jnp.add, a, b)


@eqx.filter_jit
def _start(solver, flow, ts, u, args):
    return solver.init(flow, ts[0], ts[1], u, args)


def _advance_now(solver, flow, t0, t1, y, state, args):
    y, _, _, state, _ = solver.step(flow, t0, t1, y, args, state, False)
    return y, state


_advance = eqx.filter_jit(_advance_now)


@eqx.filter_jit
def _pull_back(solver, flow, t0, t1, y, state, args, back):
    given = solver, t0, t1, y, state
    variables, fixed = eqx.partition(given, _is_variable(given))

    def run(variables):
        solver, t0, t1, y, state = eqx.combine(variables, fixed)
        ends = _advance_now(solver, flow, t0, t1, y, state, args)
        return eqx.filter(ends, eqx.is_inexact_array)

    return jax.vjp(run, variables)[1](back)[0]


def _log_distance_now(process, y, exact, features):
    square = (features(process.decode(y)) - exact) ** 2
    square = square.mean(tuple(range(1, square.ndim)))
    smallest = jnp.finfo(square.dtype).tiny
    return 0.5 * jnp.log(jnp.where(square > smallest, square, smallest))


_log_distance = eqx.filter_jit(_log_distance_now)


@eqx.filter_jit
def _objective(process, y, exact, features):
    """The mean logarithm of the distance, and for the samples that are far away also the
    logarithm of the root mean square."""

    def objective(y):
        logs = _log_distance_now(process, y, exact, features)
        rms = 0.5 * (jax.nn.logsumexp(2 * logs) - jnp.log(len(logs)))
        return logs.mean() + _share_of_rms * rms

    return jax.value_and_grad(objective)(y)


_share_of_rms = 0.5


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
        assert gradient is not None
        gradient = {name: gradient[name] for name in names}
        # Optax multiplies integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        chosen = eqx.apply_updates(chosen, updates)
        change = change | chosen
        averaged = _average(averaged, chosen, np.float32(i if pilots.is_split else 0))
        yield change | averaged, value
