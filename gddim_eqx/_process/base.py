import abc
import math
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Inexact

from .._custom_types import Key, RealScalarLike, State
from .._linear import (
    AbstractBasis,
    add,
    apply,
    BlockLinearOperator,
    check_state,
    coefficient_dtype,
    join_components,
)
from .._misc import as_batch, as_dtype, check_instance, check_key
from .time_axis import as_time, as_times, time_for


# Type checkers know no abstract variables, and would take them for fields with arguments.
# An alias from another module they do not recognise either.
if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractProcess(eqx.Module):
    r"""A linear forward diffusion

    $$\mathrm{d}u = F_t\,u\,\mathrm{d}t + G_t\,\mathrm{d}w, \qquad t \in [0, T],$$

    that turns data into noise, with every quantity the samplers need.

    States are arrays, or a [`gddim_eqx.Phase`][] of position and velocity, of shape
    `(*batch, *shape)`. They are stored in the basis in which the process acts coordinate
    by coordinate: the data's own, except for blurring, where states are cosine
    coefficients. `to_data` and `from_data` change basis. States are real: give complex
    data, such as wave functions or k-space, an axis for real and imaginary parts,
    `jnp.stack([z.real, z.imag], -1)`.

    !!! info "Implementing a process"

        Subclass, and provide the attributes `shape`, `num_components`, `basis`,
        `data_scale`, `t_min`, `t_max`, `t_end` and `t_zero_signal`, as static fields, class
        attributes or properties, and the methods `_drift`, `_diffusion`, `_transition`,
        `_covariance`, `_factor`, `_cholesky` and `_prior_factor`. Each returns the blocks
        of an operator, `(n, n)` or `(n, n, *spectrum)` as in
        [`gddim_eqx.BlockLinearOperator`][]; the public methods `drift`, `diffusion`, ...
        convert times and wrap blocks. For all times:

        1. `transition(t, r) @ transition(r, s)` equals `transition(t, s)`, and
            its derivative in `t` is `drift(t) @ transition(t, s)`;
        2. the derivative of `covariance(t)` is `F Sigma + Sigma F.T + G G.T`;
        3. `factor(t) @ factor(t).T` and `cholesky(t) @ cholesky(t).T` equal
            `covariance(t)`, and `cholesky(t)` is lower triangular;
        4. the derivative of `factor(t)` is `(F + G G.T Sigma^-1 / 2) @ factor(t)`
            (gDDIM, equation 17).

        [`gddim_eqx.check_process`][] checks these, and names the one that fails.

        Times are scalar arrays: compute in their dtype. Make every number a static field,
        so that a process is a static pytree: a compile-time constant, which no optimiser
        can mistake for parameters.

        If only the coefficients of the equation are known, use
        [`gddim_eqx.LinearSDE`][], which solves for the rest. For a process of one
        component, subclass [`gddim_eqx.AbstractScalarProcess`][], which defines `basis`,
        `data_scale`, `t_max` and `num_components`, and needs only four functions:

        ```python
        import equinox as eqx
        import gddim_eqx as gd
        import jax.numpy as jnp

        class OrnsteinUhlenbeck(gd.AbstractScalarProcess):
            shape: tuple[int, ...] = eqx.field(static=True)
            rate: float = eqx.field(static=True, default=5.0)
            t_min: float = eqx.field(static=True, default=1e-3)
            t_end: float = eqx.field(static=True, default=1.0)
            t_zero_signal = float("inf")

            def _drift(self, t):
                return jnp.full_like(t, -self.rate)

            def _diffusion(self, t):
                return jnp.full_like(t, (2 * self.rate) ** 0.5)

            def _transition(self, t, s):
                return jnp.exp(-self.rate * (t - s))

            def _std(self, t):
                return jnp.sqrt(-jnp.expm1(-2 * self.rate * t))

            def _prior_factor(self):
                return jnp.ones(())

        gd.check_process(OrnsteinUhlenbeck((2,)))
        ```
    """

    shape: AbstractVar[tuple[int, ...]]
    """The shape of one data sample."""
    num_components: AbstractVar[int]
    """The number of components of a state: 1; 2 with a velocity; or more."""
    basis: AbstractVar[AbstractBasis]
    """The basis in which states are stored."""
    data_scale: AbstractVar[float]
    """The mean of the state at time 0 is `data_scale` times the data."""
    t_min: AbstractVar[float]
    """The time at which sampling ends."""
    t_max: AbstractVar[float]
    """The time at which sampling starts."""
    t_end: AbstractVar[float]
    """The end $T$ of the process' time axis; at least `t_max`."""
    t_zero_signal: AbstractVar[float]
    """The time at which the signal vanishes, or would if the time axis were extended;
    infinity if never. It places quadrature nodes; and if it lies on the time axis,
    predictions of the noise are refused there."""

    def __check_init__(self):
        if any(size < 1 for size in self.shape):
            raise ValueError(f"`shape` must consist of positive sizes; got {self.shape}.")
        check_times(self.t_min, self.t_max, self.t_end)
        if not self.t_zero_signal >= self.t_max:
            raise ValueError(
                f"`t_max` must not be after t = {self.t_zero_signal}, where the signal "
                f"vanishes, or `t_zero_signal` is wrong; got {self.t_max}."
            )

    @abc.abstractmethod
    def _drift(self, t: Array) -> Array:
        """The blocks of $F_t$."""

    @abc.abstractmethod
    def _diffusion(self, t: Array) -> Array:
        """The blocks of $G_t$."""

    @abc.abstractmethod
    def _transition(self, t: Array, s: Array) -> Array:
        r"""The blocks of $\Psi(t, s)$. Either time may be the later."""

    @abc.abstractmethod
    def _covariance(self, t: Array) -> Array:
        r"""The blocks of $\Sigma_t$."""

    @abc.abstractmethod
    def _factor(self, t: Array) -> Array:
        """The blocks of $R_t$."""

    @abc.abstractmethod
    def _cholesky(self, t: Array) -> Array:
        """The blocks of $L_t$."""

    @abc.abstractmethod
    def _prior_factor(self) -> Array:
        """The blocks of a square root of the covariance of the prior."""

    def _operator(self, blocks: Array, tags: object = frozenset()) -> BlockLinearOperator:
        if self.num_components == 1 and blocks.ndim in (0, len(self.shape)):
            blocks = blocks[None, None]
        return BlockLinearOperator(blocks, self.shape, tags)

    def drift(self, t: RealScalarLike) -> BlockLinearOperator:
        """$F_t$."""
        return self._operator(self._drift(as_time(t)))

    def diffusion(self, t: RealScalarLike) -> BlockLinearOperator:
        """$G_t$."""
        return self._operator(self._diffusion(as_time(t)))

    def transition(self, t: RealScalarLike, s: RealScalarLike) -> BlockLinearOperator:
        r"""$\Psi(t, s)$, which maps the mean of the state at time `s` to that at time `t`.
        Either time may be the later."""
        return self._operator(self._transition(*as_times(t, s)))

    def covariance(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$\Sigma_t$, the covariance of the state at time `t` given the data."""
        blocks = self._covariance(as_time(t))
        return self._operator(blocks, lx.positive_semidefinite_tag)

    def factor(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$R_t$, the square root of $\Sigma_t$ for which noise predictions are constant
        along the probability flow of a single data point (gDDIM, equation 17).
        """
        return self._operator(self._factor(as_time(t)))

    def cholesky(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$L_t$, the Cholesky factor of $\Sigma_t$."""
        return self._operator(self._cholesky(as_time(t)), lx.lower_triangular_tag)

    def prior_factor(self) -> BlockLinearOperator:
        """A square root of the covariance of the prior, from which sampling starts."""
        return self._operator(self._prior_factor())

    def signal_rate(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""The derivative of $\Psi(t, 0)$ in `t`."""
        return self.drift(t) @ self.transition(t, 0.0)

    def factor_rate(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""The derivative of $R_t$ (gDDIM, equation 17)."""
        factor, diffusion = self.factor(t), self.diffusion(t)
        growth = diffusion @ diffusion.T @ factor.inverse().T * 0.5
        return self.drift(t) @ factor + growth

    def flow_speed(self, t: RealScalarLike) -> Inexact[Array, ""]:
        """The speed of the parameter of the path by which flow predictions are its
        derivatives: 1 where it is time itself."""
        return jnp.ones_like(as_time(t))

    def to_data(self, state: State) -> State:
        """Convert from the basis of states to the data's coordinates."""
        return jtu.tree_map(self.basis.inverse, state)

    def from_data(self, state: State) -> State:
        """Convert from the data's coordinates to the basis of states."""
        return jtu.tree_map(self.basis.forward, state)

    def log_snr(self, t: RealScalarLike) -> Inexact[Array, ""]:
        r"""Half the logarithm of the signal-to-noise ratio, $\frac{1}{2} \log a_t^\top
        \Sigma_t^{-1} a_t$, where $a_t$ is the first column of $\Psi(t, 0)$: for VP,
        the logarithm of the ratio of signal to noise. Averaged over frequencies if they
        differ.

        **Arguments:**

        - `t`: a time in (0, T].
        """
        signal = self.cholesky(t).inverse() @ self.transition(t, 0.0)
        return log_norm(signal.blocks[:, 0])[0].mean()

    def encode(self, x: Inexact[Array, "..."]) -> State:
        """Encode data as the mean of the state at time 0.

        **Arguments:**

        - `x`: data, `(*batch, *shape)`.

        **Returns:** a state; its velocity, if any, is zero.
        """
        x = check_state(x, 1, self.shape, "The data `x`")
        position = self.data_scale * self.basis.forward(x)
        rest = [jnp.zeros_like(position)] * (self.num_components - 1)
        return join_components([position, *rest])

    def decode(self, u: State) -> Inexact[Array, "..."]:
        """Extract the data from a state: the inverse of `encode`.

        **Arguments:**

        - `u`: a state of shape `(*batch, *shape)`, for example `sol.ys`.

        **Returns:** data, `(*batch, *shape)`.
        """
        u = check_state(u, self.num_components, self.shape, "The state `u`")
        return self.basis.inverse(jtu.tree_leaves(u)[0]) / self.data_scale

    def prior(self, key: Key, batch: tuple[int, ...] = (), dtype=None) -> State:
        """Draw states at `t_max`, where sampling starts.

        **Arguments:**

        - `key`: a random key.
        - `batch`: leading axes of the draw.
        - `dtype`: defaults to JAX's default floating dtype.

        **Returns:** a state of shape `(*batch, *shape)`.
        """
        dtype = as_dtype(float if dtype is None else dtype)
        check_key(key)
        noise = [jnp.zeros((*as_batch(batch), *self.shape), dtype)] * self.num_components
        noise = normal_like(key, join_components(noise))
        return self.prior_factor().astype(dtype).mv(noise)

    def prior_log_density(self, u: State) -> Inexact[Array, "*batch"]:
        """The log density of states under the distribution that `prior` draws from.

        **Arguments:**

        - `u`: a state of shape `(*batch, *shape)`.

        **Returns:** one number per sample.
        """
        u = check_state(u, self.num_components, self.shape, "The state `u`")
        u = jtu.tree_map(lambda x: x.astype(coefficient_dtype(u)), u)
        factor, axes = self.prior_factor(), tuple(range(-len(self.shape), 0))
        normal = jnp.stack(jtu.tree_leaves(apply(factor.inverse(), u)))
        squares = (normal**2).sum((0, *axes))
        volume = jnp.linalg.slogdet(jnp.moveaxis(factor.blocks, (0, 1), (-2, -1)))[1]
        volume = jnp.broadcast_to(volume, self.shape).sum()
        size = self.num_components * math.prod(self.shape)
        constant = volume + 0.5 * size * math.log(2 * math.pi)
        return -0.5 * squares - constant.astype(squares.dtype)

    def perturb(
        self, key: Key, x: Inexact[Array, "..."], t: RealScalarLike
    ) -> tuple[State, State]:
        r"""Draw a noised state and the noise in it:
        $u_t = \Psi(t, 0)\,\mathrm{encode}(x) + R_t\,\epsilon$.

        **Arguments:**

        - `key`: a random key.
        - `x`: data, `(*batch, *shape)`.
        - `t`: one time in [0, T] for the whole batch. Use `jax.vmap` for a time per sample.

        **Returns:** the state $u_t$ and the standard normal $\epsilon$, both in the basis
        of states. Noise prediction networks are trained to map `to_data` of the first to
        `to_data` of the second.

        Near `t_max` a small error in the noise implies a large error in the data.
        Preconditioning a network, by the `data_std` of [`gddim_eqx.nn.NetworkModel`][],
        removes this difficulty; without it, training takes much longer, above all for
        [`gddim_eqx.CLD`][].
        """
        mean = self.encode(x)
        check_key(key)
        noise = normal_like(key, mean)
        t = time_for(mean, t)
        dtype = jtu.tree_leaves(mean)[0].dtype
        mean = self.transition(t, jnp.zeros_like(t)).astype(dtype).mv(mean)
        spread = self.factor(t).astype(dtype).mv(noise)
        return add(mean, spread), noise


def log_norm(
    vectors: Inexact[Array, "n *spectrum"],
) -> tuple[Inexact[Array, "*spectrum"], Inexact[Array, "n *spectrum"]]:
    """The logarithm of the Euclidean norm over the first axis, and the vectors divided by
    the norm. Accurate even where the squared norm would underflow."""
    if len(vectors) == 1:
        size = jnp.abs(vectors[0])
        return jnp.log(size), jnp.sign(vectors)
    size = lax.stop_gradient(jnp.abs(vectors).max(0))
    known = size > 0
    scaled = vectors / jnp.where(known, size, 1)[None]
    norm = jnp.sqrt(jnp.where(known, (scaled**2).sum(0), 1))
    return jnp.log(size * norm), scaled / norm[None]


def normal_like(key: Key, state: State) -> State:
    """Independent standard normals with the structure, shape and dtype of a state."""
    leaves, treedef = jtu.tree_flatten(state)
    keys = jr.split(key, len(leaves))
    draws = [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jtu.tree_unflatten(treedef, draws)


def check_times(t_min: float, t_max: float, t_end: float) -> None:
    """**Raises:** `ValueError` unless these are in order."""
    if not 0 < t_min < t_max <= t_end < math.inf:
        raise ValueError(
            "Need 0 < `t_min` < `t_max` <= `t_end`, all finite; got "
            f"{t_min}, {t_max} and {t_end}."
        )


def require_process(process: object) -> None:
    """Raise a `ValueError` unless given a process."""
    wanted = "a forward process such as `CLD(shape=...)`"
    check_instance("process", process, AbstractProcess, wanted)
