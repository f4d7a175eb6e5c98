"""Solvers that are learned for a model, from a few of its samples.

Gradients are accumulated step by step: only a step and its pullback are compiled, once
each, and states are kept instead of the activations of networks.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree, Real

from .._custom_types import Args, State, Times
from .._linear import at_least_single, batch_axes, check_state, coefficient_dtype
from .._misc import as_number, check_args, check_count, check_per_sample, pin
from .._process import as_grid
from .._term import check_flow, ProbabilityFlow
from ..solvers import GDDIM, LearnedGDDIM
from .grid import time_grid
from .inversion import generate


Learnable = Literal["times", "weights", "rate", "shift"]

# How fast each is learned, in multiples of the learning rate.
_scales = {"times": 1.0, "weights": 0.2, "rate": 1.0, "shift": 0.1}
_fewest = 8


class FittedSolver(NamedTuple):
    """What [`gddim_eqx.fit_solver`][] returns.

    Errors are root mean square distances, over coordinates of the data, from the endpoint
    of the exact flow; their geometric mean over samples."""

    solver: dfx.AbstractSolver
    """The solver: a [`gddim_eqx.LearnedGDDIM`][], unless only times were learned."""
    ts: Real[Array, " times"]
    """Its times."""
    error: float
    """The error on the pilots that it was learned from."""
    error_before: float
    """The same of the given solver."""
    held_back_error: float
    """The error on the pilots that were held back."""
    held_back_error_before: float
    """The same of the given solver."""


def fit_solver(
    flow: ProbabilityFlow,
    u: State,
    num_steps: int = 8,
    solver: GDDIM = GDDIM(),
    learn: Sequence[Learnable] = ("times", "weights", "rate"),
    *,
    ts: Times | None = None,
    num_iterations: int = 100,
    learning_rate: float = 0.1,
    features: Callable | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    args: Args = None,
) -> FittedSolver:
    """Learn a solver for a model: for 5 to 10 evaluations, where solvers that know nothing
    of the model need 10 to 20.

    A few numbers per step are optimised by gradient descent through the solver, on the
    distance of a few samples, the pilots, from the endpoint of the exact flow; the network
    stays as it is. First the times are learned, then all. A third of the pilots is held
    back, to choose between the given solver, learned times and all that was learned.

    !!! example

        ```python
        fitted = gd.fit_solver(flow, process.prior(key, (64,)), num_steps=5)
        x, _ = gd.sample(flow, key, 1000, solver=fitted.solver, ts=fitted.ts)
        ```

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `u`: the pilots: states at the first time, `(number, *shape)`, at least 8. With more,
        other samples profit more: 64 for networks.
    - `num_steps`: the number of steps.
    - `solver`: what to begin with.
    - `learn`: what to learn.
        - `"times"`: the time grid, as [`gddim_eqx.adapted_grid`][] does.
        - `"weights"`: corrections of the coefficients of past predictions.
        - `"rate"`: in each step, the rate of the interpolation coordinate `"clock"`.
        - `"shift"`: the times that the model is given.
    - `ts`: the initial grid, in place of [`gddim_eqx.time_grid`][] with `num_steps`.
    - `num_iterations`: the number of Adam steps, of which two fifths learn the times only.
        Each takes about four evaluations of the model per step and pilot.
    - `learning_rate`: the initial learning rate for the logarithms of the step sizes, which
        decays along a cosine, twice.
    - `features`: a function of data, `(number, *shape)`, which returns features `(number,
        ...)`, to measure distances in features in place of data.
    - `batch_size`: the number of pilots at a time, to save memory; by default all.
    - `progress`: whether to show a progress bar. Needs tqdm.
    - `args`: passed to the model: arrays with one entry per pilot.

    **Returns:** [`gddim_eqx.FittedSolver`][]. On the pilots held back it is not worse than
    the given solver, neither by the geometric mean of errors nor by their root mean square.

    **Raises:** `ValueError` for invalid arguments, fewer than 8 pilots, or pilots that are
    not finite.

    ??? cite "References"

        Times: V. Tong et al., *Learning to Discretize Denoising Diffusion ODEs*, ICLR 2025.
        Corrections of coefficients: A. Frolov et al., *GAS: Improving Discretization of
        Diffusion ODEs via Generalized Adversarial Solver*, ICLR 2026.
    """
    if not isinstance(solver, GDDIM):
        raise ValueError(
            f"`solver` must be a `GDDIM()`; got {solver!r}. For the times of other "
            "solvers, use `adapted_grid`."
        )
    if not learn or not set(learn) <= set(_scales):
        raise ValueError(f"`learn` must be some of {tuple(_scales)}; got {learn!r}.")
    if "rate" in learn and solver.coordinate != GDDIM().coordinate:
        raise ValueError(
            "The 'rate' is that of the coordinate 'clock', the default in data space; got "
            f"{solver!r}. Leave it out of `learn`."
        )
    pilots = _Pilots.of(flow, u, args, num_steps, ts, features, batch_size)
    if pilots.number < _fewest:
        raise ValueError(
            f"`u` must hold at least {_fewest} pilots, of which a third is held back; got "
            f"{pilots.number}."
        )
    check_count("num_iterations", num_iterations, least=2)
    index = np.arange(pilots.number)
    held_back = pilots.some(index % 3 == 2)
    pilots = pilots.some(index % 3 != 2)
    learned = _Learned(solver, flow, pilots.ts, pilots.grid, corrects=learn != ("times",))
    rate = as_number("learning_rate", learning_rate)
    stages = [learn]
    if "times" in learn and len(learn) > 1:
        stages = [("times",), learn]
    shares = [0.4, 0.6] if len(stages) == 2 else [1.0]
    with _bar(num_iterations, progress) as bar:
        best = _Candidate.of(learned, learned.zero, held_back)
        first, change = best, learned.zero
        for names, share in zip(stages, shares):
            steps = round(share * num_iterations)
            change = best.change
            for candidate in _descend(
                learned, change, names, pilots, held_back, steps, rate, bar
            ):
                if candidate.improves(best, first):
                    best = candidate
            rate = rate / 2
    before, after = (
        float(np.exp(learned.log_distances(x.change, pilots).mean())) for x in (first, best)
    )
    made, ts = learned(best.change)
    return FittedSolver(made, ts, after, before, best.error, first.error)


class _Candidate(NamedTuple):
    change: dict[str, PyTree]
    error: float
    rms: float

    @classmethod
    def of(cls, learned, change, pilots):
        logs = learned.log_distances(change, pilots)
        rms = float(np.exp(2 * logs).mean() ** 0.5)
        return cls(change, float(np.exp(logs.mean())), rms)

    def improves(self, best: "_Candidate", first: "_Candidate") -> bool:
        return self.error < best.error and self.rms <= first.rms


class _Pilots(NamedTuple):
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
    def of(cls, flow, u, args, num_steps, ts, features, batch_size):
        check_flow(flow)
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
            raise ValueError(f"`features` must be callable; got {features!r}.")
        batch_size = batch[0] if batch_size is None else batch_size
        check_count("batch_size", batch_size)
        check_per_sample("`args`", args, batch)
        check_args(flow.model, args)
        if ts is None:
            ts = time_grid(process, num_steps, dtype=coefficient_dtype(u))
        ts = as_grid(process, ts)
        # Optimised times need more precision than states.
        ts = jnp.minimum(ts.astype(at_least_single(ts.dtype)), process.t_end)
        number, ends = max(200, 8 * (len(ts) - 1)), dict(t0=float(ts[0]), t1=float(ts[-1]))
        grid = time_grid(process, number, **ends, dtype=ts.dtype)
        features = _identity if features is None else features
        pilots = cls(u, args, jnp.zeros(batch), features, ts, grid, batch_size)
        exact = [
            _endpoint(flow, part.u, grid, part.args, features) for part in pilots.parts()
        ]
        return pilots._replace(exact=jnp.concatenate(exact))

    def some(self, chosen: np.ndarray) -> "_Pilots":
        pick = lambda x: x[chosen]
        u, args, exact = jtu.tree_map(pick, (self.u, self.args, self.exact))
        return self._replace(u=u, args=args, exact=exact)

    def parts(self) -> list["_Pilots"]:
        index = np.arange(self.number)
        number = -(-self.number // self.batch_size)
        return [self.some(part) for part in np.array_split(index, number)]


def _identity(x):
    return x


@eqx.filter_jit
def _endpoint(flow, u, grid, args, features):
    return features(generate(flow, u, solver=GDDIM(), ts=grid, args=args))


class _Learned(eqx.Module):
    """The solver and its times, as a function of changes that are zero at first."""

    solver: dfx.AbstractSolver
    flow: ProbabilityFlow
    ts: Array
    grid: Array
    corrects: bool

    @property
    def zero(self) -> dict[str, PyTree]:
        steps = jnp.zeros(len(self.ts) - 1, self.ts.dtype)
        if not self.corrects:
            return {"times": steps}
        assert isinstance(self.solver, GDDIM)
        made = LearnedGDDIM(self.solver, self.flow.process, self.ts)
        weights = made.predictor, made.corrector
        return {
            "times": steps,
            "weights": weights,
            "rate": made.log_rates,
            "shift": made.shifts,
        }

    def __call__(self, change) -> tuple[dfx.AbstractSolver, Array]:
        change = {
            name: jtu.tree_map(lambda x, name=name: _scales[name] * x, value)
            for name, value in change.items()
        }
        ts = self._times(change["times"])
        if not self.corrects:
            return self.solver, ts
        assert isinstance(self.solver, GDDIM)
        predictor, corrector = change["weights"]
        made = LearnedGDDIM(
            self.solver,
            self.flow.process,
            ts,
            predictor,
            corrector,
            change["rate"],
            change["shift"],
        )
        return made, ts

    def _times(self, change):
        ts, grid = self.ts, self.grid
        # A coordinate in which the default grid is uniform, and the power of time that is
        # interpolated.
        place, root = jnp.linspace(0, 1, len(grid), dtype=ts.dtype), grid**0.25
        order = jnp.argsort(grid)
        lengths = jnp.diff(jnp.interp(ts, grid[order], place[order]))
        steps = lengths * jnp.exp(change)
        places = jnp.cumsum(steps[:-1]) / steps.sum()
        inner = jnp.interp(places, place, root) ** 4
        inner = pin((change == 0).all(), ts[1:-1], inner)
        return jnp.concatenate([ts[:1], inner, ts[-1:]])

    def log_distances(self, change, pilots: _Pilots) -> np.ndarray:
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

    def value_and_gradient(self, change, pilots: _Pilots):
        """The objective, and its gradient."""
        solver, ts = _make(self, change)
        value, total = 0.0, None
        for part in pilots.parts():
            states = self._run(solver, ts, part)
            share = part.number / pilots.number
            y = states.pop()[0]
            at_end, back = _objective(self.flow.process, y, part.exact, part.features)
            value += share * float(at_end)
            back = jtu.tree_map(lambda x: share * x, back), None
            of_solver, of_ts = None, [jnp.zeros((), ts.dtype)] * len(ts)
            for i in reversed(range(len(ts) - 1)):
                ends = ts[i], ts[i + 1]
                pulled = _pull_back(solver, self.flow, *ends, *states[i], part.args, back)
                more, start, end, *back = pulled
                of_solver = more if of_solver is None else _sum(of_solver, more)
                of_ts[i], of_ts[i + 1] = of_ts[i] + start, of_ts[i + 1] + end
            gradient = _pull_back_made(self, change, (of_solver, jnp.stack(of_ts)))
            total = gradient if total is None else _sum(total, gradient)
        return value, total


_make = eqx.filter_jit(lambda learned, change: learned(change))


@eqx.filter_jit
def _pull_back_made(learned, change, back):
    variables = lambda tree: eqx.filter(tree, eqx.is_inexact_array)
    _, pull_back = jax.vjp(lambda change: variables(learned(change)), change)
    return pull_back(back)[0]


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
    variables, fixed = eqx.partition(given, eqx.is_inexact_array)

    def run(variables):
        solver, t0, t1, y, state = eqx.combine(variables, fixed)
        ends = _advance_now(solver, flow, t0, t1, y, state, args)
        return eqx.filter(ends, eqx.is_inexact_array)

    (_, after), pull_back = jax.vjp(run, variables)
    of_y, of_state = back
    if of_state is None:
        # The solver's state at the end is not used.
        of_state = jtu.tree_map(jnp.zeros_like, after)
    return pull_back((of_y, of_state))[0]


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


_share_of_rms = 0.25


def _descend(learned, change, names, pilots, held_back, steps, rate, bar):
    """Adam on the changes of these names. Yields candidates."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimiser = optax.chain(optax.zero_nans(), optax.adam(schedule))
    chosen = {name: change[name] for name in names}
    state = optimiser.init(chosen)
    for i in range(steps):
        value, gradient = learned.value_and_gradient(change, pilots)
        gradient = {name: gradient[name] for name in names}
        # Optax multiplies integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        chosen = optax.apply_updates(chosen, updates)
        change = change | chosen
        bar(value)
        if (i + 1) % _check_every == 0 or i + 1 == steps:
            yield _Candidate.of(learned, change, held_back)


_check_every = 10


class _bar:
    """A progress bar, or none."""

    def __init__(self, total: int, progress: bool):
        self.bar = None
        if progress:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError(
                    "To show progress, install `gddim_eqx[train]`; or pass "
                    "`progress=False`."
                ) from error
            self.bar = tqdm(total=total, unit=" iterations", mininterval=1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def __call__(self, value: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix({"log error": f"{value:.4g}"}, refresh=False)
            self.bar.update()
