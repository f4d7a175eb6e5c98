import equinox as eqx
import jax.numpy as jnp

from .base import AbstractScalarProcess, as_shape
from .schedule import AbstractSchedule, as_schedule


class SubVP(AbstractScalarProcess):
    r"""The sub-variance-preserving process:

    $$\mathrm{d}x = -\tfrac{1}{2} \beta_t\,x\,\mathrm{d}t
    + \sqrt{\beta_t (1 - e^{-2 \int_0^t \beta})}\,\mathrm{d}w,$$

    whose standard deviation given data is $1 - e^{-\int_0^t \beta}$.

    ??? cite "Reference"

        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole,
        *Score-Based Generative Modeling through Stochastic Differential Equations*,
        ICLR 2021.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    schedule: AbstractSchedule = eqx.field(default="linear", converter=as_schedule)

    @property
    def t_min(self) -> float:
        return self.schedule.t_min

    @property
    def t_end(self) -> float:
        return self.schedule.t_end

    @property
    def t_vanish(self) -> float:
        return self.schedule.t_vanish

    def _drift(self, t):
        return -0.5 * self.schedule.rate(t)

    def _diffusion(self, t):
        variance = self.schedule.variance(t)
        return jnp.sqrt(self.schedule.rate(t) * variance * (2 - variance))

    def _transition(self, t, s):
        return self.schedule.decay(t, s)

    def _std(self, t):
        return self.schedule.variance(t)

    def prior_factor(self):
        return self._operator(jnp.ones(()))


SubVP.__init__.__doc__ = """**Arguments:**

- `shape`: the shape of one data sample.
- `schedule`: `"linear"` (the default: beta from 0.1 to 20), `"cosine"`, or a
    [`gddim_eqx.Linear`][] or [`gddim_eqx.CosineSquared`][] with other constants.
"""
