from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._custom_types import Args, RealScalarLike, State
from .._linear import batch_axes
from .._misc import check_choice, check_instance, show
from .._process import (
    AbstractProcess,
    as_time,
    DiscreteVP,
    require_process,
)
from .._term import AbstractWrapper


TimeName = Literal["index", "1000 t", "sigma", "log(sigma) / 4", "1 - t"]


def _log_sigma(process, t):
    """Of the noise-to-signal ratio, including the scale of the data."""
    return -process.log_snr(t) - jnp.log(process.data_scale)


_times: dict[str, Callable[[Any, Array], Array]] = {
    "index": lambda process, t: process.index(t),
    "1000 t": lambda process, t: 1000 * t,
    "sigma": lambda process, t: jnp.exp(_log_sigma(process, t)),
    "log(sigma) / 4": lambda process, t: 0.25 * _log_sigma(process, t),
    "1 - t": lambda process, t: 1 - t,
}


class WithTime(AbstractWrapper):
    r"""Wraps a model whose time input is not the time of the process, but for example an
    index or a noise level.

    !!! example

        ```python
        import gddim_eqx as gd
        import jax.numpy as jnp

        process = gd.VP.from_betas((2,), jnp.linspace(1e-4, 0.02, 1000))
        network = lambda index, x, args: jnp.zeros_like(x)
        model = gd.WithTime(process, network, "index")
        ```
    """

    process: AbstractProcess
    model: Callable
    time: TimeName | Callable = eqx.field(static=True)
    per_sample: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        process: AbstractProcess,
        model: Callable,
        time: TimeName | Callable,
        per_sample: bool = False,
    ):
        r"""**Arguments:**

        - `process`: the forward process.
        - `model`: called as `model(converted, u, args)`.
        - `time`: the time input of the model: a function of the process' time, or a name.
            - `"index"`: 0 to N - 1, for a [`gddim_eqx.DiscreteVP`][]. A float, which is
                whole at the times of indices; round it to look up an integer. Times
                before `process.t_min` have no index: an error, or index 0 where traced.
            - `"1000 t"`: 1000 times the time.
            - `"sigma"`: the noise-to-signal ratio; for [`gddim_eqx.EDM`][], the time.
            - `"log(sigma) / 4"`: a quarter of its logarithm: EDM's $c_\text{noise}$.
            - `"1 - t"`: for flows that run from noise at 0 to data at 1.
        - `per_sample`: whether the model expects one time per sample, as an array with
            the batch axes of the state. Most Flax and Keras networks do.

        Only the time is converted. A model that needs `"1 - t"` and predicts the flow also
        has a flow of the opposite sign: negate its output.

        **Raises:** `ValueError` for an unknown name, or one not defined for the process.
        """
        require_process(process)
        check_instance("model", model, Callable, "callable as `model(time, u, args)`")
        if not callable(time):
            check_choice("time", time, _times)
        if time == "index" and not isinstance(process, DiscreteVP):
            raise ValueError(
                f"Only discrete-time models have an 'index', not {type(process).__name__}. "
                "Use `VP.from_betas` or `VP.from_alphas_cumprod`."
            )
        if time in ("sigma", "log(sigma) / 4") and process.num_components != 1:
            raise ValueError(
                f"{show(time)} is for processes of one component, not for "
                f"{type(process).__name__}."
            )
        self.process, self.model, self.time = process, model, time
        self.per_sample = per_sample

    def convert(self, t: RealScalarLike) -> Inexact[Array, "..."]:
        """The time input of the model at a time of the process."""
        t = as_time(t)
        if callable(self.time):
            return jnp.asarray(self.time(t))
        return _times[self.time](self.process, t)

    @property
    def inner(self) -> Callable:
        return self.model

    def __call__(self, t: RealScalarLike, u: State, args: Args) -> State:
        time = self.convert(t)
        if self.per_sample:
            time = jnp.broadcast_to(time, batch_axes(u, self.process.shape))
        return self.model(time, u, args)
