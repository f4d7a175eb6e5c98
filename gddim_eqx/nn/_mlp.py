import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Inexact

from .._check import check_count
from .._custom_types import Key
from ._embedding import Fourier


class TimeMLP(eqx.Module):
    """The authors' network for points in the plane: a multilayer perceptron that sees the
    time and the point, each through a layer of its own.

    Called as `network(t, x)` on one sample, with `x` of shape `(size,)`;
    [`gddim_eqx.nn.NetworkModel`][] makes it the model of a process.

    The authors give it $999 t$ and Fourier features of scale 30 of that, so that times
    apart by 0.001 look unrelated. Here it sees $t$ itself, and a scale of 1 by default.
    """

    time_features: Fourier
    time_layers: tuple[eqx.nn.Linear, eqx.nn.Linear]
    first: eqx.nn.Linear
    layers: tuple[eqx.nn.Linear, ...]
    last: eqx.nn.Linear
    size: int = eqx.field(static=True)
    out_size: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    fourier_scale: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        out_size: int | None = None,
        *,
        key: Key,
        width: int = 256,
        depth: int = 2,
        fourier_scale: float | int = 1.0,
    ):
        """**Arguments:**

        - `size`: how many numbers one sample has: for points in the plane 2, or 4 for a
            process with a velocity.
        - `out_size`: of the output, by default the same.
        - `width`: of the layers, an even number.
        - `depth`: the number of layers after the first.
        - `fourier_scale`: the standard deviation of the frequencies of time.
        - `key`: a random key, for the initial parameters.

        **Raises:** `ValueError` for numbers that are not positive integers.
        """
        self.size, self.out_size = size, size if out_size is None else out_size
        self.width, self.depth, self.fourier_scale = width, depth, float(fourier_scale)
        for name in ("size", "out_size", "width", "depth"):
            check_count(name, getattr(self, name))
        if width % 2:
            raise ValueError(f"`width` must be even; got {width}.")
        features, *keys = jr.split(key, depth + 5)
        self.time_features = Fourier(width // 2, self.fourier_scale, key=features)
        self.time_layers = (
            eqx.nn.Linear(width, 2 * width, key=keys[0]),
            eqx.nn.Linear(2 * width, width, key=keys[1]),
        )
        self.first = eqx.nn.Linear(size, width, key=keys[2])
        self.layers = tuple(eqx.nn.Linear(width, width, key=k) for k in keys[4:])
        self.last = eqx.nn.Linear(width, self.out_size, key=keys[3])

    def __call__(
        self, t: Inexact[Array, ""], x: Inexact[Array, " size"], *, key: Key | None = None
    ) -> Inexact[Array, " out_size"]:
        """**Arguments:**

        - `t`: the time.
        - `x`: the sample, of shape `(size,)`. The output has its dtype.
        - `key`: ignored, as there is no dropout.
        """
        if x.shape != (self.size,):
            raise ValueError(
                f"This network is for inputs of shape {(self.size,)}; got {x.shape}. For a "
                "batch, use `jax.vmap`."
            )
        dtype = self.first.weight.dtype
        silu = jax.nn.silu
        first, second = self.time_layers
        time = second(silu(first(self.time_features(t.astype(dtype)))))
        h = silu(self.first(x.astype(dtype)) + time)
        for layer in self.layers:
            h = silu(layer(h))
        return self.last(h).astype(x.dtype)
