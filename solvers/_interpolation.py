import diffrax as dfx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Real

from gddim_eqx._custom_types import RealScalarLike, State
from gddim_eqx._exponential import AbstractCoordinate, AbstractSplitting, scaled
from gddim_eqx._linear import coefficient_dtype, combine
from gddim_eqx._misc import pin
from gddim_eqx._process import AbstractProcess

from ._polynomial import weights


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The exponential integrator's own solution within a step, of the solver's order."""

    t0: RealScalarLike
    t1: RealScalarLike
    y0: State
    y1: State
    # What the corrector made of `y0`.
    corrected: State
    # The interpolation polynomial in the coordinate, 0 at `t0` and 1 at `t1`: values, and
    # by value the coefficients of what multiplies it.
    values: list[State]
    polynomials: Inexact[Array, "nodes number"]
    end: Real[Array, ""]
    direction: RealScalarLike
    process: AbstractProcess
    splitting: AbstractSplitting
    coordinate: AbstractCoordinate

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> State:
        del left
        if t1 is not None:
            return jtu.tree_map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        dtype, number = coefficient_dtype(self.y0), self.polynomials.shape[1]
        start, end, t = (
            jnp.asarray(x * self.direction, dtype) for x in (self.t0, self.t1, t0)
        )
        c = self.splitting.integrate(self.process, start, t, number, self.coordinate)
        fraction = scaled(c.end, c.start, self.end)
        scales = jnp.stack([fraction**i for i in range(number)])
        coefficients = weights(self.polynomials * scales[None], c.moments)
        pairs = [(c.linear, self.corrected), *zip(coefficients, self.values)]
        y = combine(self.process.shape, pairs)
        # Begin where the previous step ended.
        rest = (end - t) / jnp.where(start == end, 1, end - start)

        def finish(y, y0, corrected, y1):
            y = y + rest.astype(y.dtype) * (y0 - corrected)
            return pin(t == end, y1, y)

        return jtu.tree_map(finish, y, self.y0, self.corrected, self.y1)


def interpolation(*, t0, t1, y0, y1, **exponential) -> dfx.AbstractLocalInterpolation:
    """Linear interpolation, on reverse diffusions; else the exponential one."""
    if exponential:
        return ExponentialInterpolation(t0, t1, y0, y1, **exponential)
    return dfx.LocalLinearInterpolation(t0=t0, t1=t1, y0=y0, y1=y1)
