import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Inexact, Integer, UInt8

from ._custom_types import Key
from ._misc import as_dtype, as_floats, as_shape, check_count, check_key


def dequantise(
    key: Key, levels: Integer[Array, "*shape"], num_levels: int = 256, dtype=None
) -> Inexact[Array, "*shape"]:
    """Dequantise pixel levels: add uniform noise that fills each level, and map to [-1, 1].

    Discrete data have no density. With this noise, the expected log density is a lower
    bound on the log probability of the levels.

    **Arguments:**

    - `key`: a random key.
    - `levels`: integers from 0 to `num_levels - 1`.
    - `num_levels`: the number of levels.
    - `dtype`: the dtype of the result; by default JAX's default floating dtype.

    **Returns:** numbers in [-1, 1], of the same shape.

    **Raises:** `ValueError` if the levels are not integers. An error is also raised, even
    under `jax.jit`, if they are not from 0 to `num_levels - 1`.
    """
    check_key(key)
    levels = jnp.asarray(levels)
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise ValueError(f"`levels` must be integers; got {levels.dtype}.")
    check_count("num_levels", num_levels)
    dtype = as_dtype(float if dtype is None else dtype)
    held = jnp.iinfo(levels.dtype)
    if held.min < 0 or held.max >= num_levels:
        outside = (levels < 0) | (levels >= num_levels)
        levels = eqx.error_if(
            levels,
            outside,
            f"`levels` must be from 0 to {num_levels - 1}, for `num_levels={num_levels}`.",
        )
    noise = jr.uniform(key, levels.shape, dtype)
    return 2 * (levels.astype(dtype) + noise) / num_levels - 1


def to_uint8(x: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Samples as images: numbers in [-1, 1] become the nearest of the levels 0 to 255.

    Samples of a model go a little beyond [-1, 1], where they are clipped.

    !!! example

        ```python
        images = gd.to_uint8(x)  # (number, height, width, channels)
        PIL.Image.fromarray(np.hstack(images).squeeze()).save("samples.png")
        ```

    **Arguments:**

    - `x`: samples, such as those of [`gddim_eqx.sample`][].

    **Returns:** an array of NumPy.

    **Raises:** `ValueError` for integers, or numbers that are not finite.
    """
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"Images in [-1, 1] must be floating-point numbers; got {x.dtype}."
        )
    if not np.isfinite(x).all():
        raise ValueError("The images are not finite.")
    if x.dtype.itemsize < 4:
        # In half precision the sum would be rounded by more than a level.
        x = x.astype(np.float32)
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def bits_per_dimension(
    log_likelihood: Inexact[Array, "*batch"], shape: tuple[int, ...], num_levels: int = 256
) -> Inexact[Array, "*batch"]:
    """The negative log likelihood of dequantised data, in bits per pixel and channel.

    **Arguments:**

    - `log_likelihood`: the log likelihood, in nats, of data on [-1, 1], as from
        [`gddim_eqx.dequantise`][].
    - `shape`: the shape of one data sample.
    - `num_levels`: the number of levels.

    **Returns:** bits per dimension; log2 of `num_levels` for the uniform density.

    **Raises:** `ValueError` if `num_levels` is not a positive integer.
    """
    check_count("num_levels", num_levels)
    size = math.prod(as_shape(shape))
    nats = -as_floats("log_likelihood", log_likelihood) / size + math.log(num_levels / 2)
    return nats / math.log(2)


def highest_level(dtype) -> int:
    """The level of a saturated pixel, of images whose range is that of their dtype."""
    known = {"bool": 1, "uint8": 255, "uint16": 65535}
    if str(dtype) not in known:
        raise ValueError(
            "Images must have dtype uint8 or uint16, whose levels are scaled to [-1, 1], "
            f"or a floating-point dtype; got {dtype}, whose range is not known. Convert "
            "them to one of these."
        )
    return known[str(dtype)]
