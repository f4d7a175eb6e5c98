import bisect
import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Real

from .._linear import apply
from .._misc import as_constant, check_choice, check_count, check_instance, check_positive
from .._model import GaussianMixture, NormalData
from .._process import AbstractProcess, require_process
from .._term import as_model, check_flow, ProbabilityFlow, started_flow, StartedModel
from ..solvers import DataSplitting, GDDIM
from .grid import clock_times, time_grid


class GaussianStart(eqx.Module):
    r"""A start in closed form at high noise levels, for sampling in 2 to 10 evaluations.

    States at high noise levels say so little about the data that the predictions of any
    model are close to those of normal data with the same mean and covariance. There the
    solver steps with these, which costs no evaluation. The model is evaluated from a time
    `t` on, with a full history: there is no warm-up.

    At the first evaluation, the difference of the model's prediction from the closed form
    is known, but not how it changes. [`gddim_eqx.GDDIM`][] extrapolates it linearly, with
    a given relative slope.

    !!! example

        ```python
        import gddim_eqx as gd
        import jax

        flow = gd.checkpoints.pretrained("fashion-mnist-vp")
        # Better with those of the images, `gd.NormalData.from_samples(images)`.
        data = gd.NormalData(jax.numpy.zeros((28, 28, 1)), 0.7**2)
        start = gd.GaussianStart(data)
        x, evaluations = gd.sample(flow, jax.random.key(0), 16, 4, start=start)

        # For `diffrax.diffeqsolve`, and all functions of a flow:
        started = start.flow(flow, 4)
        ts = start.time_grid(flow.process, 4)
        ```

    The started flow is a model of its own, with its own likelihood. Guidance acts from `t`
    on; before, samples follow `data`, which may be those of a class.
    """

    data: NormalData | GaussianMixture
    t: float | None = eqx.field(static=True)
    regime: Literal["nearest", "sharpest"] = eqx.field(static=True)
    slope: float = eqx.field(static=True)
    power: float | None = eqx.field(static=True)
    num_free: int = eqx.field(static=True)

    def __init__(
        self,
        data: NormalData | GaussianMixture,
        t: float | None = None,
        regime: Literal["nearest", "sharpest"] = "nearest",
        *,
        slope: float | None = None,
        power: float | None = None,
        num_free: int = 6,
    ):
        r"""**Arguments:**

        - `data`: what is known of the data: [`gddim_eqx.NormalData`][] with their mean and
            covariance, or a [`gddim_eqx.GaussianMixture`][].
        - `t`: the time of the first evaluation. By default, the time at which states hold
            $7\,e^{-n / 2.4}$ nats of information about the data, if these are normal, for
            $n$ evaluations, three times as many in the regime `"sharpest"`, and at most
            0.5 per dimension.
        - `regime`: what the defaults aim at.
            - `"nearest"`: samples near those of the exact flow of the model.
            - `"sharpest"`: sample quality. The model is first evaluated later, and in
                shorter steps at first. Samples are farther from the exact flow.
        - `slope`: how much the difference between the model and the closed form grows
            over the first step from `t`, relative to the difference at `t`. By default 0.7,
            or 0 for `"sharpest"`.
        - `power`: the times from `t` on are uniform in the `power`-th root of the default
            clock. By default 1, but 1.4 for up to 3 evaluations and 1.2 for 4; or 2 for
            `"sharpest"`.
        - `num_free`: the number of steps before `t`, which only affects accuracy.

        **Raises:** `ValueError` for invalid arguments, or a mixture without `t`.
        """
        wanted = "a `NormalData(mean, covariance)` or a `GaussianMixture(means)`"
        check_instance("data", data, NormalData | GaussianMixture, wanted)
        if t is None and not isinstance(data, NormalData):
            raise ValueError(
                "The default time `t` is for `NormalData`; got a `GaussianMixture`. Pass "
                "`t`: a later stage of sampling the more components there are."
            )
        check_count("num_free", num_free)
        self.data, self.num_free = data, int(num_free)
        self.t = None if t is None else as_constant("t", t)
        check_choice("regime", regime, ("nearest", "sharpest"))
        self.regime = regime
        default = 0.7 if regime == "nearest" else 0.0
        self.slope = as_constant("slope", default if slope is None else slope)
        self.power = None if power is None else as_constant("power", power)
        if self.power is not None:
            check_positive(power=self.power)

    def time(self, process: AbstractProcess, num_steps: int) -> float:
        """The time of the first evaluation, for this many.

        **Raises:** `ValueError` for a `t` at which sampling does not take place.
        """
        require_process(process)
        check_count("num_steps", num_steps)
        if self.t is not None:
            if not process.t_min < self.t < process.t_max:
                raise ValueError(
                    f"`t` must be between {process.t_min} and {process.t_max}, the "
                    f"process' `t_min` and `t_max`; got {self.t}."
                )
            return self.t
        data = self.data
        assert isinstance(data, NormalData)
        wanted = 7 * math.exp(-int(num_steps) / 2.4)
        wanted *= 3 if self.regime == "sharpest" else 1
        wanted = min(wanted, 0.5 * data.mean.size)
        # At least a part of the first step of the default grid, at most most of the grid.
        fractions = np.linspace(0.1 / int(num_steps), 0.7, 2**14 + 1)
        at = lambda i: _time_at(process, fractions[i])
        information = lambda i: _information(data, process, at(i))
        return at(bisect.bisect_left(range(1, 2**14), wanted, key=information))

    def time_grid(
        self, process: AbstractProcess, num_steps: int, *, dtype: Any = None
    ) -> Real[Array, " times"]:
        """The time grid for a number of evaluations.

        **Arguments:**

        - `process`: the forward process.
        - `num_steps`: the number of steps from `t` on, each with one evaluation.
        - `dtype`: the dtype of the times, as in [`gddim_eqx.time_grid`][].

        **Returns:** `num_free + num_steps + 1` decreasing times from `process.t_max` to
        `process.t_min`.
        """
        t = self.time(process, num_steps)
        early = time_grid(process, self.num_free, t0=process.t_max, t1=t, dtype=dtype)
        power = self.power
        if power is None:
            few = {2: 1.4, 3: 1.4, 4: 1.2}.get(int(num_steps), 1.0)
            power = 2.0 if self.regime == "sharpest" else few
        fraction = np.linspace(0, 1, int(num_steps) + 1) ** power
        late = clock_times(process, t, process.t_min, fraction)
        return jnp.concatenate([early[:-1], jnp.asarray(late, early.dtype)])

    def flow(self, flow: ProbabilityFlow, num_steps: int) -> ProbabilityFlow:
        """The flow of a model that is known in closed form before the first evaluation.

        **Arguments:**

        - `flow`: the probability flow of the model.
        - `num_steps`: the number of evaluations, for the default `t`.

        **Returns:** a probability flow, which predicts data.

        **Raises:** `ValueError` for a process for data of another shape.
        """
        process = check_flow(flow).process
        self.data.model(process, "data")  # Checks the shape.
        t = self.time(process, num_steps)
        if isinstance(flow.model, StartedModel):
            raise ValueError("This flow has a start already; pass that of its model.")
        return started_flow(flow, self.data, jnp.asarray(t), jnp.asarray(self.slope))


