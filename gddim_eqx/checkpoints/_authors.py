"""The authors' checkpoints: training states of NCSN++, written by Flax 0.3."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._misc import renamed, show
from ..nn import NCSNpp


@renamed(config="network", size="an `NCSNpp` of this size")
def load_authors(path: str | Path, network: Callable[..., NCSNpp] | NCSNpp) -> NCSNpp:
    """Load a checkpoint written by the authors' code.

    Needs the package `msgpack` (`pip install "gddim_eqx[checkpoints]"`), but not Flax.

    **Arguments:**

    - `path`: the path of the file, such as `checkpoint_15`.
    - `network`: the architecture: one of `gddim_eqx.nn.presets`; or a network, whose
        parameters are not used. For the authors' configurations, see
        `examples/authors_config.py` in the repository.

    **Returns:** the network with the EMA of its parameters, in single precision. It
    predicts noise with respect to `frame="R"`; if the configuration has `mixed_score`,
    pass that to [`gddim_eqx.nn.NetworkModel`][]. The rest of the training state, such as
    the optimiser's, is not read.

    **Raises:** `ValueError` for a file that is not such a checkpoint, or is of another
    network, naming the first array that does not match.
    """
    path = Path(path)
    arrays = _read(path)
    if callable(network) and not isinstance(network, NCSNpp):
        network = eqx.filter_eval_shape(network, key=jax.random.key(0))
    if not isinstance(network, NCSNpp):
        raise ValueError(
            "`network` must be an `NCSNpp` or a function that makes one, such as "
            "`gddim_eqx.nn.presets.cifar10_cld`; for the authors' configurations, see "
            f"`examples/authors_config.py`; got {show(network)}."
        )
    if network.embedding is None:
        # The authors' networks have frequencies even if they ignore the time.
        arrays.pop(_FREQUENCIES, None)
    leaves, treedef = jtu.tree_flatten(network)
    has = {name: f"{x.dtype} of shape {x.shape}" for name, x in arrays.items()}
    needs = {}
    for name, index, axes in _arrays(treedef.unflatten(range(len(leaves)))):
        shape = leaves[index].shape
        # Here it may have trailing axes of length 1.
        there = tuple(shape[axis] for axis in np.argsort(axes))
        needs[name] = f"float32 of shape {there}"
        if has.get(name) == needs[name]:
            leaves[index] = jnp.asarray(arrays[name].transpose(axes).reshape(shape))
    for name in (*needs, *has):
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"{path}: the array {name!r} is {has.get(name, 'missing')}, but this "
                f"network needs {needs.get(name, 'none')}. {_other}"
            )
    return treedef.unflatten(leaves)


_FREQUENCIES = "GaussianFourierProjection_0/W"
_other = "The checkpoint is of another network than `network`."


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the parameters' EMA, by names such as `Dense_0/kernel`."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError(
            "To read the authors' checkpoints, install `gddim_eqx[checkpoints]`."
        ) from error

    def array(code, data):
        # The codes of arrays and of scalars; 2 would be a complex number.
        if code not in (1, 3):
            raise ValueError(f"unknown extension type {code}")
        shape, dtype, buffer = msgpack.unpackb(data)
        return np.frombuffer(buffer, jnp.dtype(dtype)).reshape(shape)

    try:
        state = msgpack.unpackb(path.read_bytes(), ext_hook=array, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint written by Flax: {error}. Download or "
            "copy it again."
        ) from error
    average = state.get("params_ema") if isinstance(state, dict) else None
    if not isinstance(average, dict):
        keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} has no averaged parameters, `params_ema`, unlike the authors' "
            f"checkpoints. It holds {keys}."
        )
    leaves = jtu.tree_leaves_with_path(average)
    return {jtu.keystr(x, simple=True, separator="/"): np.asarray(y) for x, y in leaves}


def _arrays(network: NCSNpp) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Every array of a network: its name in a checkpoint, the array, and the permutation of
    the axes there."""
    frequencies = getattr(network.time_features, "frequencies", None)
    if network.time_layers is not None and frequencies is not None:
        yield _FREQUENCIES, frequencies, (0,)
    for name, layer, (weight, bias), axes in _layers(network):
        yield f"{name}/{weight}", layer.weight, axes
        yield f"{name}/{bias}", layer.bias, (0,)


# The names of a layer's two arrays, and the permutation of the first one's axes.
_dense = ("kernel", "bias"), (1, 0)
_norm = ("scale", "bias"), (0,)
_conv = ("kernel", "bias"), (3, 2, 0, 1)
_filtered = ("weight", "bias"), (3, 2, 0, 1)
_pointwise = ("W", "b"), (1, 0)


def _layers(network: NCSNpp) -> Iterator[tuple[str, Any, tuple[str, str], tuple[int, ...]]]:
    """Every layer. Flax numbers layers of one kind within a module in the order of their
    use."""
    for i, layer in enumerate(network.time_layers or ()):
        yield f"Dense_{i}", layer, *_dense
    yield "Conv_0", network.first, *_conv
    kind, shortcut, form = {
        "biggan": ("BigGAN", "Conv_2", _conv),
        "ddpm": ("DDPM", "NIN_0", _pointwise),
    }[network.block]
    for i, block in enumerate(network.blocks):
        name = f"ResnetBlock{kind}pp_{i}"
        yield f"{name}/GroupNorm_0", block.first_normalisation, *_norm
        yield f"{name}/Conv_0", block.first_convolution, *_conv
        if block.embedding is not None:
            yield f"{name}/Dense_0", block.embedding, *_dense
        yield f"{name}/GroupNorm_1", block.second_normalisation, *_norm
        yield f"{name}/Conv_1", block.second_convolution, *_conv
        if block.shortcut is not None:
            yield f"{name}/{shortcut}", block.shortcut, *form
    for i, attention in enumerate(network.attentions):
        name = f"AttnBlockpp_{i}"
        yield f"{name}/GroupNorm_0", attention.normalisation, *_norm
        for j, part in enumerate(("query", "key", "value", "output")):
            yield f"{name}/NIN_{j}", getattr(attention, part), *_pointwise
    for kind in ("Downsample", "Upsample"):
        for i, layer in enumerate(getattr(network, f"{kind.lower()}s")):
            if layer.convolution is not None and layer.taps is None:
                yield f"{kind}_{i}/Conv_0", layer.convolution, *_conv
            elif layer.convolution is not None:
                yield f"{kind}_{i}/Conv2d_0", layer.convolution, *_filtered
    yield "GroupNorm_0", network.normalisation, *_norm
    yield "Conv_1", network.last, *_conv
