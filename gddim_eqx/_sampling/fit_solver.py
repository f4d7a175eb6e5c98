from collections.abc import Callable, Sequence
from typing import get_args, Literal, NamedTuple

import diffrax as dfx
import numpy as np
from jaxtyping import Array, Real

from .._custom_types import Args, State, Times
from .._misc import as_number, check_count, check_instance, map_rows, show
from .._term import ProbabilityFlow
from ..solvers import GDDIM
from .learning import Change, descend, Learned, Pilots
from .solve import check_solver
from .start import GaussianStart, known_start


Learnable = Literal["times", "weights", "rate", "shift"]

_fewest = 8


class FittedSolver(NamedTuple):
    """What [`gddim_eqx.fit_solver`][] returns.

    Errors are root mean square distances, over coordinates of the data, from the endpoint
    of the exact flow; their geometric mean over samples."""

    solver: dfx.AbstractSolver
    """The solver: a [`gddim_eqx.LearnedGDDIM`][], unless only times were learned, without a
    start."""
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
    start: GaussianStart | Literal["auto"] | None = "auto",
    num_iterations: int = 200,
    learning_rate: float = 0.05,
    features: Callable | None = None,
    batch_size: int = 8,
    progress: bool = True,
    args: Args = None,
) -> FittedSolver:
    """Learn a solver for a model: for 3 to 10 evaluations, where solvers that know nothing
    of the model need 10 to 20.

    A few numbers per step are optimised by stochastic gradient descent through the solver,
    on the distance of a few samples, the pilots, from the endpoint of the exact flow; the
    network stays as it is. First the times are learned, then all. A quarter of the pilots
    is held back, to choose between what was learned and the given solver. Whatever is
    learned, every step stays exact if the data are a single point.

    !!! example

        ```python
        fitted = gd.fit_solver(flow, process.prior(key, (64,)), num_steps=5)
        x, _ = gd.sample(flow, key, 1000, solver=fitted.solver, ts=fitted.ts)
        gd.checkpoints.save("solver.npz", fitted)

        # Better, with the mean and the covariance of the data:
        start = gd.GaussianStart(gd.NormalData.from_samples(images))
        fitted = gd.fit_solver(flow, process.prior(key, (64,)), num_steps=5, start=start)
        ```

    **Arguments:**

    - `flow`: the probability flow of the model.
    - `u`: the pilots: states at the first time, `(number, *shape)`, at least 8. With more,
        other samples profit more: 64 for networks.
    - `num_steps`: the number of evaluations of the model per sample.
    - `solver`: what to begin with.
    - `learn`: what to learn.
        - `"times"`: the time grid, as [`gddim_eqx.adapted_grid`][] does.
        - `"weights"`: corrections of the coefficients of past predictions.
        - `"rate"`: in each step, the rate of the interpolation coordinate `"clock"`.
        - `"shift"`: the times that the model is given. For the included networks this
            reduces the error by another tenth; with exact models it increases it.
    - `ts`: the initial grid, in place of [`gddim_eqx.time_grid`][] with `num_steps`.
    - `start`: a [`gddim_eqx.GaussianStart`][], whose time and slope are learned too, with
        the times and the weights. With `"auto"`, if the model has the standard deviation or
        the moments of its data, a start from these where it has a smaller error.
    - `num_iterations`: the number of Adam steps, of which two fifths learn the times only.
        With 5 evaluations, 120 suffice; with 8 and 10, 300 are better.
    - `learning_rate`: the learning rate for the logarithms of the step sizes, which decays
        along a cosine in each of three stages.
    - `features`: a function of data, `(number, *shape)`, which returns features `(number,
        ...)`, to measure distances in features in place of data.
    - `batch_size`: the number of pilots for each Adam step.
    - `progress`: whether to show a progress bar. Needs tqdm.
    - `args`: passed to the model: for a conditional one, the condition of each pilot,
        `(number, ...)`, or a pytree of these.

    It takes about `4 * num_iterations * batch_size * num_steps` evaluations of the model;
    for each pilot, 50 for the exact flow (or 8 times `num_steps`); and `num_steps` every 20
    iterations.

    **Returns:** [`gddim_eqx.FittedSolver`][]. It is not worse than the given solver, by
    the geometric mean of the errors of pilots held back, and by the root mean square of
    those of all.

    **Raises:** `ValueError` for invalid arguments, fewer than 8 pilots, or pilots that are
    not finite.

    ??? cite "References"

        Times: V. Tong et al., *Learning to Discretize Denoising Diffusion ODEs*, ICLR 2025.
        Corrections of coefficients: A. Frolov et al., *GAS: Improving Discretization of
        Diffusion ODEs via Generalized Adversarial Solver*, ICLR 2026.
    """
    check_solver(solver)
    if not isinstance(solver, GDDIM):
        raise ValueError(
            f"`solver` must be a `GDDIM()`; got {show(solver)}. For the times of other "
            "solvers, use `adapted_grid`."
        )
    learnable = get_args(Learnable)
    if not learn or not all(name in learnable for name in learn):
        raise ValueError(f"`learn` must be some of {learnable}; got {show(learn)}.")
    if "rate" in learn and solver.coordinate != GDDIM().coordinate:
        raise ValueError(
            "The 'rate' is that of the coordinate 'clock', the default in data space; got "
            f"{show(solver)}. Leave it out of `learn`."
        )
    map_rows(_refuse_rows, flow)
    names = tuple(name for name in learnable if name in learn)
    if start not in ("auto", None):
        check_instance("start", start, GaussianStart, "a `GaussianStart`, 'auto' or None")
        if ts is not None:
            raise ValueError("Pass `start` or `ts`, not both: a start has its times.")
    pilots = Pilots.of(flow, u, args, num_steps, ts, 50, features, batch_size)
    if pilots.number < _fewest:
        raise ValueError(
            f"`u` must hold at least {_fewest} pilots, of which a quarter is held back; "
            f"got {pilots.number}."
        )
    check_count("num_iterations", num_iterations, least=2)
    rate = as_number("learning_rate", learning_rate)
    is_last = np.arange(pilots.number) % 4 == 3
    pilots = pilots.some(~is_last), pilots.some(is_last)
    learned = Learned(solver, flow, pilots[0].ts, pilots[0].grid, names != ("times",))
    first, best = _begin(learned, pilots, num_steps, ts, start)
    learned = best.learned
    if learned.start is not None and "weights" in names:
        names = (*names, "slope")
    with _bar(num_iterations, progress) as bar:
        for names, steps, rate in _stages(names, num_iterations, rate):
            descent = descend(learned, best.change, names, pilots[0], steps, rate)
            for i, (change, value) in enumerate(descent, 1):
                bar(value)
                if i % _check_every == 0 or i == steps:
                    candidate = _Candidate.of(learned, change, pilots)
                    if candidate.improves(best, first):
                        best = candidate
    made, ts = learned(best.change)
    errors = best.error, first.error, best.held_back_error, first.held_back_error
    return FittedSolver(made, ts, *errors)


