import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array

from .._custom_types import Key
from .._misc import as_shape, check_count
from ._condition import AbstractConditionalNetwork, Embedding, make_embedding
from ._embedding import Fourier


class TimeMLP(AbstractConditionalNetwork):
    """The authors' network for points in the plane: a multilayer perceptron of the time and
    the point, each with an input layer of its own. It also accepts small images.

    Called as `network(t, x)` on one sample, or as `network(t, x, condition)`;
    [`gddim_eqx.nn.NetworkModel`][] turns it into the model of a process.

    The authors use Fourier features of $999 t$ with scale 30, so that times 0.001 apart
    look unrelated. Here they are of $t$ itself, by default with scale 1.
    """

    time_features: Fourier
    time_layers: tuple[eqx.nn.Linear, eqx.nn.Linear]
    first: eqx.nn.Linear
    layers: tuple[eqx.nn.Linear, ...]
    last: eqx.nn.Linear
    condition: Embedding | None
    shape: tuple[int, ...] = eqx.field(static=True)
    out_shape: tuple[int, ...] = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    fourier_scale: float = eqx.field(static=True)
    num_classes: int | None = eqx.field(static=True)
    context_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        shape: int | Sequence[int],
        out_shape: int | Sequence[int] | None = None,
        *,
        key: Key,
        width: int = 256,
        depth: int = 2,
        fourier_scale: float | int = 1.0,
        num_classes: int | None = None,
        context_size: int | None = None,
    ):
        """**Arguments:**

        - `shape`: the shape of one sample: for points in the plane 2, or 4 for a process
            with a velocity.
        - `out_shape`: the shape of the output; by default the same.
        - `width`: the width of the layers, an even number.
        - `depth`: the number of layers after the first.
        - `fourier_scale`: the standard deviation of the frequencies of the time embedding.
        - `num_classes`: for data with labels, from 0 to `num_classes - 1`.
        - `context_size`: for data with a context vector, its size.
        - `key`: a random key, for the initial parameters.

        **Raises:** `ValueError` for numbers that are not positive integers.
        """
        self.shape = as_shape(shape)
        self.out_shape = self.shape if out_shape is None else as_shape(out_shape)
        self.width, self.depth, self.fourier_scale = width, depth, float(fourier_scale)
        for name in ("width", "depth"):
            check_count(name, getattr(self, name))
        size, out_size = math.prod(self.shape), math.prod(self.out_shape)
        check_count("shape", size)
        check_count("out_shape", out_size)
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
        self.last = eqx.nn.Linear(width, out_size, key=keys[3])
        made = make_embedding(num_classes, context_size, width, key=key)
        self.condition, self.num_classes, self.context_size = made

    def featurise(self, t: Array) -> Array:
        return self.time_features(t)

    def run(self, x: Array, embedding: Array, key: Key | None) -> Array:
        h = jax.nn.silu(self.first(x.ravel()) + embedding)
        for layer in self.layers:
            h = jax.nn.silu(layer(h))
        return self.last(h).reshape(self.out_shape)