def known_start(
    flow: ProbabilityFlow, solver: Any, num_steps: int | None
) -> GaussianStart | None:
    """The start for a model that has the moments of its data, where it helps."""
    process, model = flow.process, flow.model
    if not (isinstance(num_steps, (int, np.integer)) and 0 < num_steps <= 10):
        return None
    if not (isinstance(solver, GDDIM) and isinstance(solver.splitting, DataSplitting)):
        return None
    data = as_model(model).normal_data(process)
    if data is None or isinstance(model, StartedModel):
        return None
    one_variance = data.covariance.variances.ndim == 0 and data.covariance.vectors is None
    only_std = one_variance and not data.mean.any()
    if only_std and process.cholesky(process.t_max).blocks.ndim > 2:
        # Data whose frequencies are noised differently have no single variance.
        return None
    if process.num_components > 1:
        # With a velocity, samples are then also nearer to those of the exact flow.
        return GaussianStart(data, None, "sharpest")
    # If little is known, the start is as early as for more evaluations.
    t = GaussianStart(data).time(process, int(num_steps) + 2) if only_std else None
    return GaussianStart(data, t)


def _time_at(process: AbstractProcess, fraction: Any) -> float:
    ends = process.t_max, process.t_min
    return float(clock_times(process, *ends, np.array([fraction]))[0])


def _information(data: NormalData, process: AbstractProcess, t: float) -> float:
    if any(isinstance(x, Tracer) for x in jtu.tree_leaves(data)):
        raise ValueError(
            "The default time `t` takes a search, which cannot be traced by JAX. Pass `t`."
        )
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        data, t = jtu.tree_map(lambda x: np.asarray(x, np.float64), (data, t))
        return float(_information_at(data, process, t))


@eqx.filter_jit
def _information_at(data, process, t):
    """The mutual information between normal data and states, in nats."""
    mean = process.transition(t, jnp.zeros_like(t))
    u = apply(mean, process.encode(data.mean))
    alone = NormalData(data.mean, jnp.zeros_like(t))
    return alone.log_density(u, process, t) - data.log_density(u, process, t)
