import math

import equinox as eqx
import numpy as np

from .._misc import as_shape, check_positive, constant_field
from .langevin import AbstractLangevin


class HOLD(AbstractLangevin):
    r"""Third-order Langevin diffusion: data $x$ with a velocity $v$ and an acceleration
    $a$. Noise drives only the acceleration,

    $$\mathrm{d}x = \beta_t v\,\mathrm{d}t, \qquad
    \mathrm{d}v = \beta_t (\kappa a - x)\,\mathrm{d}t, \qquad
    \mathrm{d}a = -\beta_t (\kappa v + \xi a)\,\mathrm{d}t
    + \sqrt{2 \xi \beta_t}\,\mathrm{d}w.$$

    By default it is critically damped: $\kappa = 2 \sqrt{2}$ and $\xi = 3 \sqrt{3}$, for
    which all three eigenvalues are $-\sqrt{3}$. States are tuples of three arrays.

    ??? cite "Reference"

        Z. Shi, R. Liu, *Generative Modelling With High-Order Langevin Dynamics*, 2024.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `coupling`, `friction`: $\kappa$ and $\xi$.
    - `beta`, `beta_slope`: the rate is `beta + beta_slope * t`.
    - `gamma`: the variance of the initial velocity and acceleration.
    - `epsilon`: the variance of the data at time 0, so that the covariance is non-singular
        there.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    coupling: float = constant_field("coupling", 2 * math.sqrt(2), check_positive)
    friction: float = constant_field("friction", 3 * math.sqrt(3), check_positive)
    beta: float = constant_field("beta", 6.0)
    beta_slope: float = constant_field("beta_slope", 0.0)
    gamma: float = constant_field("gamma", 0.04, check_positive)
    epsilon: float = constant_field("epsilon", 1e-4, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    def _coefficients(self):
        k, xi = self.coupling, self.friction
        drift = np.array([[0, 1, 0], [-1, 0, k], [0, -k, -xi]])
        diffusion = np.diag([0, 0, math.sqrt(2 * xi)])
        return drift, diffusion, np.diag([self.epsilon, self.gamma, self.gamma])

    def _prior_std(self):
        return [1.0, 1.0, 1.0]
