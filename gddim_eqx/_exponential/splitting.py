import abc
import functools as ft
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Inexact

from .._custom_types import Args, FrameName, State, Stochasticity
from .._linear import append_axes, apply, BlockLinearOperator, subtract
from .._misc import pin
from .._process import AbstractDiagonalProcess, AbstractProcess
from .._term import step_faults
from .coordinate import AbstractCoordinate, SoftLogSNR, Time
from .moments import (
    moments_of_bracket,
    moments_of_density,
    step_coordinate,
    StepCoordinate,
)
from .quadrature import step_ends, step_nodes, StepNodes
from .reverse_transition import noise_transition, NoiseTransition


Moments = Callable[[StepCoordinate, int], Inexact[Array, "number n n *spectrum"]]


class StepCoefficients(NamedTuple):
    """The coefficients of a step of an exponential multistep method, as blocks of
    operators."""

    # Multiplies the state.
    linear: Inexact[Array, "n n *factors"]
    # Multiply the coefficients of the interpolation polynomials, lowest power first: the
    # one in the coordinate, and the one in the coordinate of the error estimate.
    moments: Inexact[Array, "number n n *spectrum"]
    error_moments: Inexact[Array, "number_for_error n n *spectrum"]
    # The square root R of the covariance at the start; `None` without a process.
    root: Inexact[Array, "n n *spectrum"] | None
    # The end of the step; and the coordinates at its start and end.
    t: Inexact[Array, ""]
    start: Inexact[Array, ""]
    end: Inexact[Array, ""]
    error_start: Inexact[Array, ""]
    error_end: Inexact[Array, ""]
    # Multiplies standard normals on reverse diffusions; otherwise `None`.
    noise: Inexact[Array, "n n *spectrum"] | None = None


class AbstractSplitting(eqx.Module):
    """The linear part of the equation that a step solves exactly, and the quantity that
    it interpolates. Splittings are static pytrees."""

    error_coordinate: ClassVar[AbstractCoordinate]
    """The coordinate of the polynomials that error estimates compare with."""

    @abc.abstractmethod
    def evaluate(
        self,
        term: Any,
        t: Array,
        y: State,
        args: Args,
        root: Inexact[Array, "n n *spectrum"] | None = None,
    ) -> State:
        """The interpolated quantity, from one evaluation of the model. `root` holds the
        blocks of R_t, if already computed."""

    @abc.abstractmethod
    def integrate(
        self,
        equation: Any,
        s: Array,
        t: Array,
        number: int,
        coordinate: AbstractCoordinate = Time(),
        number_for_error: int = 1,
        lam: Stochasticity | None = None,
    ) -> StepCoefficients:
        """The coefficients of a step.

        **Arguments:**

        - `equation`: the forward process, or the linear part of a semilinear equation.
        - `s`, `t`: the start and end of the step. They may be equal.
        - `number`: the number of moments.
        - `coordinate`: the coordinate of the interpolation polynomial.
        - `number_for_error`: the number of moments in `error_coordinate`.
        - `lam`: the stochasticity of a reverse diffusion; `None` for the probability flow.
        """

    @abc.abstractmethod
    def first_change(
        self, shape: tuple[int, ...], c: StepCoefficients, y: State, value: State
    ) -> State:
        """How much the interpolated quantity may change over a step from `y`, if only its
        value there is known. For error estimates."""

    @abc.abstractmethod
    def is_too_long(self, c: StepCoefficients, span: Inexact[Array, ""]) -> Bool[Array, ""]:
        """Whether a step is longer than error estimates are valid for, if the values of its
        nodes span a given time."""

    @abc.abstractmethod
    def faults(
        self, equation: Any, c: StepCoefficients, s: Array, stochastic: bool
    ) -> list[tuple[Bool[Array, ""], str]]:
        """What can be wrong with a step from `s`, for `error_if_any`."""


