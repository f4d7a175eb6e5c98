"""Embeddings of conditions, which networks add to that of the time."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Inexact

from .._custom_types import Key, RealScalarLike
from .._misc import check_count


class LabelEmbedding(eqx.Module):
    """One vector per class, and one for no class, the label `num_classes`.

    A label outside [0, num_classes] gives NaN: under `jax.jit` nothing else can be said of
    it. [`gddim_eqx.nn.NetworkModel.check_args`][] rejects it by name.
    """

    weight: Float[Array, "classes size"]

    def __init__(self, num_classes: int, size: int, *, key: Key):
        self.weight = 0.02 * jr.normal(key, (num_classes + 1, size))

    @property
    def no_condition(self) -> int:
        return len(self.weight) - 1

    def check(self, condition: Any) -> None:
        """**Raises:** `ValueError` for labels out of range."""
        labels = jnp.asarray(condition)
        if wrong := labels[(labels < 0) | (labels > self.no_condition)].tolist():
            raise ValueError(
                f"Labels must be from 0 to {self.no_condition}, which stands for no class; "
                f"got {wrong[0]}."
            )

    def __call__(self, label: ArrayLike) -> Float[Array, " size"]:
        label = jnp.asarray(label)
        if label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(
                "The condition of this network is one integer label per sample; got "
                f"{label.dtype} of shape {label.shape}."
            )
        label = label.astype(int)
        # Negative indices would count from the end.
        label = jnp.where(label < 0, len(self.weight), label)
        return self.weight.at[label].get(mode="fill", fill_value=jnp.nan)


class ContextEmbedding(eqx.Module):
    """A linear map of a context vector; and a vector for no context, which is a vector of
    infinities."""

    layer: eqx.nn.Linear
    none: Float[Array, " size"]

    def __init__(self, context_size: int, size: int, *, key: Key):
        self.layer = eqx.nn.Linear(context_size, size, key=key)
        self.none = jnp.zeros(size)

    @property
    def no_condition(self) -> Float[Array, " context"]:
        return jnp.full(self.layer.in_features, jnp.inf)

    def __call__(self, context: Inexact[Array, " context"]) -> Float[Array, " size"]:
        if context.shape != (self.layer.in_features,):
            raise ValueError(
                f"The condition of this network is a vector of size "
                f"{self.layer.in_features} per sample; got shape {context.shape}."
            )
        context = context.astype(self.layer.weight.dtype)
        given = ~jnp.isinf(context).all()
        # Infinities are kept out of the layer, for the gradient.
        return jnp.where(given, self.layer(jnp.where(given, context, 0)), self.none)


Embedding = LabelEmbedding | ContextEmbedding


class AbstractConditionalNetwork(eqx.Module):
    """A network of one sample, which may take a condition."""

    first: eqx.AbstractVar[eqx.nn.Linear | eqx.nn.Conv2d]
    time_layers: eqx.AbstractVar[tuple[eqx.nn.Linear, eqx.nn.Linear] | None]
    condition: eqx.AbstractVar[Embedding | None]
    shape: eqx.AbstractVar[tuple[int, ...]]

    @property
    def no_condition(self) -> Any:
        """What stands for no condition: the label `num_classes`, or a vector of infinities;
        `None` for a network without conditions."""
        return None if self.condition is None else self.condition.no_condition

    @abc.abstractmethod
    def featurise(self, t: Array) -> Array | None:
        """The features of the time, of which `time_layers` make an embedding."""

    @abc.abstractmethod
    def run(self, x: Array, embedding: Any, key: Key | None) -> Array:
        """The output, given the embedding of the time and the condition."""

    def __call__(
        self,
        t: RealScalarLike,
        x: Inexact[Array, "..."],
        condition: Any = None,
        *,
        key: Key | None = None,
    ) -> Inexact[Array, "..."]:
        """**Arguments:**

        - `t`: the time of the process.
        - `x`: the input. The output has the same dtype, whatever the dtype of computation.
        - `condition`: the label or context vector, for a network that was made for one.
        - `key`: a random key for dropout; without it there is none.

        **Raises:** `ValueError` for an input of another shape, and for a condition that
        the network does not take, or lacks.
        """
        if x.shape != self.shape:
            raise ValueError(
                f"This network is for inputs of shape {self.shape}; got {x.shape}. For a "
                "batch, use `jax.vmap`."
            )
        features = self.featurise(jnp.asarray(t, self.first.weight.dtype))
        inputs = self, x, self._embed(features, condition)
        dtype = getattr(self, "dtype", None) or self.first.weight.dtype
        cast = lambda y: y.astype(dtype) if eqx.is_inexact_array(y) else y
        network, h, embedding = jtu.tree_map(cast, inputs)
        return network.run(h, embedding, key).astype(x.dtype)

    def _embed(self, features: Any, condition: Any) -> Any:
        added: Any = 0
        if self.condition is not None:
            if condition is None:
                raise ValueError(
                    "This network needs a condition: pass `args`, one entry per sample. "
                    "`network.no_condition` stands for none."
                )
            added = self.condition(condition)
        elif condition is not None:
            raise ValueError(
                "This network takes no condition, but one was given, as `args`. Make it "
                "with `num_classes` or `context_size`, or leave out `args`: beside a "
                "conditional model, by `gddim_eqx.with_args(flow, None)`."
            )
        if self.time_layers is None:
            return None
        first, second = self.time_layers
        return second(jax.nn.silu(first(features))) + added


def make_embedding(
    num_classes: int | None, context_size: int | None, size: int, *, key: Key
) -> tuple[Embedding | None, int | None, int | None]:
    """The embedding of a condition, if there is one, and the first two arguments."""
    if num_classes is not None and context_size is not None:
        raise ValueError("Pass `num_classes` or `context_size`, not both.")
    # Unlike any key that the other layers split off.
    key = jr.fold_in(key, 2**31 - 1)
    # The sizes are not left NumPy's integers, which files cannot hold.
    if num_classes is not None:
        check_count("num_classes", num_classes)
        return LabelEmbedding(num_classes, size, key=key), int(num_classes), None
    if context_size is not None:
        check_count("context_size", context_size)
        return ContextEmbedding(context_size, size, key=key), None, int(context_size)
    return None, None, None
