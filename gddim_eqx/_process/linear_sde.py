from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike

from .._basis import AbstractBasis, Identity
from .._operator import BlockLinearOperator
from .._piecewise import (
    integration_matrix,
    panel_nodes,
    PiecewisePolynomial,
    to_chebyshev,
)
from .base import AbstractProcess, as_shape, as_time, as_times, check_positive


class LinearSDE(AbstractProcess):
    r"""Any linear diffusion, from its drift $F_t$ and diffusion $G_t$ alone.

    Transition, covariance and both factors come from ordinary differential equations,
    the factor from equation 17 of the paper. They are solved once, on the host and in
    float64 whatever JAX's default, by spectral collocation on panels that are refined
    until rounding errors remain, and kept as piecewise polynomials.

    The square root $R_t$ is determined up to a constant rotation. It equals the Cholesky
    factor at time 0; if the initial covariance is singular, so that no such start exists,
    at `t_min / 1000`. Before that time the factors are then interpolated in the square
    root of time.

    !!! example

        ```python
        import gddim_eqx as gd

        slow_start = gd.LinearSDE((2,), lambda t: -5 * t, lambda t: (10 * t) ** 0.5)
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    basis: AbstractBasis
    data_scale: float = eqx.field(static=True)
    t_min: float = eqx.field(static=True)
    t_max: float = eqx.field(static=True)
    t_end: float = eqx.field(static=True)
    t_vanish: float = eqx.field(static=True)
    _solution: "_Solution" = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        drift: Callable,
        diffusion: Callable,
        initial_covariance: ArrayLike | BlockLinearOperator | None = None,
        *,
        basis: AbstractBasis | None = None,
        data_scale: float = 1.0,
        t_min: float = 1e-3,
        t_max: float | None = None,
        t_end: float = 1.0,
    ):
        r"""**Arguments:**

        - `shape`: the shape of one data sample.
        - `drift`, `diffusion`: from a scalar time to $F_t$ and $G_t$. Each is a
            [`gddim_eqx.BlockLinearOperator`][]; or an array of its blocks, `(n, n)` or
            `(n, n, *spectrum)`, for states of `n` components; or a scalar, for `n = 1`.
            They must be smooth on [0, t_end] and compute in the dtype of their argument.
        - `initial_covariance`: $\Sigma_0$, in the same form, constant; by default zero.
        - `basis`: the basis in which states are kept; by default the data's own.
        - `data_scale`: the mean of the state at time 0 is this times the data.
        - `t_min`, `t_max`: the sampling interval; `t_max` is `t_end` by default.
        - `t_end`: the end of the time axis.

        States of two components are a [`gddim_eqx.Phase`][], those of more a tuple. The
        first component carries the data.

        **Raises:** `ValueError` if the shapes do not fit, the times are not in order, the
        coefficients are not finite or not smooth, or the covariance is not positive
        definite for times after 0.
        """
        check_positive(t_min=t_min, data_scale=data_scale)
        t_max = t_end if t_max is None else t_max
        if not t_min < t_max <= t_end:
            raise ValueError(
                f"Need t_min < t_max <= t_end; got {t_min}, {t_max} and {t_end}."
            )
        self.shape = as_shape(shape)
        self.basis = Identity() if basis is None else basis
        self.data_scale = float(data_scale)
        self.t_min, self.t_max, self.t_end = float(t_min), float(t_max), float(t_end)
        self.t_vanish = float("inf")
        self._solution = _Solution(
            self.shape, drift, diffusion, initial_covariance, self.t_min, self.t_end
        )
        self.num_components = self._solution.num_components

    def _operator(self, blocks, tags: object = frozenset()) -> BlockLinearOperator:
        return BlockLinearOperator(blocks, self.shape, tags)

    def drift(self, t):
        t = as_time(t)
        return self._operator(_blocks(self._solution.drift(t), t.dtype))

    def diffusion(self, t):
        t = as_time(t)
        return self._operator(_blocks(self._solution.diffusion(t), t.dtype))

    def transition(self, t, s):
        t, s = as_times(t, s)
        within, between = self._solution.within, self._solution.between
        between = jnp.asarray(between, t.dtype)[within.panel(t), within.panel(s)]
        before = self._operator(within(s)).inverse()
        return self._operator(within(t)) @ self._operator(between) @ before

    def covariance(self, t):
        cholesky = self.cholesky(t)
        covariance = cholesky @ cholesky.T
        return self._operator(covariance.blocks, lx.positive_semidefinite_tag)

    def cholesky(self, t):
        t = as_time(t)
        blocks = self._solution.cholesky(t)
        return self._operator(blocks, lx.lower_triangular_tag)

    def factor(self, t):
        t = as_time(t)
        return self.cholesky(t) @ self._operator(self._solution.rotation(t))

    def prior_factor(self):
        return self.cholesky(self.t_max)


def _blocks(value, dtype) -> Array:
    """The blocks of a drift, diffusion or covariance in any of the accepted forms."""
    if isinstance(value, BlockLinearOperator):
        value = value.blocks
    value = jnp.asarray(value, dtype)
    return value[None, None] if value.ndim == 0 else value


_DEGREE = 15
_TOLERANCE = 1e-13
# Where no accuracy is promised, and a velocity alone has had time to gather noise.
_TOLERANCE_EARLY = 1e-9
_SMALLEST = 1e-6


class _Solution:
    """The tables of a `LinearSDE`, and the functions they came from.

    A constant that compares and hashes by identity, for the reasons of
    `PiecewisePolynomial`.
    """

    num_components: int
    within: PiecewisePolynomial  # Psi(t, left edge of t's panel)
    between: np.ndarray  # (panels, panels, n, n, *spectrum): Psi(edge, edge)
    rotation: PiecewisePolynomial  # L^-1 R

    def __init__(self, shape, drift, diffusion, initial_covariance, t_min, t_end):
        self.drift, self.diffusion = drift, diffusion
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            starting = [drift(jnp.zeros(())), diffusion(jnp.zeros(()))]
            starting = [np.asarray(_blocks(x, np.float64)) for x in starting]
            if initial_covariance is not None:
                starting.append(np.asarray(_blocks(initial_covariance, np.float64)))
        spectrum, n = (), starting[0].shape[0]
        for name, value in zip(("drift", "diffusion", "initial_covariance"), starting):
            if value.shape[:2] != (n, n):
                raise ValueError(
                    f"`{name}` must be made of {n} x {n} blocks, like the drift; got an "
                    f"array of shape {value.shape}."
                )
            BlockLinearOperator(jnp.asarray(value), shape)  # checks the spectrum
            spectrum = np.broadcast_shapes(spectrum, value.shape[2:])
        self.num_components = n
        # On the host the blocks come last.
        batch = (*spectrum, n, n)

        def to_host(blocks, times):
            blocks = np.asarray(blocks).reshape(
                len(times), n, n, *(blocks.shape[3:] or (1,) * len(spectrum))
            )
            blocks = np.moveaxis(blocks, (1, 2), (-2, -1))
            return np.broadcast_to(blocks, (len(times), *batch))

        @jax.jit
        @jax.vmap
        def coefficients(t):
            return [_blocks(fn(t), np.float64) for fn in (drift, diffusion)]

        def evaluate(times):
            with jax.ensure_compile_time_eval(), jax.enable_x64(True):
                out = coefficients(jnp.asarray(times, np.float64))
                f, g = (to_host(x, times) for x in out)
            if not (np.isfinite(f).all() and np.isfinite(g).all()):
                raise ValueError(
                    "The drift and diffusion must be finite on the whole of "
                    f"[0, {t_end}]; they are not near t = {float(times[0]):.3g}."
                )
            return f, g @ _T(g)

        covariance = np.zeros(batch)
        if initial_covariance is not None:
            covariance = covariance + to_host(starting[2][None], [0])[0]
        eigenvalues = np.linalg.eigvalsh(covariance)
        if not (eigenvalues >= -1e-12 * np.abs(eigenvalues).max(initial=0)).all():
            raise ValueError("`initial_covariance` must be positive semi-definite.")
        singular = bool((eigenvalues <= 0).any())

        start = t_min / 1000
        doublings = int(np.log2(t_end / start))
        edges = [0.0, *(start * 2.0 ** np.arange(doublings)), t_end]
        todo = list(zip(edges[:-1], edges[1:]))[::-1]
        rotation = None if singular else np.broadcast_to(np.eye(n), batch)
        panels: list[_Panel] = []
        while todo:
            left, right = todo.pop()
            tolerance = _TOLERANCE if right > t_min else _TOLERANCE_EARLY
            panel = _Panel(evaluate, left, right, covariance, rotation, tolerance)
            if not panel.resolved:
                if right - left < _SMALLEST * t_end:
                    raise ValueError(
                        "The drift and diffusion must be smooth, and the covariance "
                        "positive definite after time 0; neither could be resolved near "
                        f"t = {left:.6g}."
                    )
                middle = 0.5 * (left + right)
                todo += [(middle, right), (left, middle)]
                continue
            panels.append(panel)
            covariance, rotation = panel.covariance_end, panel.rotation_end

        edges = np.array([panel.left for panel in panels] + [t_end])

        def table(values):
            values = np.moveaxis(np.stack(values), (-2, -1), (2, 3))
            return PiecewisePolynomial(edges, values)

        self.within = table([panel.within for panel in panels])
        self.rotation = table([panel.rotation for panel in panels])
        self._cholesky = table([panel.cholesky for panel in panels])
        self._early = float(edges[1]) if singular else 0.0
        self._early_ends = [
            np.moveaxis(x, (-2, -1), (0, 1))
            for x in (panels[0].cholesky_start, panels[0].cholesky_end)
        ]
        steps = [panel.within_end for panel in panels[:-1]]
        between = np.empty((len(panels), len(panels), *batch))
        for j in range(len(panels)):
            between[j, j] = np.eye(n)
            for i in range(j + 1, len(panels)):
                between[i, j] = steps[i - 1] @ between[i - 1, j]
                between[j, i] = np.linalg.inv(between[i, j])
        self.between = np.moveaxis(between, (-2, -1), (2, 3))

    def cholesky(self, t: Array) -> Array:
        value = self._cholesky(t)
        if not self._early:
            return value
        start, end = (jnp.asarray(x, t.dtype) for x in self._early_ends)
        early = t < self._early
        fraction = jnp.sqrt(jnp.where(early, t / self._early, 1))
        return jnp.where(early, start + (end - start) * fraction, value)


class _Panel:
    """The solution on one panel: at its nodes, and at its right end."""

    def __init__(self, evaluate, left, right, covariance, rotation, tolerance):
        self.left, self.rotation_end = left, rotation
        nodes = left + (right - left) * (1 + panel_nodes(_DEGREE)) / 2
        integrate = integration_matrix(_DEGREE) * (right - left) / 2
        drift, noise = evaluate(nodes)
        eye = np.broadcast_to(np.eye(drift.shape[-1]), drift.shape[1:])
        within = _collocate(drift, eye, integrate)
        inverse = np.linalg.inv(within[:-1])
        added = inverse @ noise @ _T(inverse)
        added = np.tensordot(integrate, added, 1)
        covariances = within @ (covariance + added) @ _T(within)
        self.within, self.within_end = within[:-1], within[-1]
        self.covariance_end = 0.5 * (covariances[-1] + _T(covariances[-1]))

        first = rotation is None
        cholesky = _cholesky(covariances)
        self.cholesky_start, self.cholesky_end = _cholesky(covariance), cholesky[-1]
        if not (np.diagonal(cholesky, axis1=-2, axis2=-1) > 0).all():
            self.resolved = False
            return
        if first:
            # The factors have no polynomial here: see `_Solution.cholesky`.
            cholesky = np.broadcast_to(cholesky[-1], cholesky.shape)
            rotations = np.broadcast_to(eye, cholesky.shape)
        else:
            precision = np.linalg.inv(cholesky[:-1])
            precision = _T(precision) @ precision
            turning = drift + 0.5 * noise @ precision
            factor = _collocate(turning, self.cholesky_start @ rotation, integrate)
            rotations = np.linalg.solve(cholesky, factor)
        self.cholesky, self.rotation = cholesky[:-1], rotations[:-1]
        self.resolved = all(
            _is_resolved(x, tolerance)
            for x in (drift, noise, self.within, self.cholesky, self.rotation)
        )
        if self.resolved:
            # The nearest rotation, so that rounding errors do not add up.
            left_vectors, _, right_vectors = np.linalg.svd(rotations[-1])
            self.rotation_end = left_vectors @ right_vectors


def _collocate(drift, initial, integrate):
    """Solve Y' = drift Y from `initial` by collocation: Y at the nodes and the end."""
    number, n = drift.shape[0], drift.shape[-1]
    # [..., i, a, j, b] = integrate[i, j] drift[j, a, b]
    system = -np.einsum("ij,j...ab->...iajb", integrate[:-1], drift)
    size = number * n
    system = system.reshape(*system.shape[:-4], size, size) + np.eye(size)
    right = np.broadcast_to(
        initial[..., None, :, :], (*initial.shape[:-2], number, n, n)
    ).reshape(*initial.shape[:-2], size, n)
    solution = np.linalg.solve(system, right)
    solution = np.moveaxis(solution.reshape(*right.shape[:-2], number, n, n), -3, 0)
    end = initial + np.tensordot(integrate[-1], drift @ solution, 1)
    return np.concatenate([solution, end[None]])


def _cholesky(matrices):
    """The Cholesky factor, of positive semi-definite matrices too; `nan` for others."""
    n = matrices.shape[-1]
    factor = np.zeros_like(matrices)
    with np.errstate(invalid="ignore", divide="ignore"):
        for j in range(n):
            rest = matrices - factor @ _T(factor)
            pivot = np.sqrt(rest[..., j, j])
            column = rest[..., j:, j] / np.where(pivot == 0, 1, pivot)[..., None]
            factor[..., j:, j] = column
            factor[..., j, j] = pivot
    return factor


def _is_resolved(values, tolerance):
    """Whether the Chebyshev series through values at nodes has ended, row by row."""
    if not np.isfinite(values).all():
        return False
    coefficients = np.abs(np.tensordot(to_chebyshev(_DEGREE), values, 1))
    scale = np.abs(values).max(axis=(0, -1), keepdims=True)
    return bool((coefficients[-2:] <= tolerance * scale).all())


def _T(x):
    return np.swapaxes(x, -1, -2)
