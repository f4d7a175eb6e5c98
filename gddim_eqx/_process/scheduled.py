import equinox as eqx
import jax.numpy as jnp

from .._misc import as_shape
from .diagonal import AbstractScalarProcess
from .schedule import AbstractSchedule, as_schedule


class AbstractScheduledProcess(AbstractScalarProcess):
    r"""A process with drift $-\frac{1}{2} \beta_t\,x$ and a standard normal prior."""

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    schedule: AbstractSchedule = eqx.field(default="linear", converter=as_schedule)

    @property
    def t_min(self) -> float:
        return self.schedule.t_min

    @property
    def t_end(self) -> float:
        return self.schedule.t_end

    @property
    def t_zero_signal(self) -> float:
        return self.schedule.t_zero_signal

    def _drift(self, t):
        return -0.5 * self.schedule.rate(t)

    def _transition(self, t, s):
        return self.schedule.decay(t, s)

    def _prior_factor(self):
        return jnp.ones(())


arguments = """**Arguments:**

- `shape`: the shape of one data sample.
- `schedule`: `"linear"` (the default: beta from 0.1 to 20), `"cosine"`, or a
    [`gddim_eqx.LinearSchedule`][] or [`gddim_eqx.CosineSchedule`][] with other constants.
"""
