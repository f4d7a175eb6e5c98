import math

import equinox as eqx
import jax.numpy as jnp

from .._linear import append_axes, CosineBasis
from .._misc import as_shape, check_not_negative, check_positive, constant_field
from .blur import Blur
from .cld import CLD
from .langevin import AbstractAugmentedProcess


class BlurringCLD(AbstractAugmentedProcess):
    r"""Critically-damped Langevin diffusion with blurring: [`gddim_eqx.CLD`][] of the
    cosine coefficients of an image, whose position and velocity also decay as in
    [`gddim_eqx.BDM`][].

    Given data $x$, the mean of coefficient $(i, j)$ is that of CLD times $D_{ij}(t)$. The
    covariance and its square roots are those of CLD: the factor $R_t$ does not depend on
    the decay of the mean. Noise drives both position and velocity. Without blur
    (`sigma_blur_max=0`) this is CLD of the cosine coefficients.

    **Arguments:**

    - `shape`: (height, width, channels) of one image.
    - `sigma_blur_max`: the standard deviation of the strongest blur, in pixels.
    - `min_scale`: the fraction of the highest frequencies that remains.
    - The other arguments are those of [`gddim_eqx.CLD`][].
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    sigma_blur_max: float = constant_field("sigma_blur_max", 10.0, check_not_negative)
    min_scale: float = constant_field("min_scale", 0.001)
    beta: float = constant_field("beta", 4.0)
    beta_slope: float = constant_field("beta_slope", 0.0)
    mass_inverse: float = constant_field("mass_inverse", 4.0, check_positive)
    gamma: float = constant_field("gamma", 0.04, check_not_negative)
    epsilon: float = constant_field("epsilon", 1e-6, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    def __check_init__(self):
        self._blurring()

    def _blurring(self) -> Blur:
        return Blur(self.shape, self.sigma_blur_max, self.min_scale, self.t_end)

    def _cld(self) -> CLD:
        rate = self.beta, self.beta_slope
        initial = self.mass_inverse, self.gamma, self.epsilon
        return CLD(self.shape, *rate, *initial, self.t_min, self.t_end)

    num_components = 2
    basis = CosineBasis()

    def _drift(self, t):
        fading = self._blurring().fading(t)
        eye = append_axes(jnp.eye(2, dtype=t.dtype), 5)
        return append_axes(self._cld()._drift(t), 5) - eye * fading[None, None]

    def _diffusion(self, t):
        # The square root of G G^T + 2 D' / D Sigma, from the Cholesky factor of Sigma.
        cld, speed = self._cld(), math.sqrt(2) * self._blurring().root_of_fading(t)
        (p, zero), (q, r) = cld._cholesky(t)
        noise = jnp.sqrt(cld._diffusion(t)[1, 1] ** 2 + (speed * r) ** 2)
        return jnp.array([[speed * p, speed * zero], [speed * q, noise]])

    def _transition(self, t, s):
        blur = self._blurring()
        ratio = blur.scale(t) / blur.scale(s)
        return append_axes(self._cld()._transition(t, s), 5) * ratio[None, None]

    def _covariance(self, t):
        return self._cld()._covariance(t)

    def _factor(self, t):
        return self._cld()._factor(t)

    def _cholesky(self, t):
        return self._cld()._cholesky(t)

    def _prior_factor(self):
        return self._cld()._prior_factor()
