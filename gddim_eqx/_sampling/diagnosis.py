import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree

from .._custom_types import Args, Key
from .._linear import apply, at_least_single, subtract
from .._process import log_snr_at_start
from .._sharding import Placement
from .._term import as_model, ProbabilityFlow, without_errors
from .grid import time_grid


# Of the exact prediction it is at most 1 on average. Here it was up to 1.3 for exact
# models, and rose to 80 for a network that spoiled its samples.
_most_noise = 5.0


def find_fault(
    flow: ProbabilityFlow,
    args: Args,
    number: int,
    dtype: Any,
    key: Key,
    placement: Placement | None,
) -> str:
    """Where on the time axis the predictions of a model are implausible, and what to do.

    Without a solver, which might be at fault itself: data, zeros at first, are noised and
    predicted at one time after the other, each time anew.

    **Arguments:**

    - `flow`, `args`: the model, for batches of size `number`."""
    x = jnp.zeros((number, *flow.process.shape), dtype)
    x = x if placement is None else placement.shard(x)
    ts, most = time_grid(flow.process, 20, dtype=dtype), most_expected(flow)
    # A prediction that is refused is implausible.
    data, noise = _sizes(without_errors(flow), x, ts, key, args)
    check = (
        "Check `predicts`, the process, and what the network is called with in place of "
        "the time"
    )
    train = (
        f"{check}. Otherwise train it in `gddim_eqx.nn.NetworkModel(process, network, "
        "data_std=...)`, which preconditions it at both ends, or for longer; and scale the "
        "data to about unit variance. For a network as it is, a process with a larger "
        "`t_min` may help."
    )
    kinds = ("high", "data", "noise", most), ("low", "noise", "data", _most_noise)
    for t, *sizes in zip(ts.tolist(), data.tolist(), noise.tolist()):
        if not math.isfinite(sizes[0]):
            return f"At t = {t:.2g} the predictions of the model are not finite. {check}."
        for size, (level, kind, other, bound) in zip(sizes, kinds):
            if not size <= bound:
                return (
                    f"The model is off at {level} noise levels: at t = {t:.2g} its {kind} "
                    f"predictions have a root mean square of {size:.1e}, more than about "
                    f"{bound:.1e}. There, a small error in the {other} is a large one in "
                    f"the {kind}. {train}"
                )
    return (
        "The predictions of the model are plausible at all noise levels, so the solver "
        "diverges: take more steps. `GDDIM()` needs the fewest."
    )


def most_expected(flow: ProbabilityFlow) -> float:
    """The root mean square above which samples are implausibly large: a hundred times the
    standard deviation of the data, if the model knows it; or that of data whose
    signal-to-noise ratio at `t_max` would be 0.01, but at most a hundred."""
    if (data := as_model(flow.model).normal_data(flow.process)) is not None:
        return 100.0 * float(data.std)
    return 0.1 * math.exp(min(-log_snr_at_start(flow.process), math.log(1000)))


@eqx.filter_jit
def _sizes(flow, x, ts, key, args):
    """The root mean squares of the predictions of data and noise at each time."""
    process = flow.process

    def at(x, given):
        t, key = given
        u, _ = process.perturb(key, x, t)
        initial = flow.denoised(t, u, args)
        mean = apply(process.transition(t, jnp.zeros_like(t)), initial)
        noise = apply(process.factor(t).inverse(), subtract(u, mean))
        x = process.decode(initial)
        return x, (_size(x), _size(noise))

    return jax.lax.scan(at, x, (ts, jr.split(key, len(ts))))[1]


def _size(state):
    values, _ = ravel_pytree(state)
    return jnp.sqrt((values.astype(at_least_single(values.dtype)) ** 2).mean())
