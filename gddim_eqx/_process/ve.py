import math

import equinox as eqx
import jax.numpy as jnp

from .._misc import as_shape, check_positive, constant_field
from .diagonal import AbstractScalarProcess
from .tables import coarse_and_rest


class VE(AbstractScalarProcess):
    r"""The variance-exploding process

    $$\mathrm{d}x = \sqrt{\tfrac{\mathrm{d}}{\mathrm{d}t} \sigma_t^2}\,\mathrm{d}w,
    \qquad \sigma_t = \sigma_\text{min}
    (\sigma_\text{max} / \sigma_\text{min})^t, \qquad t \in [0, 1].$$

    As in the reference, the standard deviation given data is $\sigma_t$ itself, so it is
    already $\sigma_\text{min}$ at time 0.

    ??? cite "Reference"

        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole,
        *Score-Based Generative Modeling through Stochastic Differential Equations*,
        ICLR 2021.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `sigma_min`, `sigma_max`: the standard deviations given data at times 0 and 1.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    sigma_min: float = constant_field("sigma_min", 0.01, check_positive)
    sigma_max: float = constant_field("sigma_max", 50.0)
    t_min: float = constant_field("t_min", 1e-5)
    t_end: float = constant_field("t_end", 1.0)

    def __check_init__(self):
        check_sigmas(self.sigma_min, self.sigma_max)

    t_zero_signal = math.inf

    def _growth(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _drift(self, t):
        return jnp.zeros_like(t)

    def _diffusion(self, t):
        return self._std(t) * math.sqrt(2 * self._growth())

    def _transition(self, t, s):
        return jnp.ones_like(t)

    def _std(self, t):
        # In float32 an exponent of 8.5 has a rounding error of 1e-6. So split it into a
        # product of two twelve-bit numbers, which is exact, and a small remainder.
        growth, growth_rest = map(float, coarse_and_rest(self._growth()))
        coarse = jnp.round(t * 2**11) / 2**11
        rest = growth_rest * coarse + self._growth() * (t - coarse)
        at_coarse = self.sigma_min * jnp.exp(growth * coarse)
        # Not written as a product of exponentials, which XLA may merge.
        return at_coarse + at_coarse * jnp.expm1(rest)

    def _prior_factor(self):
        return self._std(jnp.asarray(self.t_max))


def check_sigmas(sigma_min: float, sigma_max: float) -> None:
    """Raise a `ValueError` unless `sigma_min` < `sigma_max`."""
    if not sigma_max > sigma_min:
        raise ValueError(
            f"Need `sigma_min` < `sigma_max`; got {sigma_min} and {sigma_max}."
        )
