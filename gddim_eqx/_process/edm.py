import math

import equinox as eqx
import jax.numpy as jnp

from .._misc import as_shape, check_positive, constant_field
from .gaussian_path import AbstractGaussianPath
from .ve import check_sigmas


class EDM(AbstractGaussianPath):
    r"""The path of EDM, $x_t = x_0 + t\,\epsilon$: time is the noise level $\sigma$.

    `gd.time_grid(process, n, "karras")` is the paper's time grid.

    ??? cite "Reference"

        T. Karras, M. Aittala, T. Aila, S. Laine, *Elucidating the Design Space of
        Diffusion-Based Generative Models*, NeurIPS 2022.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `sigma_min`, `sigma_max`: the noise levels at the end and the start of sampling.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    sigma_min: float = constant_field("sigma_min", 0.002, check_positive)
    sigma_max: float = constant_field("sigma_max", 80.0)

    def __check_init__(self):
        check_sigmas(self.sigma_min, self.sigma_max)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_end(self) -> float:
        return self.sigma_max

    t_zero_signal = math.inf

    def _signal(self, t):
        return jnp.ones_like(t)

    def _noise(self, t):
        return t
