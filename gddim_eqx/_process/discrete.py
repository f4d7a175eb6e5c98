import functools as ft
import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Inexact, Real

from .._misc import as_floats, as_shape, pin, show
from .gaussian_path import AbstractGaussianPath
from .tables import nodes_of_panels, PiecewisePolynomial


class DiscreteVP(AbstractGaussianPath):
    r"""The variance-preserving process of a discrete-time model,
    $x_i = \sqrt{\bar\alpha_i}\,x_0 + \sqrt{1 - \bar\alpha_i}\,\epsilon$ for
    $i = 0, \dots, N - 1$, in continuous time.

    Index $i$ corresponds to time $(i + 1) / N$, and the data to time 0. Between these times
    $\arccos^2 \sqrt{\bar\alpha}$ is interpolated by monotone cubic polynomials, so the
    process is exact at the $N$ indices and smooth elsewhere. With zero-terminal SNR,
    $\bar\alpha_{N-1} = 0$, models must predict the data, `"v"` or the `"flow"`.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    # Not in the repr, where a thousand numbers hide the rest.
    alphas_cumprod: tuple[float, ...] = eqx.field(static=True, repr=False)

    def __init__(
        self, shape: tuple[int, ...] | int, alphas_cumprod: ArrayLike | list | tuple
    ):
        r"""**Arguments:**

        - `shape`: the shape of one data sample.
        - `alphas_cumprod`: $\bar\alpha_i$, strictly decreasing, in (0, 1); the last may be
            zero.

        **Raises:** `ValueError` for any other values.
        """
        alphas = as_list("alphas_cumprod", alphas_cumprod)
        before = np.append(1.0, alphas[:-1])
        decreasing = (0 <= alphas) & (alphas < before)
        if not decreasing.all():
            worst = int(np.argmin(decreasing))
            raise ValueError(
                "`alphas_cumprod`, the products of one minus `betas`, must decrease "
                f"strictly, from less than 1 to at least 0; at index {worst} it is "
                f"{alphas[worst]}, after {before[worst]}."
            )
        self.shape = as_shape(shape)
        self.alphas_cumprod = tuple(alphas.tolist())

    @property
    def t_min(self) -> float:
        return 1 / len(self.alphas_cumprod)

    t_end = 1.0

    @property
    def t_zero_signal(self) -> float:
        return 1.0 if self.alphas_cumprod[-1] == 0 else math.inf

    def time(self, index: Real[ArrayLike, "*some"]) -> Inexact[Array, "*some"]:
        """The time of an index, which may be fractional.

        **Raises:** `ValueError` for an index below 0 or above the last, unless traced.
        """
        index, last = as_floats("index", index), len(self.alphas_cumprod) - 1
        if not isinstance(index, Tracer) and not ((index >= 0) & (index <= last)).all():
            raise ValueError(f"`index` must be from 0 to {last}; got {show(index)}.")
        return (index + 1.0) / (last + 1)

    def index(self, t: Real[ArrayLike, "*some"]) -> Inexact[Array, "*some"]:
        """The index at a time: the time input of the networks of discrete-time models.

        **Raises:** `ValueError` for a time before that of index 0, or after that of the
        last, unless traced: it then gets the nearest of these.
        """
        index = as_floats("t", t) * len(self.alphas_cumprod) - 1.0
        whole = jnp.round(index)
        # Exactly an integer where the time is that of an index up to rounding.
        tolerance = 4 * len(self.alphas_cumprod) * jnp.finfo(index.dtype).eps
        index = pin(jnp.abs(index - whole) < tolerance, whole, index)
        last = len(self.alphas_cumprod) - 1
        inside = jnp.clip(index, 0, last)
        if not isinstance(index, Tracer) and not (index == inside).all():
            raise ValueError(
                f"`t` must be from {self.t_min}, the time of index 0, to 1, that of index "
                f"{last}: other times have no index; got {t}."
            )
        return pin(index != inside, inside, index)

    def time_of_sigma(
        self, sigma: Float[np.ndarray, " levels"]
    ) -> Float[np.ndarray, " levels"]:
        """The time at which the noise-to-signal ratio has a given value, on the host and
        in double precision; the nearest end of the time axis if there is none."""
        table, target = _interpolated(self.alphas_cumprod), np.arctan(sigma) ** 2
        low, high = np.zeros_like(target), np.ones_like(target)
        for _ in range(60):
            middle = 0.5 * (low + high)
            later = table(middle)[..., 0] < target
            low, high = np.where(later, middle, low), np.where(later, high, middle)
        # Exactly the time of an index where it is that up to rounding.
        scaled, number = high * len(self.alphas_cumprod), len(self.alphas_cumprod)
        whole = np.round(scaled)
        return np.where(np.abs(scaled - whole) < 1e-9, whole / number, high)

    def _squares(self, t):
        """The square of the angle, and its difference from that of pure noise."""
        angle, rest = _squared_angle(self.alphas_cumprod)(t)
        # Zero at the start, not a rounding error of either sign.
        return jnp.where(t > 0, jnp.where(angle > 0, angle, 0), 0), rest

    def _signal(self, t):
        angle, rest = self._squares(t)
        early = angle < 0.1
        # The cosine, as the sine of the distance to pure noise: exact there.
        late = jnp.sin(rest / (0.5 * math.pi + jnp.sqrt(jnp.where(early, 1, angle))))
        # A series in the squared angle, whose root has no derivative at the start.
        series = 1.0
        for k in range(5, 0, -1):
            series = 1 - angle / (2 * k * (2 * k - 1)) * series
        return jnp.where(early, series, late)

    def _noise(self, t):
        return jnp.sin(jnp.sqrt(self._squares(t)[0]))

    def _diffusion(self, t):
        # Valid also at the start, where the noise has an infinite derivative.
        return jnp.sqrt(-2 * self._drift(t))

    def _prior_factor(self):
        return jnp.ones(())


@ft.lru_cache(maxsize=64)
def _squared_angle(alphas_cumprod: tuple[float, ...]) -> PiecewisePolynomial:
    edges = np.linspace(0, 1, len(alphas_cumprod) + 1)
    values = _interpolated(alphas_cumprod)(nodes_of_panels(edges, 3))
    return PiecewisePolynomial(edges, values)


@ft.lru_cache(maxsize=64)
def _interpolated(alphas_cumprod: tuple[float, ...]) -> Callable[[np.ndarray], np.ndarray]:
    from scipy.interpolate import PchipInterpolator  # takes long to import

    alphas = np.concatenate([[1.0], alphas_cumprod])
    # The arctangent, as neither arccosine nor arcsine is accurate at both ends.
    angles = np.arctan2(np.sqrt(1 - alphas), np.sqrt(alphas))
    rests = np.arctan2(np.sqrt(alphas), np.sqrt(1 - alphas))
    values = np.stack([angles**2, rests * (0.5 * np.pi + angles)], axis=-1)
    return PchipInterpolator(np.linspace(0, 1, len(alphas)), values)


def as_list(name: str, values) -> Float[np.ndarray, " N"]:
    """A list of numbers, at least two, on the host and in double precision."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(())
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` must be a list of at least two finite numbers; got {show(values)}."
        )
    return array
