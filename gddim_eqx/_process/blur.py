import functools as ft

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from .tables import coarse_and_rest, nodes_of_panels, PiecewisePolynomial


class Blur(eqx.Module):
    r"""The fraction of each cosine coefficient of an image that remains at time $t$,
    $D_{ij}(t) = (1 - d)\,e^{-\lambda_{ij} \tau_t} + d$."""

    shape: tuple[int, ...] = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)
    min_scale: float = eqx.field(static=True)
    t_end: float = eqx.field(static=True)

    def __check_init__(self):
        if len(self.shape) != 3:
            raise ValueError(
                "`shape` must be (height, width, channels), as blurring acts on height "
                f"and width; got {self.shape}."
            )
        if not 0 < self.min_scale <= 1 or self.t_end > 1:
            raise ValueError(
                "`min_scale` must be positive, and `min_scale` and `t_end` at most 1; got "
                f"min_scale={self.min_scale} and t_end={self.t_end}."
            )

    def _dissipation(self) -> np.ndarray:
        height, width, _ = self.shape
        rows, columns = np.arange(height) / height, np.arange(width) / width
        return np.pi**2 * (rows[:, None, None] ** 2 + columns[None, :, None] ** 2)

    def _blur(self, t):
        """exp(-dissipation * tau), with the exponent in more than single precision: tau at
        the panel's edge, split into parts whose products are exact, plus the small
        difference from it."""
        table = _blur_time(self.sigma_max, self.t_end)
        edge_coarse, edge_rest, difference = table(t)
        parts = self._dissipation(), *coarse_and_rest(self._dissipation())
        dissipation, coarse, rest = (jnp.asarray(x, t.dtype) for x in parts)
        small = rest * edge_coarse + dissipation * (edge_rest + difference)
        # Not written as a product of exponentials, which XLA would merge.
        at_edge = jnp.exp(-coarse * edge_coarse)
        return at_edge + at_edge * jnp.expm1(-small)

    def scale(self, t: Array) -> Inexact[Array, "height width 1"]:
        """$D_{ij}$."""
        return (1 - self.min_scale) * self._blur(t) + self.min_scale

    def fading(self, t: Array) -> Inexact[Array, "height width 1"]:
        """$-D_{ij}' / D_{ij}$."""
        return jnp.sin(0.5 * np.pi * t) ** 2 * self._fading_over_square(t)

    def root_of_fading(self, t: Array) -> Inexact[Array, "height width 1"]:
        """The square root of `fading`, with derivative 0 where it is 0."""
        rest = self._fading_over_square(t)
        fades = rest > 0
        root = jnp.where(fades, jnp.sqrt(jnp.where(fades, rest, 1)), 0)
        return jnp.sin(0.5 * np.pi * t) * root

    def _fading_over_square(self, t):
        sine, cosine = jnp.sin(0.5 * np.pi * t), jnp.sin(0.5 * np.pi * (1 - t))
        speed = np.pi * self.sigma_max**2 * sine * cosine
        dissipation = jnp.asarray(self._dissipation(), t.dtype)
        blur = self._blur(t)
        return (1 - self.min_scale) * blur / self.scale(t) * dissipation * speed


@ft.lru_cache(maxsize=64)
def _blur_time(sigma_blur_max: float, t_end: float) -> PiecewisePolynomial:
    """tau_t on panels: the leading twelve bits of its value at the left edge, the rest of
    that value, and the difference from it."""
    edges = np.linspace(0, t_end, 65)
    degree = 9

    blur_time = lambda t: 0.5 * sigma_blur_max**2 * np.sin(0.5 * np.pi * t) ** 4
    at_edges = blur_time(edges[:-1])
    parts = np.stack(coarse_and_rest(at_edges), -1)
    difference = blur_time(nodes_of_panels(edges, degree)) - at_edges[:, None]
    constants = np.repeat(parts[:, None], degree + 1, axis=1)
    return PiecewisePolynomial(
        edges, np.concatenate([constants, difference[..., None]], -1)
    )