def _begin(learned, pilots, num_steps, ts, start):
    """The given solver, and what to begin with."""
    first = None
    if start in ("auto", None):
        first = _Candidate.of(learned, learned.zero, pilots)
        known = None
        if start == "auto" and ts is None:
            known = known_start(learned.flow, learned.solver, num_steps)
        if known is None:
            return first, first
        start = known
    learned = learned.started(start, num_steps)
    candidate = _Candidate.of(learned, learned.zero, pilots)
    if first is None:
        return candidate, candidate
    return first, candidate if candidate.improves(first, first) else first


def _refuse_rows(name, x):
    raise ValueError(
        f"{name} has one row per sample, but the pilots are split. Learn a solver for the "
        "model with one value for all samples, or with `args`."
    )


def _stages(names, num_iterations, rate):
    """What is learned, for how many iterations, and how fast. Each stage begins with the
    best so far, and the last is slow, as only small changes may still improve."""
    times = num_iterations * 2 // 5 if "times" in names and len(names) > 1 else 0
    late = (num_iterations - times) // 2
    stages = [
        (("times",), times, 2 * rate),
        (names, num_iterations - times - late, rate),
        (names, late, rate / 4),
    ]
    return [stage for stage in stages if stage[1]]


# The number of iterations between looks at the pilots held back.
_check_every = 20


class _Candidate(NamedTuple):
    learned: Learned
    change: Change
    error: float
    held_back_error: float
    rms: float
    """The root mean square over all pilots: of those held back only, it would be that of
    one or two of them."""

    @classmethod
    def of(cls, learned, change, pilots: tuple[Pilots, Pilots]):
        logs = [learned.log_distances(change, some) for some in pilots]
        error, held_back_error = (float(np.exp(x.mean())) for x in logs)
        rms = float(np.exp(2 * np.concatenate(logs)).mean() ** 0.5)
        return cls(learned, change, error, held_back_error, rms)

    def improves(self, best: "_Candidate", first: "_Candidate") -> bool:
        return self.held_back_error < best.held_back_error and self.rms <= first.rms


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
