from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .edge_transitions import edge_transitions
from .linear_sde_coefficients import Coefficients
from .tables import (
    differentiation_matrix,
    integration_matrix,
    panel_nodes,
    PiecewisePolynomial,
    to_chebyshev,
)


_DEGREE = 15
# The relative error, and the largest relative rounding errors of the coefficients that are
# tolerated; and those before `t_min`, where no accuracy is promised, and only a velocity
# has had time to accumulate noise.
_LIMITS, _LIMITS_EARLY = (1e-13, 1e-6), (1e-9, 1e-2)
# Relative to time. The width of a narrower panel would be comparable to rounding errors.
_NARROWEST = 2.0**-36
_MOST_PANELS = 1024


class Solution:
    r"""The tables of a `LinearSDE`, and the functions they were computed from.

    A constant that compares and hashes by identity, for the same reasons as
    `PiecewisePolynomial`: `within`, the transition from the left edge of the panel of a
    time, and `rotation`, $L^{-1} R$.
    """

    def __init__(self, coefficients: Coefficients, t_min: float, t_end: float):
        self.drift, self.diffusion = coefficients.drift, coefficients.diffusion
        with np.errstate(all="ignore"):
            singular = _is_singular(coefficients.initial_covariance)
            edges, panels = _solve(coefficients, singular, t_min, t_end)
            steps = np.stack([panel.within[-1] for panel in panels[:-1]])
            self._between = edge_transitions(steps)

        def table(values):
            values = np.moveaxis(np.stack(values)[:, :-1], (-2, -1), (2, 3))
            return PiecewisePolynomial(edges, values)

        self.within = table([panel.within for panel in panels])
        self.rotation = table([panel.rotation for panel in panels])
        self._cholesky = table([panel.cholesky for panel in panels])
        self._early = float(edges[1]) if singular else 0.0
        ends = _cholesky(coefficients.initial_covariance), panels[0].cholesky[-1]
        self._early_ends = [np.moveaxis(x, (-2, -1), (0, 1)) for x in ends]

    def between(self, t: Array, s: Array) -> Array:
        """The transition from the left edge of the panel of `s` to that of `t`. Overflow
        saturates at the largest number of the dtype."""
        largest = float(jnp.finfo(t.dtype).max)
        table = np.clip(self._between, -largest, largest).astype(t.dtype)
        return jnp.asarray(table)[self.within.panel(t), self.within.panel(s)]

    def cholesky(self, t: Array) -> Array:
        value = self._cholesky(t)
        if not self._early:
            return value
        start, end = (jnp.asarray(x, t.dtype) for x in self._early_ends)
        early = t < self._early
        fraction = jnp.sqrt(jnp.where(early, t / self._early, 1))
        return jnp.where(early, start + (end - start) * fraction, value)


class _Panel(NamedTuple):
    """The solution on one panel: at its nodes, and in the last row at its right end."""

    within: np.ndarray
    cholesky: np.ndarray
    rotation: np.ndarray
    # At the right end.
    covariance: np.ndarray


def _solve(
    coefficients: Coefficients, singular: bool, t_min: float, t_end: float
) -> tuple[np.ndarray, list[_Panel]]:
    """Solve on panels, halving each until it is resolved. Returns their edges too."""
    covariance = coefficients.initial_covariance
    rotation = np.broadcast_to(np.eye(coefficients.num_components), coefficients.batch)
    rotation = None if singular else rotation
    start = t_min / 1000
    doublings = int(np.log2(t_end / start))
    todo = [t_end, *(start * 2.0 ** np.arange(doublings))[::-1]]
    edges, panels = [0.0], []
    while todo:
        left, right = edges[-1], todo[-1]
        limits = _LIMITS_EARLY if right <= t_min else _LIMITS
        try:
            panel = _solve_panel(coefficients, left, right, covariance, rotation, limits)
        except ValueError as error:  # The panel is too wide.
            if right - left < _NARROWEST * right or right < _NARROWEST * start:
                raise
            if len(panels) + len(todo) > _MOST_PANELS:
                raise ValueError(
                    f"The process changes too often on [0, {t_end:g}] to be tabulated: "
                    f"{len(panels)} panels only reach t = {left:.6g}. End the time axis "
                    "earlier, or let states decay or rotate fewer times along it. At this "
                    f"time: {error}"
                ) from error
            todo.append(0.5 * (left + right))
            continue
        panels.append(panel)
        edges.append(todo.pop())
        covariance, rotation = panel.covariance, panel.rotation[-1]
    return np.array(edges), panels


