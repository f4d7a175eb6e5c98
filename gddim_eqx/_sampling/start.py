import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .._model import GaussianMixture, NormalData
from .._process import AbstractProcess
from .._term import ProbabilityFlow, StartedModel
from .grid import clock_times, time_grid


class GaussianStart(eqx.Module):
    data: NormalData | GaussianMixture
    t: float | None = eqx.field(static=True)
    slope: float = eqx.field(static=True)
    power: float = eqx.field(static=True)
    num_free: int = eqx.field(static=True)

    def __init__(self, data, t=None, *, slope=1.0, power=1.4, num_free=6):
        self.data, self.t, self.slope = data, t, slope
        self.power, self.num_free = power, num_free

    def time(self, process: AbstractProcess, num_steps: int) -> float:
        """The first time at which the model is evaluated."""
        if self.t is not None:
            return self.t
        fraction = np.array([1.5 / (num_steps + 1.5)])
        return float(clock_times(process, process.t_max, process.t_min, fraction)[0])

    def time_grid(
        self, process: AbstractProcess, num_steps: int, *, dtype=None
    ) -> Real[Array, " times"]:
        t = self.time(process, num_steps)
        fraction = np.linspace(0, 1, num_steps + 1) ** self.power
        free = time_grid(process, self.num_free, t0=process.t_max, t1=t, dtype=dtype)
        rest = clock_times(process, t, process.t_min, fraction)
        return jnp.concatenate([free[:-1], jnp.asarray(rest, free.dtype)])

    def flow(self, flow: ProbabilityFlow, num_steps: int) -> ProbabilityFlow:
        process = flow.process
        closed_form = ProbabilityFlow(process, self.data.model(process, "data"), "data")
        t = jnp.asarray(self.time(process, num_steps))
        model = StartedModel(flow, closed_form, t, jnp.asarray(float(self.slope)))
        return ProbabilityFlow(process, model, "data")
