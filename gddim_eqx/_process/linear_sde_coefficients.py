from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .._linear import BlockLinearOperator
from .._misc import as_floats, check_instance, check_not_traced


def as_blocks(value: "ArrayLike | BlockLinearOperator", dtype) -> Array:
    """The blocks of a drift, diffusion or covariance in any of the accepted forms."""
    if isinstance(value, BlockLinearOperator):
        value = value.blocks
    value = jnp.asarray(value, dtype)
    return value[None, None] if value.ndim == 0 else value


def _known_blocks(name: str, value: Any) -> np.ndarray:
    """The blocks of an argument that must be real and static."""
    value = value.blocks if isinstance(value, BlockLinearOperator) else value
    check_not_traced(name, value)
    return np.asarray(as_blocks(as_floats(name, value), np.float64))


class Coefficients:
    """The drift and noise of a `LinearSDE`, on the host in float64, block axes last: of
    the shape `batch`, `(*spectrum, n, n)`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        drift: Callable,
        diffusion: Callable,
        initial_covariance: "ArrayLike | BlockLinearOperator | None",
    ):
        self.drift, self.diffusion = drift, diffusion
        for name, fn in (("drift", drift), ("diffusion", diffusion)):
            check_instance(name, fn, Callable, "a function of time")
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            values = dict(drift=drift(jnp.zeros(())), diffusion=diffusion(jnp.zeros(())))
            if initial_covariance is not None:
                values["initial_covariance"] = initial_covariance
            values = {name: _known_blocks(name, value) for name, value in values.items()}
        spectrum, n = (), len(values["drift"])
        for name, value in values.items():
            if value.shape[:2] != (n, n):
                raise ValueError(
                    f"`{name}` must be made of {n} x {n} blocks, like the drift; got an "
                    f"array of shape {value.shape}."
                )
            BlockLinearOperator(jnp.asarray(value), shape)  # checks the spectrum
            spectrum = np.broadcast_shapes(spectrum, value.shape[2:])
        self.num_components, self.batch = n, (*spectrum, n, n)
        initial = values.get("initial_covariance", np.zeros((n, n)))
        self.initial_covariance = self._to_host(initial[None])[0]

        functions = drift, diffusion
        at_time = lambda t: [as_blocks(fn(t), np.float64) for fn in functions]
        self._evaluate = jax.jit(jax.vmap(at_time))

    def _to_host(self, blocks) -> np.ndarray:
        blocks = np.asarray(blocks)
        rank, number, n = len(self.batch) - 2, len(blocks), self.num_components
        blocks = blocks.reshape(number, n, n, *(blocks.shape[3:] or (1,) * rank))
        blocks = np.moveaxis(blocks, (1, 2), (-2, -1))
        return np.broadcast_to(blocks, (number, *self.batch))

    def __call__(self, times: np.ndarray) -> dict[str, np.ndarray]:
        r"""The `drift` $F$, and $G G^\top$ of the `diffusion`, at several times."""
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            blocks = self._evaluate(times)
        drift, diffusion = map(self._to_host, blocks)
        values = dict(drift=drift, diffusion=diffusion)
        for name, value in values.items():
            finite = np.isfinite(value).reshape(len(times), -1).all(1)
            if not finite.all():
                raise ValueError(
                    f"`{name}` must be finite on the whole of [0, t_end]; it is not near "
                    f"t = {float(times[np.argmin(finite)]):.6g}."
                )
        return values | dict(diffusion=diffusion @ diffusion.mT)

    def rounding_errors(self, left: float, right: float) -> dict[str, np.ndarray]:
        """Estimates of the rounding errors of both on an interval, row by row: their sixth
        differences over so small a distance that those of smooth functions are
        negligible."""
        number, width = 16, right - left
        centres = left + width * (np.arange(number) + 0.5) / number
        weights = np.array([1, -6, 15, -20, 15, -6, 1]) / np.sqrt(924)
        shifted = [self(centres + width / 1000 * i) for i in range(-3, 4)]
        errors = {}
        for name in shifted[0]:
            differences = sum(w * values[name] for w, values in zip(weights, shifted))
            # The median, as a jump affects very few of these differences.
            errors[name] = np.median(np.abs(differences), axis=0).max(-1)
        return errors
