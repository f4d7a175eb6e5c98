import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._misc import as_shape, check_positive, constant_field
from .gaussian_path import AbstractGaussianPath
from .time_axis import as_time


class RectifiedFlow(AbstractGaussianPath):
    r"""The straight path of rectified flow and flow matching,
    $x_t = (1 - \sigma_t)\,x_0 + \sigma_t\,\epsilon$, with $\sigma_t = t$ by default. Noise
    is at t = 1, and data are at t = 0.

    With a `shift` $k$, as in many image models, $\sigma_t = k t / (1 + (k - 1) t)$. The
    networks of such models are called with $\sigma_t$, which `process.sigma(t)` returns, or
    a multiple of it: pass `lambda t: 1000 * process.sigma(t)` to [`gddim_eqx.WithTime`][].

    At t = 1 there is no signal, so models must predict the `"flow"`, the data or `"v"`. The
    flow is $\epsilon - x_0$ for every shift: the derivative of the path in $\sigma$.

    ??? cite "Reference"

        X. Liu, C. Gong, Q. Liu, *Flow Straight and Fast: Learning to Generate and Transfer
        Data with Rectified Flow*, ICLR 2023. Shift: P. Esser et al., *Scaling Rectified
        Flow Transformers for High-Resolution Image Synthesis*, ICML 2024.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `shift`: values greater than 1 shift times towards noise.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    shift: float = constant_field("shift", 1.0, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    t_zero_signal = 1.0

    def sigma(self, t):
        r"""The noise level $\sigma_t$."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def flow_speed(self, t):
        return self.shift / (1 + (self.shift - 1) * as_time(t)) ** 2

    def _signal(self, t):
        return (1 - t) / (1 + (self.shift - 1) * t)

    def _noise(self, t):
        return self.sigma(t)


class TrigonometricFlow(AbstractGaussianPath):
    r"""The variance-preserving path
    $x_t = \cos(\tfrac{\pi}{2} t)\,x_0 + \sin(\tfrac{\pi}{2} t)\,\epsilon$.

    At t = 1 there is no signal, so models must predict `"v"`, the `"flow"` (which is `"v"`
    times $\tfrac{\pi}{2}$) or the data.

    ??? cite "Reference"

        M. S. Albergo, E. Vanden-Eijnden, *Building Normalizing Flows with Stochastic
        Interpolants*, ICLR 2023.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    t_zero_signal = 1.0

    # The cosine, as the sine of the distance to t = 1: exact there.

    def _signal(self, t):
        return jnp.sin(0.5 * np.pi * (1 - t))

    def _noise(self, t):
        return jnp.sin(0.5 * np.pi * t)