def _solve_panel(coefficients, left, right, covariance, rotation, limits) -> _Panel:
    """**Raises:** `ValueError` if polynomials do not suffice, or there is no solution."""
    width, eye, near = right - left, np.eye(coefficients.num_components), f"{left:.6g}"
    integrate = integration_matrix(_DEGREE) * width / 2
    values = _at_nodes(coefficients, left, right)
    drift, noise = values["drift"], values["diffusion"]

    # Errors of the coefficients are tolerated if they do not affect the solution.
    within = _collocate(drift, np.broadcast_to(eye, drift.shape[1:]), integrate)
    inverse = np.linalg.inv(within[:-1])
    added = np.tensordot(integrate, inverse @ noise @ inverse.mT, 1)
    covariances = within @ (covariance + added) @ within.mT
    spread = np.nan_to_num(np.sqrt(np.linalg.diagonal(covariances[-1])))
    negligible = dict(
        drift=np.nan_to_num(spread / spread.max(-1, keepdims=True)),
        diffusion=spread * spread.min(-1, keepdims=True),
    )
    tolerance = _check_coefficients(coefficients, left, right, values, negligible, *limits)
    _check_resolved(f"The transition near t = {near}", within[:-1], tolerance)

    if not np.isfinite(covariances).all():
        raise ValueError(
            f"The covariance overflows near t = {near}, as `drift` lets it grow for too "
            "long. End the time axis earlier."
        )
    cholesky = _cholesky(covariances)
    if not (np.linalg.diagonal(cholesky) > 0).all():
        raise ValueError(
            "The covariance must be positive definite after time 0, but it is not near "
            f"t = {near}: through `diffusion` and `drift`, noise must reach every "
            "component. If it does, give those that it reaches last some variance at time "
            "0, such as 1e-6, by `initial_covariance`."
        )
    if rotation is None:
        # No polynomials for the square roots here: see `Solution.cholesky`.
        rotations = np.broadcast_to(eye, cholesky.shape)
        cholesky = np.broadcast_to(cholesky[-1], cholesky.shape)
    else:
        rotations = _rotations(
            drift, noise, cholesky, _cholesky(covariance) @ rotation, integrate
        )
    _check_resolved(f"The covariance near t = {near}", cholesky[:-1], tolerance)
    _check_resolved(f"The factor R near t = {near}", rotations[:-1], tolerance)
    # The nearest rotation, so that rounding errors do not accumulate.
    left_vectors, _, right_vectors = np.linalg.svd(rotations[-1])
    rotations = np.append(rotations[:-1], (left_vectors @ right_vectors)[None], axis=0)
    symmetric = 0.5 * (covariances[-1] + covariances[-1].mT)
    return _Panel(within, cholesky, rotations, symmetric)


def _rotations(drift, noise, cholesky, start, integrate):
    """L^-1 R at the nodes and the end, by equation 17 of the paper from R = `start`."""
    # In units of each component's standard deviation, which may have any scale.
    unit = np.linalg.norm(cholesky[-1], axis=-1, keepdims=True)
    drift, noise = drift * unit.mT / unit, noise / (unit * unit.mT)
    cholesky = cholesky / unit
    precision = np.linalg.inv(cholesky[:-1])
    precision = precision.mT @ precision
    turning = drift + 0.5 * noise @ precision
    return np.linalg.solve(cholesky, _collocate(turning, start / unit, integrate))


def _at_nodes(coefficients, left, right):
    """The coefficients at the exact nodes of a panel rather than at the nearest
    floating-point numbers, which matters close to singularities."""
    half = (right - left) / 2
    offsets = half * (1 + panel_nodes(_DEGREE))
    times = left + offsets
    missed = (offsets - (times - left)) / half
    to_node = missed[:, None] * differentiation_matrix(_DEGREE)
    values = coefficients(times)
    return {k: v + np.tensordot(to_node, v, 1) for k, v in values.items()}


def _check_coefficients(coefficients, left, right, values, negligible, tolerance, most):
    """Raise `ValueError` if a coefficient is unresolved. Returns the tolerance for the
    solution, which rounding errors of the coefficients may increase."""
    solution_tolerance = tolerance
    for name, value in values.items():
        tail, scale = _tail(value)
        floor = negligible[name] / (right - left)
        allowed = tolerance * scale + 4 * np.finfo(np.float64).eps * floor
        if (tail <= allowed).all():
            continue
        scale, rounding = np.maximum(scale, floor), np.zeros(1)
        if (tail <= most * scale).all():
            # Ten times the median, as rounding errors grow towards singularities.
            rounding = 10 * coefficients.rounding_errors(left, right)[name]
        relative = float((rounding / scale).max())
        if not (tail <= np.maximum(allowed, rounding)).all() or relative > most:
            raise ValueError(
                f"`{name}` could not be resolved near t = {left:.6g}. It must be smooth on "
                "[0, t_end] to full precision: it must compute in its argument's dtype, "
                "nothing in it may cancel (write `1 - jnp.exp(-t)` as `-jnp.expm1(-t)`), "
                "and the time axis must end before any singularity."
            )
        solution_tolerance += relative
    return solution_tolerance


def _check_resolved(name, values, tolerance):
    tail, scale = _tail(values)
    if not (tail <= tolerance * scale).all():
        raise ValueError(f"{name} could not be resolved: it changes too fast.")


def _tail(values):
    """The last coefficients of the Chebyshev series through values at nodes, and the
    largest value, row by row."""
    coefficients = np.abs(np.tensordot(to_chebyshev(_DEGREE)[-2:], values, 1))
    return coefficients.max(axis=(0, -1)), np.abs(values).max(axis=(0, -1))


def _is_singular(covariance):
    """Whether a component is determined by the preceding ones."""
    rest, variances = (
        np.linalg.diagonal(_cholesky(covariance)),
        np.linalg.diagonal(covariance),
    )
    return not (rest > 1e-7 * np.sqrt(variances)).all()


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
    """The Cholesky factor of positive semi-definite matrices; `nan` for others."""
    n = matrices.shape[-1]
    factor = np.zeros_like(matrices)
    for j in range(n):
        rest = matrices - factor @ factor.mT
        pivot = np.sqrt(rest[..., j, j])
        column = rest[..., j:, j] / np.where(pivot == 0, 1, pivot)[..., None]
        factor[..., j:, j] = column
        factor[..., j, j] = pivot
    return factor
