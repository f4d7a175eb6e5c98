import math

import equinox as eqx

from .._misc import as_shape, check_not_negative, check_positive, constant_field
from .langevin import AbstractLangevin, phase_space


class PSLD(AbstractLangevin):
    r"""Phase-space Langevin diffusion: noise drives both the data $x$ and the velocity $v$,

    $$\mathrm{d}x = \beta_t (M^{-1} v - \nu x)\,\mathrm{d}t
    + \sqrt{2 \nu \beta_t}\,\mathrm{d}w_x, \qquad
    \mathrm{d}v = -\beta_t (x + \Gamma M^{-1} v)\,\mathrm{d}t
    + \sqrt{2 \Gamma \beta_t}\,\mathrm{d}w_v,$$

    with critical damping, $(\Gamma / M - \nu)^2 = 4 / M$. With $\nu = 0$ it is
    [`gddim_eqx.CLD`][]. (In the paper's notation, our $\nu$ is $\Gamma$, our
    $\Gamma / M$ is $\nu$, and our $\beta$ is $\beta / 2$.)

    As the diffusion is not singular (for $\nu > 0$), models may also predict the `"flow"`.

    ??? cite "Reference"

        K. Pandey, S. Mandt, *A Complete Recipe for Diffusion Generative Models*, ICCV 2023.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `nu`: $\nu$, the friction of the data, which also sets the noise in the data.
    - `beta`, `beta_slope`: the rate is `beta + beta_slope * t`.
    - `mass_inverse`: 1 / M. The friction of the velocity follows from critical damping.
    - `gamma`: the variance of the initial velocity, divided by the mass.
    - `epsilon`: added to both initial variances, so that the covariance is non-singular at
        time 0.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    nu: float = constant_field("nu", 0.01, check_not_negative)
    beta: float = constant_field("beta", 4.0)
    beta_slope: float = constant_field("beta_slope", 0.0)
    mass_inverse: float = constant_field("mass_inverse", 4.0, check_positive)
    gamma: float = constant_field("gamma", 0.04, check_not_negative)
    epsilon: float = constant_field("epsilon", 1e-6, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    def _coefficients(self):
        friction = self.nu + 2 * math.sqrt(self.mass_inverse)
        return phase_space(self.nu, friction, self.mass_inverse, self.gamma, self.epsilon)

    def _prior_std(self):
        return [1.0, self.mass_inverse**-0.5]
