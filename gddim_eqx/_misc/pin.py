import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


@jax.custom_jvp
def pin(known: ArrayLike, value: ArrayLike, smooth: Array) -> Array:
    """`value` where it is `known` exactly, as there `smooth` equals it only up to rounding;
    elsewhere `smooth`. The derivative is that of `smooth` everywhere: with a `where` it
    would be zero at the known points."""
    return jnp.where(known, value, smooth)


@pin.defjvp
def _(primals, tangents):
    return pin(*primals), tangents[2]
