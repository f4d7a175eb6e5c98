from typing import NamedTuple

import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Real

from .._custom_types import RealScalarLike, State
from .._linear import add, coefficient_dtype, combine, subtract
from .._misc import pin
from .._process import AbstractProcess
from .._term import LinearPart, real_time
from .coordinate import AbstractCoordinate
from .polynomial import integral
from .splitting import AbstractSplitting


class Exponential(NamedTuple):
    """What the dense output of a step is computed from."""

    # The state at the start of the step, after correction.
    start: State
    # The interpolation polynomial in the coordinate, scaled to 0 at the start and 1 at the
    # end: values, and for each the coefficients of the polynomial that multiplies it.
    values: list[State]
    polynomials: Inexact[Array, "nodes number"]
    # The coordinate at the end of the step.
    end: Real[Array, ""]
    direction: RealScalarLike
    equation: AbstractProcess | LinearPart
    splitting: AbstractSplitting
    coordinate: AbstractCoordinate


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The exponential integrator's solution within a step, to the solver's order."""

    t0: RealScalarLike
    t1: RealScalarLike
    y0: State
    y1: State
    exponential: Exponential

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> State:
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        e, dtype = self.exponential, coefficient_dtype(self.y0)
        number = e.polynomials.shape[1]
        times = self.t0, self.t1, t0
        s, end, t = (real_time(e.equation.t_end, x, e.direction, dtype) for x in times)
        c = e.splitting.integrate(e.equation, s, t, number, e.coordinate)
        fraction = e.coordinate.rescale(c.end, c.start, e.end)
        scales = jnp.stack([fraction**i for i in range(number)])
        shape, polynomials = e.equation.shape, e.polynomials * scales[None]
        y = add(
            combine(shape, [(c.linear, e.start)]),
            integral(shape, polynomials, c.moments, e.values),
        )
        # The previous step's dense output ends at the uncorrected state: fade the
        # difference out, so that dense output is continuous.
        rest = (end - t) / jnp.where(s == end, 1, end - s)

        def finish(y, y0, start, y1):
            return pin(t == end, y1, y + rest.astype(y.dtype) * (y0 - start))

        return jtu.tree_map(finish, y, self.y0, e.start, self.y1)


def interpolation(*, t0, t1, y0, y1, exponential=None) -> dfx.AbstractLocalInterpolation:
    """The exponential interpolation, or linear interpolation on reverse diffusions."""
    if exponential is None:
        return dfx.LocalLinearInterpolation(t0=t0, t1=t1, y0=y0, y1=y1)
    return ExponentialInterpolation(t0, t1, y0, y1, exponential)