class AbstractProcessSplitting(AbstractSplitting):
    """A splitting of the probability flow and the reverse diffusions of a process."""

    singular: ClassVar[str]
    """What to say where the multiplier of the state is infinite."""
    error_coordinate: ClassVar[AbstractCoordinate] = SoftLogSNR()

    @abc.abstractmethod
    def prepare(
        self, nodes: StepNodes, transition: NoiseTransition | None
    ) -> tuple[Inexact[Array, "n n *factors"], Moments]:
        """The multiplier of the state, and the moments of the bracket as a function of the
        coordinate over the step and the number of moments."""

    @abc.abstractmethod
    def needs_nodes(self, process: AbstractProcess) -> bool:
        """Whether the zeroth moment needs the quadrature nodes within a step."""

    def faults(self, equation, c, s, stochastic):
        singular = ~jnp.isfinite(c.linear).all(), self.singular
        return [singular, *step_faults(equation, s, c.t, stochastic)]

    def is_too_long(self, c, span):
        # The log-SNR, flattened below -6. Over longer steps the prediction may change much
        # more than past values show, and any state at their end may be consistent with the
        # prediction there.
        ends = c.error_start, c.error_end
        start, end = (jnp.log(jnp.expm1(x) + math.exp(-5)) for x in ends)
        return jnp.abs(end - start) > 2

    def first_change(self, shape, c, y, value):
        before, after = (jnp.expm1(x) / math.e for x in (c.error_start, c.error_end))
        # Where the signal is weak, the data prediction minus its mean is proportional to
        # it. The mean is not known.
        relative = jnp.abs(after - before) / (before + 0.01)
        # The change of the data prediction for normal data of variance 1, over noise.
        share = lambda x: x / jnp.sqrt(1 + x**2)
        normal = jnp.abs(share(after) - share(before)) / jnp.sqrt(1 + before**2)
        assert c.root is not None
        whitened = apply(BlockLinearOperator(c.root, shape).inverse(), y)
        signal, scale = self.signal(whitened, value, before)

        def total(value, whitened, signal):
            of_signal, of_state = (
                x.astype(value.dtype) for x in (relative, normal * scale)
            )
            change = of_signal * jnp.abs(signal) + of_state * jnp.abs(whitened)
            # Without noise at the start, nothing is known.
            return jnp.where(jnp.isfinite(change), change, jnp.abs(value))

        return jtu.tree_map(total, value, whitened, signal)

    @abc.abstractmethod
    def signal(self, whitened: State, value: State, ratio: Array) -> tuple[State, Array]:
        """The data prediction in the units of the interpolated quantity, and the factor to
        these units, given the state divided by the noise, the interpolated quantity, and
        the signal-to-noise ratio."""

    # Jitted so that it is traced once, not every time Diffrax traces a step.
    @eqx.filter_jit
    def integrate(
        self,
        equation: AbstractProcess,
        s: Array,
        t: Array,
        number: int,
        coordinate: AbstractCoordinate = Time(),
        number_for_error: int = 1,
        lam: Stochasticity | None = None,
    ) -> StepCoefficients:
        process = equation
        # At time 0 there may be no noise, and then R has no inverse.
        at_zero = (s == t) & (s <= 0)
        start, end = (jnp.where(at_zero, process.t_min, x) for x in (s, t))
        nodes = step_nodes(process, start, end)
        transition = None if lam is None else noise_transition(nodes, lam)
        linear, moments = self.prepare(nodes, transition)
        for_error = step_coordinate(nodes, self.error_coordinate)
        error_moments = moments(for_error, number_for_error)
        if number == 1 and lam is None and not self.needs_nodes(process):
            # Then XLA drops the nodes if the error estimate goes unused.
            nodes = step_ends(process, start, end)
            linear, moments = self.prepare(nodes, None)
        at = step_coordinate(nodes, coordinate)
        step_moments = moments(at, number)
        noise = None
        if transition is not None:
            noise = _product(process, nodes.roots[-1], transition.noise_root)
        root = nodes.roots[0]
        step_moments, error_moments = (
            zero_if_still(s, t, x) for x in (step_moments, error_moments)
        )
        ends = at.start, at.end, for_error.start, for_error.end
        return StepCoefficients(linear, step_moments, error_moments, root, t, *ends, noise)


