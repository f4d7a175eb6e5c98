from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._custom_types import Args, State
from .._misc import pin
from .._process import AbstractProcess
from .._term import ProbabilityFlow
from .coordinate import reading, Variable
from .moments import data_step, moments, regular_ends
from .reverse_transition import Contraction


class Splitting(eqx.Module):
    """Which part of the equation a step solves exactly, and of what it takes polynomials
    in which variable. It has no leaves."""

    process: AbstractProcess
    space: Literal["data", "noise"] = eqx.field(static=True)
    factor: Literal["R", "cholesky"] = eqx.field(static=True)
    variable: Variable = eqx.field(static=True)

    # Compiled by themselves because Diffrax traces each step several times.
    @eqx.filter_jit
    def read(
        self, times: Inexact[Array, " times"], s: Array, t: Array
    ) -> Inexact[Array, " times"]:
        """The variable of a step from `s` to `t` at some times."""
        return jax.vmap(reading(self.process, self.variable, s, t))(times)

    def predict(self, flow: ProbabilityFlow, t: Array, y: State, args: Args) -> State:
        """One evaluation of the model."""
        if self.space == "data":
            return flow.initial(t, y, args)
        return flow.noise(t, y, args, self.factor)

    @eqx.filter_jit
    def step(
        self, s: Array, t: Array, number: int, noise: Contraction | None = None
    ) -> tuple[Inexact[Array, "n n *factors"], Inexact[Array, "number n n *spectrum"]]:
        """The blocks of what multiplies the state, and of what multiplies the coefficients
        of the polynomial, lowest power first."""
        process = self.process
        if self.space == "noise":
            linear = process.transition(t, s).blocks
            values = moments(process, s, t, number, self.factor, self.variable)
            return linear, _none_if_still(s, t, values)
        omegas = None
        if noise is not None:
            whole = noise.omega[None]
            one = jnp.broadcast_to(_eye_like(noise.omega), whole.shape)
            omegas = jnp.concatenate([whole, noise.omegas, one])
        start, end = regular_ends(process, s, t)
        linear, values = data_step(process, start, end, number, self.variable, omegas)
        linear = eqx.error_if(
            linear,
            ~jnp.isfinite(linear).all(),
            "`GDDIM` cannot start where there is no noise, at time 0. To encode data, "
            "start from `process.t_min`, or use `GDDIM(space='noise')`.",
        )
        return linear, _none_if_still(s, t, values)


def _none_if_still(s, t, values):
    """The moments of a step, of which one of no length has none. As it is made longer only
    that of the constant grows at first."""
    still = s == t
    constant = pin(still, jnp.zeros_like(values[:1]), values[:1])
    return jnp.concatenate([constant, jnp.where(still, 0, values[1:])])


def _eye_like(blocks):
    eye = jnp.eye(blocks.shape[0], dtype=blocks.dtype)
    return jnp.expand_dims(eye, tuple(range(2, blocks.ndim)))
