import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._misc import as_constant, as_shape, check_instance, check_positive
from .base import check_times
from .diagonal import AbstractScalarProcess
from .time_axis import as_time


class AbstractGaussianPath(AbstractScalarProcess):
    r"""A path from data to noise, $x_t = a_t\,x_0 + s_t\,\epsilon$, given by two functions
    of time. As a diffusion process, it has the drift $\frac{\dot a_t}{a_t} x$ and the
    squared diffusion coefficient $2 s_t (\dot s_t - \frac{\dot a_t}{a_t} s_t)$.

    The signal $a_t$ may be zero at the end of the time axis, where sampling starts. A noise
    or score prediction does not determine the data there, so models must predict the data,
    $v$ or the flow.
    """

    @abc.abstractmethod
    def _signal(self, t: Array) -> Array:
        """$a_t$."""

    @abc.abstractmethod
    def _noise(self, t: Array) -> Array:
        """$s_t$."""

    def _signal_rate(self, t: Array) -> Array:
        r"""$\dot a_t$."""
        return _with_rate(self._signal, t)[1]

    def _noise_rate(self, t: Array) -> Array:
        r"""$\dot s_t$."""
        return _with_rate(self._noise, t)[1]

    def _drift(self, t):
        return self._signal_rate(t) / self._signal(t)

    def _diffusion(self, t):
        noise = self._noise(t)
        return jnp.sqrt(2 * noise * (self._noise_rate(t) - self._drift(t) * noise))

    def _transition(self, t, s):
        return self._signal(t) / self._signal(s)

    def _std(self, t):
        return self._noise(t)

    def _prior_factor(self):
        return self._noise(jnp.asarray(self.t_max))

    def signal_rate(self, t):
        return self._operator(self._signal_rate(as_time(t)) / self.data_scale)

    def factor_rate(self, t):
        return self._operator(self._noise_rate(as_time(t)))


class GaussianPath(AbstractGaussianPath):
    r"""Any path from data to noise, $x_t = a_t\,x_0 + s_t\,\epsilon$.

    Derivatives are computed by JAX. For the path of a known model, see [`gddim_eqx.VP`][],
    [`gddim_eqx.EDM`][], [`gddim_eqx.RectifiedFlow`][] and
    [`gddim_eqx.TrigonometricFlow`][].

    The signal may be zero at `t_end`, where sampling starts: then models must predict the
    data, `"v"` or the `"flow"`.

    !!! example

        ```python
        import gddim_eqx as gd
        import jax.numpy as jnp

        process = gd.GaussianPath((2,), lambda t: 1 - t**2, lambda t: t)
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    signal: Callable[[Array], Any] = eqx.field(static=True)
    noise: Callable[[Array], Any] = eqx.field(static=True)
    t_min: float = eqx.field(static=True)
    t_end: float = eqx.field(static=True)
    prior_std: float = eqx.field(static=True)
    data_scale: float = eqx.field(static=True)
    t_zero_signal: float = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...] | int,
        signal: Callable[[Array], Any],
        noise: Callable[[Array], Any],
        *,
        t_min: float = 1e-3,
        t_end: float = 1.0,
        prior_std: float | None = None,
    ):
        r"""**Arguments:**

        - `shape`: the shape of one data sample.
        - `signal`, `noise`: $a_t$ and $s_t$, as functions of a scalar time in [0, t_end],
            written in `jax.numpy`. The ratio $a_t / s_t$ must strictly decrease. Compute in
            the dtype of the argument, and avoid cancellation at both ends, as it costs
            accuracy in single precision: use `-jnp.expm1(-t)` rather than
            `1 - jnp.exp(-t)`.
        - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`. The noise at `t_min`
            remains in the samples, so it should be small; and the signal at `t_end` should
            be small compared with the noise there.
        - `prior_std`: the standard deviation of the prior; by default $s_t$ at `t_end`.

        **Raises:** `ValueError` if the functions do not define such a path.
        """
        self.shape = as_shape(shape)
        for name, function in (("signal", signal), ("noise", noise)):
            check_instance(name, function, Callable, "a function of time")
        self.signal, self.noise = signal, noise
        self.t_min, self.t_end = as_constant("t_min", t_min), as_constant("t_end", t_end)
        check_times(self.t_min, self.t_end, self.t_end)
        times = self.t_end * np.linspace(0, 1, 1001) ** 2
        signals, rates = _on_host("signal", self._signal, times)
        noises, _ = _on_host("noise", self._noise, times)
        _check_path(times, signals, noises)
        prior_std = noises[-1] if prior_std is None else prior_std
        self.prior_std = as_constant("prior_std", prior_std)
        check_positive(prior_std=self.prior_std)
        self.data_scale = float(signals[0])
        # By linear extrapolation from the end.
        rest = -signals[-1] / rates[-1] if rates[-1] < 0 else math.inf
        self.t_zero_signal = float(times[-1] + (rest if signals[-1] > 0 else 0))

    def _signal(self, t):
        return jnp.asarray(self.signal(t), t.dtype)

    def _noise(self, t):
        return jnp.asarray(self.noise(t), t.dtype)

    def _prior_factor(self):
        return jnp.asarray(self.prior_std)


def _with_rate(fn, t):
    """A function of time, and its derivative."""
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))


def _on_host(name, fn, times) -> tuple[np.ndarray, np.ndarray]:
    """The values and derivatives of a function of time, in double precision."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        # A new function for each call: with a shared one, JAX's cache would keep the
        # process alive.
        both = jax.jit(jax.vmap(lambda t: _with_rate(fn, t)))
        values, rates = (np.asarray(x) for x in both(jnp.asarray(times, np.float64)))
    if values.shape != times.shape:
        raise ValueError(
            f"`{name}` must return one number for one time; it returned an array of shape "
            f"{values.shape[1:]}."
        )
    return values, rates


_direction = (
    "Time runs from data to noise; if yours runs the other way, substitute `t_end - t`."
)


def _check_path(times, signal, noise) -> None:
    """Raise a `ValueError` unless the signal-to-noise ratio decreases."""
    for name, values, end in (("signal", signal, -1), ("noise", noise, 0)):
        good = values > 0
        good[end] = values[end] >= 0
        if not good.all():
            worst = int(np.argmin(good))
            raise ValueError(
                f"`{name}` must be positive, or zero at t = {times[end]:g}; it is "
                f"{values[worst]} at t = {times[worst]:.6g}. {_direction}"
            )
    growing = np.diff(noise / np.where(signal > 0, signal, np.finfo(float).tiny)) > 0
    if not growing.all():
        worst = int(np.argmin(growing))
        raise ValueError(
            "The signal-to-noise ratio must decrease with time, but `signal(t) / noise(t)` "
            f"does not near t = {times[worst]:.6g}. {_direction}"
        )
