import abc
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from .._basis import AbstractBasis, Identity
from .._check import as_batch, as_constant, as_dtype, check_key
from .._custom_types import Key, RealScalarLike, State
from .._operator import apply, BlockLinearOperator
from .._state import check_state, coefficient_dtype, join_components


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractProcess(eqx.Module):
    r"""A linear forward diffusion

    $$\mathrm{d}u = F_t\,u\,\mathrm{d}t + G_t\,\mathrm{d}w, \qquad t \in [0, T],$$

    that turns data into noise, with every quantity the samplers need.

    States are arrays, or a [`gddim_eqx.Phase`][] of position and velocity, of shape
    `(*batch, *shape)`. They are kept in the basis in which the process acts coordinate
    by coordinate: the data's own, but for blurring, where states are cosine
    coefficients. `to_data` and `from_data` change basis. States are real: complex data,
    such as wave functions or k-space, get an axis for their real and imaginary parts,
    `jnp.stack([z.real, z.imag], -1)`.

    !!! info "Implementing a process"

        Subclass, and provide the attributes `shape`, `num_components`, `basis`,
        `data_scale`, `t_min`, `t_max`, `t_end` and `t_vanish`, as fields or properties,
        and the methods `drift`, `diffusion`, `transition`, `covariance`, `factor`,
        `cholesky` and `prior_factor`, such that, for all times:

        1. `transition(t, r) @ transition(r, s)` equals `transition(t, s)`, and
            its derivative in `t` is `drift(t) @ transition(t, s)`;
        2. the derivative of `covariance(t)` is `F Sigma + Sigma F.T + G G.T`;
        3. `factor(t) @ factor(t).T` and `cholesky(t) @ cholesky(t).T` equal
            `covariance(t)`, and `cholesky(t)` is lower triangular;
        4. the derivative of `factor(t)` is `(F + G G.T Sigma^-1 / 2) @ factor(t)`
            (gDDIM, equation 17).

        [`gddim_eqx.check_process`][] checks these, and names the one that does not hold.

        Compute in the dtype of the time that is passed. Keep every number a static
        field, so that a process has no leaves: it is then a constant of the compiled
        program and no optimiser can mistake it for parameters.

        If all there is are the coefficients of the equation, use
        [`gddim_eqx.LinearSDE`][], which solves for the rest. A process of one component
        is an [`gddim_eqx.AbstractScalarProcess`][], to which `basis`, `data_scale`,
        `t_max` and `num_components` are known and for which four functions are enough:

        ```python
        import equinox as eqx
        import gddim_eqx as gd
        import jax.numpy as jnp

        class OrnsteinUhlenbeck(gd.AbstractScalarProcess):
            shape: tuple[int, ...] = eqx.field(static=True)
            rate: float = eqx.field(static=True, default=5.0)
            t_min: float = eqx.field(static=True, default=1e-3)
            t_end: float = eqx.field(static=True, default=1.0)
            t_vanish: float = eqx.field(static=True, default=float("inf"))

            def _drift(self, t):
                return jnp.full_like(t, -self.rate)

            def _diffusion(self, t):
                return jnp.full_like(t, (2 * self.rate) ** 0.5)

            def _transition(self, t, s):
                return jnp.exp(-self.rate * (t - s))

            def _std(self, t):
                return jnp.sqrt(-jnp.expm1(-2 * self.rate * t))

            def prior_factor(self):
                return gd.BlockLinearOperator(jnp.ones((1, 1)), self.shape)

        gd.check_process(OrnsteinUhlenbeck((2,)))
        ```
    """

    shape: AbstractVar[tuple[int, ...]]
    """The shape of one data sample."""
    num_components: AbstractVar[int]
    """The number of components of a state: 1, or 2 with a velocity, or more."""
    basis: AbstractVar[AbstractBasis]
    """The basis in which states are kept."""
    data_scale: AbstractVar[float]
    """The mean of the state at time 0 is this times the data."""
    t_min: AbstractVar[float]
    """Where sampling ends."""
    t_max: AbstractVar[float]
    """Where sampling starts."""
    t_end: AbstractVar[float]
    """The end $T$ of the process' time axis; at least `t_max`."""
    t_vanish: AbstractVar[float]
    """Where the signal would vanish if the time axis went on; infinity if nowhere. Only
    used to place quadrature nodes well."""

    def __check_init__(self):
        if any(size < 1 for size in self.shape):
            raise ValueError(f"`shape` must be made of positive sizes; got {self.shape}.")
        if not 0 < self.t_min < self.t_max <= self.t_end:
            raise ValueError(
                "Need 0 < `t_min` < `t_max` <= `t_end`; got "
                f"{self.t_min}, {self.t_max} and {self.t_end}."
            )

    @abc.abstractmethod
    def drift(self, t: RealScalarLike) -> BlockLinearOperator:
        """$F_t$."""

    @abc.abstractmethod
    def diffusion(self, t: RealScalarLike) -> BlockLinearOperator:
        """$G_t$."""

    @abc.abstractmethod
    def transition(self, t: RealScalarLike, s: RealScalarLike) -> BlockLinearOperator:
        r"""$\Psi(t, s)$, which takes the mean of the state at time `s` to time `t`. Either
        may be the later."""

    @abc.abstractmethod
    def covariance(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$\Sigma_t$, the covariance of the state at time `t` given the data."""

    @abc.abstractmethod
    def factor(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$R_t$, the square root of $\Sigma_t$ with respect to which noise predictions are
        constant along the probability flow of a single data point (gDDIM, equation 17).
        """

    @abc.abstractmethod
    def cholesky(self, t: RealScalarLike) -> BlockLinearOperator:
        r"""$L_t$, the lower triangular square root of $\Sigma_t$."""

    @abc.abstractmethod
    def prior_factor(self) -> BlockLinearOperator:
        """A square root of the covariance of the prior, from which sampling starts."""

    def to_data(self, state: State) -> State:
        """From the basis in which states are kept to the data's coordinates."""
        return jtu.tree_map(self.basis.inverse, state)

    def from_data(self, state: State) -> State:
        """From the data's coordinates to the basis in which states are kept."""
        return jtu.tree_map(self.basis.forward, state)

    def log_snr(self, t: RealScalarLike) -> Inexact[Array, ""]:
        r"""Half the logarithm of the signal-to-noise ratio, $\frac{1}{2} \log a_t^\top
        \Sigma_t^{-1} a_t$, where $a_t$ is how data enters the mean of the state: for
        VP, the logarithm of the signal over the noise. Where frequencies differ, their
        mean.

        **Arguments:**

        - `t`: a time in (0, T].
        """
        t = as_time(t)
        carried = self.cholesky(t).inverse() @ self.transition(t, jnp.zeros_like(t))
        signal = carried.blocks[:, 0]
        # Its square may underflow.
        size = lax.stop_gradient(jnp.abs(signal).max(0))
        known = size > 0
        scaled = signal / jnp.where(known, size, 1)[None]
        square = jnp.where(known, (scaled**2).sum(0), 1)
        return (jnp.log(size) + 0.5 * jnp.log(square)).mean()

    def encode(self, x: Inexact[Array, "..."]) -> State:
        """The mean of the state at time 0 given data.

        **Arguments:**

        - `x`: data, `(*batch, *shape)`.

        **Returns:** a state; its velocity, if any, is zero.
        """
        x = check_state(x, 1, self.shape, "The data `x`")
        position = self.data_scale * self.basis.forward(x)
        rest = [jnp.zeros_like(position)] * (self.num_components - 1)
        return join_components([position, *rest])

    def decode(self, u: State) -> Inexact[Array, "..."]:
        """The data in a state: the inverse of `encode`.

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
        squares = jtu.tree_map(lambda x: (x**2).sum(axes), apply(factor.inverse(), u))
        squares = jnp.stack(jtu.tree_leaves(squares)).sum(0)
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
        - `t`: one time in [0, T] for the whole batch. Use `jax.vmap` for one each.

        **Returns:** the state $u_t$ and the standard normal $\epsilon$, both in the basis
        of states. A noise-predicting network is trained to return `to_data` of the
        second from `to_data` of the first.

        Near `t_max` a small error in the noise is a large one in the data that it amounts
        to. [`gddim_eqx.nn.NetworkModel`][] preconditions a network by `data_std`, so that
        it need not be that accurate; without it, training takes much longer, for
        [`gddim_eqx.CLD`][] above all.
        """
        mean = self.encode(x)
        check_key(key)
        noise = normal_like(key, mean)
        t = time_for(mean, t)
        dtype = jtu.tree_leaves(mean)[0].dtype
        mean = self.transition(t, jnp.zeros_like(t)).astype(dtype).mv(mean)
        spread = self.factor(t).astype(dtype).mv(noise)
        return jtu.tree_map(lambda a, b: a + b, mean, spread), noise


def normal_like(key: Key, state: State) -> State:
    """Independent standard normals of the structure, shape and dtype of a state."""
    leaves, treedef = jtu.tree_flatten(state)
    keys = jr.split(key, len(leaves))
    draws = [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jtu.tree_unflatten(treedef, draws)


class AbstractDiagonalProcess(AbstractProcess):
    r"""A process of one component, hence one number per coordinate in place of every
    matrix. There the two square roots of the covariance are the same.

    Subclasses give `prior_factor`, the attributes of [`gddim_eqx.AbstractProcess`][] but
    for `num_components`, and these four, of scalar times. Each returns an array in the
    dtype of its arguments: a scalar, for all coordinates alike, or one number per
    coordinate in the basis of states, with as many axes as the data and of a shape that
    broadcasts to `shape`.

    - `_drift(t)`: $f_t$, in $\mathrm{d}u = f_t\,u\,\mathrm{d}t +
        g_t\,\mathrm{d}w$.
    - `_diffusion(t)`: $g_t$.
    - `_transition(t, s)`: $\exp \int_s^t f$, the ratio of the means at `t` and `s`.
    - `_std(t)`: the standard deviation of $u_t$ given data; its square has the derivative
        $2 f_t \sigma_t^2 + g_t^2$.
    """

    @abc.abstractmethod
    def _drift(self, t: Array) -> Array:
        """$f_t$."""

    @abc.abstractmethod
    def _diffusion(self, t: Array) -> Array:
        """$g_t$."""

    @abc.abstractmethod
    def _transition(self, t: Array, s: Array) -> Array:
        """The ratio of the means at `t` and `s`. Either may be the later."""

    @abc.abstractmethod
    def _std(self, t: Array) -> Array:
        """The standard deviation given data."""

    @property
    def num_components(self) -> int:
        return 1

    def _operator(self, value: Array, tags: object = frozenset()) -> BlockLinearOperator:
        return BlockLinearOperator(value[None, None], self.shape, tags)

    def drift(self, t):
        return self._operator(self._drift(as_time(t)))

    def diffusion(self, t):
        return self._operator(self._diffusion(as_time(t)))

    def transition(self, t, s):
        return self._operator(self._transition(*as_times(t, s)))

    def covariance(self, t):
        std = self._std(as_time(t))
        return self._operator(std**2, lx.positive_semidefinite_tag)

    def factor(self, t):
        return self._operator(self._std(as_time(t)))

    def cholesky(self, t):
        return self.factor(t)


class AbstractScalarProcess(AbstractDiagonalProcess):
    """A diagonal process with the same number for all coordinates of the data, whose
    `_drift`, `_diffusion`, `_transition` and `_std` are scalars. States are the data's
    own coordinates, and sampling starts at `t_end`. [`gddim_eqx.AbstractProcess`][] has
    an example."""

    @property
    def basis(self) -> AbstractBasis:
        return Identity()

    @property
    def data_scale(self) -> float:
        return 1.0

    @property
    def t_max(self) -> float:
        return self.t_end


def as_time(t: RealScalarLike) -> Array:
    """A time as an array of floating dtype."""
    try:
        if isinstance(t, str):
            raise TypeError
        t = jnp.asarray(float(t) if isinstance(t, int) else t)
    except (TypeError, ValueError):
        raise ValueError(f"A time must be a number; got {t!r}.") from None
    if jnp.issubdtype(t.dtype, jnp.complexfloating):
        raise ValueError(f"A time must be real; got {t}.")
    if t.ndim:
        raise ValueError(
            f"A time must be a scalar; got an array of shape {t.shape}. For one each in a "
            "batch, use `jax.vmap`."
        )
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(jnp.result_type(float))
    return t


def time_for(state: State, t: RealScalarLike) -> Array:
    """A time as what acts on a state needs it."""
    return as_time(t).astype(coefficient_dtype(state))


def as_times(*times: RealScalarLike) -> list[Array]:
    """Several times as arrays of one floating dtype."""
    arrays = [as_time(t) for t in times]
    dtype = jnp.result_type(*arrays)
    return [t if t.dtype == dtype else t.astype(dtype) for t in arrays]


def coarse_and_rest(value: float | np.ndarray) -> tuple[Any, Any]:
    """Split numbers into twelve leading bits, products of two of which are exact in
    float32, and the rest."""
    mantissa, exponent = np.frexp(value)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    return coarse, value - coarse


def check_positive(**values: float) -> None:
    """Raise a `ValueError` that names the first value that is not positive."""
    for name, value in values.items():
        if not as_constant(name, value) > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")


def require_process(process: object) -> None:
    """Raise a `ValueError` unless given a process."""
    if not isinstance(process, AbstractProcess):
        raise ValueError(
            "`process` must be a forward process such as `CLD(shape=...)`; got "
            f"{process!r}."
        )


def as_shape(shape: Sequence[int] | int) -> tuple[int, ...]:
    """A data shape as a tuple of Python integers."""
    try:
        return tuple(map(operator.index, shape if isinstance(shape, Iterable) else [shape]))
    except TypeError:
        raise ValueError(
            f"`shape` must be an integer or a tuple of integers; got {shape!r}."
        ) from None
