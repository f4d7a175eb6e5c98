import contextlib
import math
from collections.abc import Sequence
from typing import Any, get_args, Literal, NamedTuple

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Real

from .._custom_types import Args, State, Times
from .._linear import at_least_single, batch_axes, check_state, coefficient_dtype
from .._misc import as_constant, check_count, check_instance, show
from .._process import as_grid
from .._term import as_model, check_flow, map_rows, ProbabilityFlow, StartedModel
from ..solvers import GDDIM, LearnedGDDIM
from .grid import time_grid
from .learning import Change, descend, Learned, Pilots
from .solve import check_solver
from .start import GaussianStart, known_start


Learnable = Literal["times", "weights", "rate", "shift"]


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
    solver: dfx.AbstractSolver = GDDIM(),
    learn: Learnable | Sequence[Learnable] = ("times", "weights", "rate"),
    *,
    ts: Times | None = None,
    start: GaussianStart | Literal["auto"] | None = "auto",
    num_iterations: int = 200,
    learning_rate: float = 0.05,
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
    - `solver`: what to begin with: a [`gddim_eqx.GDDIM`][]; or, if only times are learned,
        any Diffrax solver for ordinary differential equations.
    - `learn`: what to learn. With `"times"` alone, `ts` may also increase, to encode data.
        - `"times"`: the time grid: where steps should be short depends on the data, and on
            how much local errors affect the final sample.
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
    - `batch_size`: the number of pilots for each Adam step.
    - `progress`: whether to show a progress bar. Needs tqdm.
    - `args`: passed to the model: for a conditional one, the condition of each pilot,
        `(number, ...)`, or a pytree of these.

    It takes about `4 * num_iterations * batch_size * num_steps` evaluations of the model;
    for each pilot, 50 for the exact flow (or 8 times `num_steps`); and `num_steps` every 20
    iterations.

    **Returns:** [`gddim_eqx.results.FittedSolver`][]. It is not worse than the given
    solver, by the geometric mean of the errors of pilots held back, and, if more than times
    are learned, by the root mean square of those of all.

    **Raises:** `ValueError` for invalid arguments, fewer than 8 pilots, or pilots that are
    not finite.

    ??? cite "References"

        Times: V. Tong et al., *Learning to Discretize Denoising Diffusion ODEs*, ICLR 2025.
        Corrections of coefficients: A. Frolov et al., *GAS: Improving Discretization of
        Diffusion ODEs via Generalized Adversarial Solver*, ICLR 2026.
    """
    names = _checked_names(learn, solver, start)
    if start not in ("auto", None):
        check_instance("start", start, GaussianStart, "a `GaussianStart`, 'auto' or None")
        if ts is not None:
            raise ValueError("Pass `start` or `ts`, not both: a start has its times.")
    u = _checked_pilots(flow, u, args)
    check_count("batch_size", batch_size)
    check_count("num_iterations", num_iterations, least=2)
    rate = as_constant("learning_rate", learning_rate)
    grids = _grids(flow.process, num_steps, ts, coefficient_dtype(u))
    candidates = [Learned(solver, flow, *grids, names != ("times",))]
    if isinstance(start, GaussianStart):
        candidates = [candidates[0].started(start, num_steps)]
    elif start == "auto" and ts is None and (known := known_start(flow, solver, num_steps)):
        candidates.append(candidates[0].started(known, num_steps))
    args = jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args)
    pilots = Pilots.of(flow, u, args, grids[1], batch_size)
    is_last = np.arange(len(pilots.exact)) % 4 == 3
    pilots = pilots.take(~is_last), pilots.take(is_last)
    first, *others = (_Candidate.of(x, x.zero, pilots) for x in candidates)
    best = next((x for x in others if x.improves(first, first)), first)
    if names == ("times",):
        # Dominated by the few pilots that other times lead to another mode.
        first = first._replace(rms=math.inf)
    learned = best.learned
    if learned.start is not None and "weights" in names:
        names = (*names, "slope")
    with _bar(num_iterations) if progress else contextlib.nullcontext() as bar:
        for names, steps, rate in _stages(names, num_iterations, rate):
            descent = descend(learned, best.change, names, pilots[0], steps, rate)
            for i, (change, value) in enumerate(descent, 1):
                if bar is not None:
                    bar.set_postfix({"log error": f"{value:.4g}"}, refresh=False)
                    bar.update()
                if i % _check_every == 0 or i == steps:
                    candidate = _Candidate.of(learned, change, pilots)
                    if candidate.improves(best, first):
                        best = candidate
    errors = best.error, first.error, best.held_back_error, first.held_back_error
    return FittedSolver(*learned(best.change), *errors)


def _checked_names(learn, solver, start) -> tuple[str, ...]:
    """What to learn, in order."""
    check_solver(solver)
    learnable, learn = get_args(Learnable), (learn,) if isinstance(learn, str) else learn
    names = tuple(name for name in learnable if name in learn)
    if not names or len(names) < len(learn):
        raise ValueError(f"`learn` must be some of {learnable}; got {show(learn)}.")
    if isinstance(solver, LearnedGDDIM):
        raise ValueError(
            "A learned solver has its own times: pass `solver.solver`, which it was "
            "learned from."
        )
    only_times = names == ("times",) and start in ("auto", None)
    if not (isinstance(solver, GDDIM) or only_times):
        raise ValueError(
            f"`solver` must be a `GDDIM()`; got {show(solver)}. Of other solvers, only the "
            "times can be learned: pass `learn='times'`, and no `start`."
        )
    if "rate" in names and solver.coordinate != GDDIM().coordinate:
        raise ValueError(
            "The 'rate' is that of the coordinate 'clock', the default in data space; got "
            f"{show(solver)}. Leave it out of `learn`."
        )
    return names


def _checked_pilots(flow, u, args) -> State:
    map_rows(_refuse_rows, check_flow(flow))
    if isinstance(flow.model, StartedModel):
        raise ValueError(
            "Learned times would move across that of the start, and change the number "
            "of evaluations. Pass the flow without it, and to `fit_solver` its `start`."
        )
    process = flow.process
    u = check_state(u, process.num_components, process.shape, "The states `u`")
    batch = batch_axes(u, process.shape)
    if len(batch) != 1 or batch[0] < 8:
        raise ValueError(
            "`u` must hold at least 8 pilots, (number, *shape), of which a quarter is held "
            f"back; got batch axes {batch}."
        )
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jtu.tree_leaves(u)):
        raise ValueError("The states `u` are not finite.")
    as_model(flow.model).check_args(args)
    return u


def _grids(process, num_steps, ts, dtype) -> tuple[Array, Array]:
    """The initial times, and a fine grid with the same ends."""
    ts = time_grid(process, num_steps, dtype=dtype) if ts is None else as_grid(process, ts)
    # Optimised times need more precision than states.
    dtype = at_least_single(ts.dtype)
    ts = jnp.minimum(ts.astype(dtype), process.t_end)
    number, ends = max(50, 8 * (len(ts) - 1)), dict(t0=float(ts[0]), t1=float(ts[-1]))
    return ts, time_grid(process, number, **ends, dtype=dtype)


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
    early = num_iterations - times - late
    stages = (("times",), times, 2 * rate), (names, early, rate), (names, late, rate / 4)
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


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "To show progress, install `gddim_eqx[train]`; or pass `progress=False`."
        ) from error
    return tqdm(total=total, unit=" iterations", mininterval=1)