class DataSplitting(AbstractProcessSplitting):
    r"""Interpolates the prediction of the initial state, $U$. The bracket is $R_t
    \Omega(t, \tau) R_\tau^{-1} \Psi(\tau, 0)$; for the probability flow, $\Omega$ is the
    identity."""

    singular: ClassVar[str] = (
        "`GDDIM` cannot start where there is no noise, at time 0. To encode data, start "
        "from `process.t_min`, or use `GDDIM(space='noise')`. To sample with a vector "
        "field whose time runs from noise at 0 to data at 1, reverse it: "
        "`ODETerm(lambda t, y, args: -field(1 - t, y, args))`."
    )

    def evaluate(self, term, t, y, args, root=None):
        return term.denoised(t, y, args, root=_root(term.process, root))

    def signal(self, whitened, value, ratio):
        return value, jnp.ones_like(ratio)

    def prepare(self, nodes, transition):
        process, root = nodes.process, nodes.roots[-1]
        product = jax.vmap(ft.partial(_product, process))
        whitened = nodes.inverses
        if transition is not None:
            whitened = product(transition.omegas, whitened)
        backs = jax.vmap(ft.partial(_product, process, root))(whitened)
        bracket = product(backs, nodes.signals)
        # Known at the end, even where R has no inverse.
        last = append_axes(nodes.signals[-1:], bracket.ndim)
        bracket = jnp.where(_index(bracket) == len(bracket) - 1, last, bracket)
        return backs[0], ft.partial(moments_of_bracket, bracket)

    def needs_nodes(self, process):
        return False


class NoiseSplitting(AbstractProcessSplitting):
    r"""Interpolates the noise prediction in the frame $R_t$, which is constant along the
    probability flow of a single data point. The bracket is $\Psi(t, \tau) R_\tau$.

    On reverse diffusions the bracket is $\Psi(t, \tau) R_\tau - R_t \Omega(t, \tau)$. There
    the noise makes noise predictions rough, so only order 1 is of use. In the frame $L_t$
    only the derivative of the bracket is known, $\frac{1}{2} \Psi(t, \tau) G G^\top
    L_\tau^{-\top}$.

    **Arguments:**

    - `frame`: the frame of the noise: `"R"`; or `"cholesky"` for $L_t$, on probability
        flows only.
    """

    frame: FrameName = eqx.field(static=True, default="R")

    singular: ClassVar[str] = (
        "In noise space `GDDIM` cannot start or end where there is no signal, at "
        "`process.t_zero_signal`. Use `GDDIM()`, which can."
    )

    def faults(self, equation, c, s, stochastic):
        ends = c.t >= equation.t_zero_signal, self.singular
        return [ends, *super().faults(equation, c, s, stochastic)]

    def evaluate(self, term, t, y, args, root=None):
        return term.noise(t, y, args, self.frame, root=_root(term.process, root))

    def signal(self, whitened, value, ratio):
        return subtract(whitened, value), ratio

    def prepare(self, nodes, transition):
        process, end = nodes.process, nodes.times[-1]
        to_end = lambda tau: process.transition(end, tau).blocks
        to_end = jax.vmap(to_end)(nodes.times)
        if self.needs_nodes(process):
            if transition is not None:
                raise ValueError(
                    "The frame 'cholesky' is for the probability flow only; got a reverse "
                    "diffusion. Use the frame 'R'."
                )
            density = jax.vmap(ft.partial(_density, process))
            density = density(nodes.times, to_end)
            return to_end[0], ft.partial(moments_of_density, density)
        bracket = jax.vmap(ft.partial(_product, process))(to_end, nodes.roots)
        if transition is not None:
            root = ft.partial(_product, process, nodes.roots[-1])
            bracket = bracket - jax.vmap(root)(transition.omegas)
        return to_end[0], ft.partial(moments_of_bracket, bracket)

    def needs_nodes(self, process):
        return self.frame == "cholesky" and not isinstance(process, AbstractDiagonalProcess)


def _density(process, tau, transition):
    diffusion, inverse = process.diffusion(tau), process.cholesky(tau).inverse()
    half = BlockLinearOperator(0.5 * transition, process.shape)
    return (half @ diffusion @ diffusion.T @ inverse.T).blocks


def _root(process, blocks):
    return None if blocks is None else BlockLinearOperator(blocks, process.shape)


def _product(process, *blocks):
    factors = [BlockLinearOperator(x, process.shape) for x in blocks]
    return ft.reduce(lambda a, b: a @ b, factors).blocks


def zero_if_still(s, t, values):
    """The moments of a step, set to zero for a step of size zero. To first order in the
    step size, only the zeroth moment contributes to the solution."""
    still = s == t
    return pin(still, 0, jnp.where(still & (_index(values) > 0), 0, values))


def _index(values):
    """The index along the first axis."""
    return np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
