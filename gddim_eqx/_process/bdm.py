import math

import equinox as eqx
import jax.numpy as jnp

from .._linear import CosineBasis
from .._misc import as_shape, check_not_negative, check_positive, constant_field
from .blur import Blur
from .diagonal import AbstractDiagonalProcess


class BDM(AbstractDiagonalProcess):
    r"""The blurring diffusion model: noise is added while the image is blurred, so that
    high frequencies are lost first.

    States are the cosine coefficients of the image. Given data $x$, the coefficient of
    frequency $(i, j)$ at time $t$ is normal with

    $$\text{mean } \sqrt{\alpha_t}\,D_{ij}(t)\,\mathrm{DCT}(x)_{ij}, \quad
    \text{variance } 1 - \alpha_t, \quad
    D_{ij}(t) = (1 - d)\,e^{-\lambda_{ij} \tau_t} + d,$$

    $\alpha_t = \cos^2(\frac{\pi}{2} \frac{t + o}{1 + 2 o})$, $\lambda_{ij} = \pi^2 (i^2 /
    H^2 + j^2 / W^2)$, $\tau_t = \frac{1}{2} \sigma_B^2 \sin^4(\frac{\pi}{2} t)$: paper,
    equation 11, with the schedules of the authors' code. There is already a little noise
    at time 0, $\alpha_0 < 1$; `encode` includes the factor $\sqrt{\alpha_0}$.

    The diffusion is $G^2_{ij} = -\alpha' / \alpha - 2 (1 - \alpha) D'_{ij} / D_{ij}$; the
    authors' code has a different expression, which it never uses.

    ??? cite "Reference"

        E. Hoogeboom, T. Salimans, *Blurring Diffusion Models*, ICLR 2023.

    **Arguments:**

    - `shape`: (height, width, channels) of one image.
    - `sigma_blur_max`: the strongest blur, in pixels.
    - `min_scale`: the fraction of the highest frequencies that remains.
    - `offset`: the offset of the noise schedule.
    - `t_min`, `t_end`: the end of sampling and of the time axis. Sampling starts at
        `t_max`, where the noise is 80 times the signal, or at `t_end` if that is earlier.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    sigma_blur_max: float = constant_field("sigma_blur_max", 10.0, check_not_negative)
    min_scale: float = constant_field("min_scale", 0.001)
    offset: float = constant_field("offset", 0.004, check_positive)
    t_min: float = constant_field("t_min", 1e-5)
    t_end: float = constant_field("t_end", 1.0)

    def __check_init__(self):
        self._blurring()

    basis = CosineBasis()

    @property
    def data_scale(self) -> float:
        return math.cos(self._unit * self.offset)

    @property
    def t_max(self) -> float:
        # Where noise is 80 times the signal, relative to time 0 (authors' code).
        signal = self.data_scale
        ratio = signal / (80 + math.sqrt(1 - signal**2))
        return min(math.atan2(1.0, ratio) / self._unit - self.offset, self.t_end)

    @property
    def t_zero_signal(self) -> float:
        return 1 + self.offset

    def _blurring(self) -> Blur:
        return Blur(self.shape, self.sigma_blur_max, self.min_scale, self.t_end)

    @property
    def _unit(self) -> float:
        return 0.5 * math.pi / (1 + 2 * self.offset)

    def _std(self, t):
        return jnp.sin(self._unit * (t + self.offset))

    def _cosine(self, t):
        """The square root of alpha, as a sine of the distance to the end: exact there."""
        # Add the offset last, or XLA would fold it into the 1.
        return jnp.sin(self._unit * (1 - t) + self._unit * self.offset)

    def _drift(self, t):
        speed = self._unit * self._std(t) / self._cosine(t)
        return -speed - self._blurring().fading(t)

    def _diffusion(self, t):
        # d(std^2)/dt = 2 F std^2 + G^2.
        std = self._std(t)
        growth = 2 * self._unit * std * self._cosine(t)
        return jnp.sqrt(growth - 2 * self._drift(t) * std**2)

    def _transition(self, t, s):
        signal = self._cosine(t) / self._cosine(s)
        blur = self._blurring()
        return signal * (blur.scale(t) / blur.scale(s))

    def _prior_factor(self):
        return jnp.ones(())
