import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from .._custom_types import Stochasticity
from .._misc import show


def as_lam(lam: Stochasticity) -> Stochasticity:
    """Check a stochasticity, and return it as a Python float, an array (possibly traced),
    or a function of time."""
    if callable(lam):
        return lam
    if isinstance(lam, (Array, np.ndarray)) and _is_real_scalar(lam):
        return _check(jnp.asarray(lam))
    if isinstance(lam, bool) or not isinstance(lam, (int, float, np.number)):
        raise ValueError(f"`lam` must be a number or a function of time; got {show(lam)}.")
    value = float(lam)
    if not 0 <= value < math.inf:
        raise ValueError(
            "`lam` must be finite and not negative: 0 is the probability flow, 1 the "
            f"reverse diffusion; got {lam}."
        )
    return value


def lam_at(lam: Stochasticity, t: Inexact[Array, ""]) -> Inexact[Array, ""]:
    """The stochasticity at a time."""
    if not callable(lam):
        return jnp.asarray(lam, t.dtype)
    value = jnp.asarray(lam(t))
    if not _is_real_scalar(value):
        raise ValueError(
            "`lam(t)` must be one real number; it returned an array of dtype "
            f"{value.dtype} and shape {value.shape}."
        )
    return _check(value.astype(t.dtype))


def _is_real_scalar(x) -> bool:
    return x.shape == () and jnp.issubdtype(x.dtype, jnp.number) and x.dtype.kind != "c"


def _check(lam):
    message = "`lam` must be finite and not negative."
    return eqx.error_if(lam, ~((lam >= 0) & (lam < jnp.inf)), message)
