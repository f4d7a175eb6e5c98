"""The authors' checkpoints: training states of NCSN++, written by Flax 0.3."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._misc import show
from ..nn import NCSNpp


def load_authors(
    path: str | Path,
    config: Mapping[str, Any] | Callable[..., NCSNpp] | NCSNpp,
    *,
    size: int | tuple[int, int] | None = None,
) -> NCSNpp:
    """Load a checkpoint written by the authors' code.

    Needs the package `msgpack` (`pip install "gddim_eqx[checkpoints]"`), but not Flax.

    **Arguments:**

    - `path`: the path of the file, such as `checkpoint_15`.
    - `config`: the architecture: one of `gddim_eqx.nn.presets`; or the authors'
        configuration as a mapping (their `config.to_dict()`), complete or only its entry
        `model`; or a network, whose parameters are not used.
    - `size`: the size of images, one number or height and width, for a configuration
        without `image_size`. By default it is inferred from where the checkpoint has
        attention; if that is ambiguous, 32x32 is preferred.

    **Returns:** the network with the EMA of its parameters, in single precision. It
    predicts noise with respect to `factor="R"`; if the configuration has `mixed_score`,
    pass that to [`gddim_eqx.nn.NetworkModel`][]. The rest of the training state, such as
    the optimiser's, is not read.

    **Raises:** `ValueError` for a file that is not such a checkpoint, or is of another
    network than `config`, naming the first array that does not match; or for a
    configuration with unknown or unsupported entries.
    """
    path = Path(path)
    arrays = _read(path)
    if isinstance(config, NCSNpp):
        network = config
    elif isinstance(config, Mapping):
        network = _from_config(_model_entries(config), path, arrays, size)
    elif callable(config):
        network = eqx.filter_eval_shape(config, key=jax.random.key(0))
    else:
        network = None
    if not isinstance(network, NCSNpp):
        raise ValueError(
            "`config` must be a mapping (`to_dict()` of a `ConfigDict`), an `NCSNpp`, "
            "or a function that makes one, such as `gddim_eqx.nn.presets.cifar10_cld`; got "
            f"{type(config).__name__}."
        )
    if network.embedding is None:
        # The authors' networks have frequencies even if they ignore the time.
        arrays.pop(_FREQUENCIES, None)
    leaves, treedef = jtu.tree_flatten(network)
    for name, index, axes in _arrays(treedef.unflatten(range(len(leaves)))):
        shape = _theirs(leaves[index].shape, axes)
        if name not in arrays:
            raise ValueError(
                f"{path} lacks the array {name!r} of shape {shape}, which this network "
                f"needs. {_other}"
            )
        value = arrays.pop(name)
        if value.shape != shape or value.dtype != np.float32:
            raise ValueError(
                f"{path}: the array {name!r} is {value.dtype} of shape {value.shape}, but "
                f"this network has float32 of shape {shape}. {_other}"
            )
        value = value.transpose(axes).reshape(leaves[index].shape)
        leaves[index] = jnp.asarray(value)
    if arrays:
        name, value = next(iter(arrays.items()))
        raise ValueError(
            f"{path} has an array {name!r} of shape {value.shape}, which this network does "
            f"not have. {_other}"
        )
    return treedef.unflatten(leaves)


_FREQUENCIES = "GaussianFourierProjection_0/W"
_other = "The checkpoint is of another network than `config`, or another `size`."


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
    arrays = {}

    def collect(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}/")
            elif isinstance(value, np.ndarray):
                arrays[f"{prefix}{key}"] = value
            else:
                raise ValueError(
                    f"{path}: {prefix}{key!s} is not an array but {type(value).__name__}."
                )

    collect(average, "")
    return arrays


# A name in a checkpoint, an array of a network, and the permutation of the axes there.
_Array = tuple[str, Any, tuple[int, ...]]


def _theirs(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a checkpoint of an array that has `shape` here. Here it may have
    trailing axes of length 1."""
    return tuple(shape[axis] for axis in np.argsort(axes))


def _arrays(network: NCSNpp) -> Iterator[_Array]:
    """Every array of a network. Flax numbers layers of one kind within a module in the
    order of their use."""
    if network.time_layers is not None:
        frequencies = getattr(network.time_features, "frequencies", None)
        if frequencies is not None:
            yield _FREQUENCIES, frequencies, (0,)
        for i, layer in enumerate(network.time_layers):
            yield from _dense(f"Dense_{i}", layer)
    yield from _convolution("Conv_0", network.first)
    kind = {"biggan": "BigGAN", "ddpm": "DDPM"}[network.block]
    for i, block in enumerate(network.blocks):
        name = f"ResnetBlock{kind}pp_{i}"
        yield from _normalisation(f"{name}/GroupNorm_0", block.first_normalisation)
        yield from _convolution(f"{name}/Conv_0", block.first_convolution)
        if block.embedding is not None:
            yield from _dense(f"{name}/Dense_0", block.embedding)
        yield from _normalisation(f"{name}/GroupNorm_1", block.second_normalisation)
        yield from _convolution(f"{name}/Conv_1", block.second_convolution)
        if block.shortcut is not None and network.block == "biggan":
            yield from _convolution(f"{name}/Conv_2", block.shortcut)
        elif block.shortcut is not None:
            yield from _pointwise(f"{name}/NIN_0", block.shortcut)
    for i, attention in enumerate(network.attentions):
        name = f"AttnBlockpp_{i}"
        yield from _normalisation(f"{name}/GroupNorm_0", attention.normalisation)
        layers = (attention.query, attention.key, attention.value, attention.output)
        for j, layer in enumerate(layers):
            yield from _pointwise(f"{name}/NIN_{j}", layer)
    for kind in ("Downsample", "Upsample"):
        for i, layer in enumerate(getattr(network, f"{kind.lower()}s")):
            if layer.convolution is None:
                continue
            if layer.taps is None:
                yield from _convolution(f"{kind}_{i}/Conv_0", layer.convolution)
            else:
                name = f"{kind}_{i}/Conv2d_0"
                yield from _convolution(name, layer.convolution, "weight")
    yield from _normalisation("GroupNorm_0", network.normalisation)
    yield from _convolution("Conv_1", network.last)


def _dense(name: str, layer: eqx.nn.Linear) -> Iterator[_Array]:
    yield f"{name}/kernel", layer.weight, (1, 0)
    yield f"{name}/bias", layer.bias, (0,)


def _normalisation(name: str, layer: eqx.nn.GroupNorm) -> Iterator[_Array]:
    yield f"{name}/scale", layer.weight, (0,)
    yield f"{name}/bias", layer.bias, (0,)


def _convolution(
    name: str, layer: eqx.nn.Conv2d, weight: str = "kernel"
) -> Iterator[_Array]:
    yield f"{name}/{weight}", layer.weight, (3, 2, 0, 1)
    yield f"{name}/bias", layer.bias, (0,)


def _pointwise(name: str, layer: eqx.nn.Conv2d) -> Iterator[_Array]:
    yield f"{name}/W", layer.weight, (1, 0)
    yield f"{name}/b", layer.bias, (0,)


# Our names for entries of the authors' `config.model`.
_options = {
    "nf": "features",
    "ch_mult": "multipliers",
    "num_res_blocks": "num_blocks",
    "resblock_type": "block",
    "resamp_with_conv": "resample_with_convolution",
    "progressive_input": "progressive_input",
    "embedding_type": "embedding",
    "fourier_scale": "fourier_scale",
    "dropout": "dropout",
    "skip_rescale": "skip_rescale",
    "init_scale": "init_scale",
}
# Entries with a single supported value.
_fixed = {
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "progressive": "none",
    "scale_by_sigma": False,
    "conv_size": 3,
    "attention_type": "ddpm",
}
# Entries that do not affect the network, or are read by `_from_config`.
_other_entries = {
    *("name", "ema_rate", "num_scales", "sigma_min", "sigma_max", "beta_min", "beta_max"),
    *("progressive_combine", "conditional", "fir", "fir_kernel", "attn_resolutions"),
    *("image_size", "mixed_score", "m_inv", "beta_0", "beta_1", "vv_gamma"),
    *("is_R_rk", "R_dt", "used_cache", "x64", "sigma_blur_max"),
}


def _model_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries about the network, of a whole configuration or of its `model`."""
    if "model" not in config:
        return dict(config)
    data = config.get("data", {})
    if not data.get("centered", True):
        raise ValueError(
            "`config` has data.centered=False, for a network that shifts its input from "
            "[0, 1] to [-1, 1]. Only networks for data in [-1, 1] are supported."
        )
    return {"image_size": data.get("image_size"), **config["model"]}


def _from_config(
    config: Mapping[str, Any],
    path: Path,
    arrays: dict[str, np.ndarray],
    size: int | tuple[int, int] | None,
) -> NCSNpp:
    """The network, without values, that the authors' configuration describes."""
    # The authors' code ignores case in these.
    lower = {
        name: str(config[name]).lower()
        for name in (
            *("resblock_type", "nonlinearity", "embedding_type"),
            *("progressive", "progressive_input"),
        )
        if name in config
    }
    config = {**config, **lower}
    for name, value in _fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`config` has {name}={show(config[name])}; only {value!r} is supported."
            )
    unknown = set(config) - {*_options, *_fixed, *_other_entries}
    if unknown:
        raise ValueError(f"`config` has unknown entries: {sorted(unknown)}.")
    missing = {*_options, "fir", "attn_resolutions"} - {*config, "fourier_scale"}
    if missing:
        raise ValueError(f"`config` lacks the entries {sorted(missing)}.")
    options = {
        ours: config[theirs] for theirs, ours in _options.items() if theirs in config
    }
    options["filter_taps"] = (
        config.get("fir_kernel", (1, 3, 3, 1)) if config["fir"] else None
    )
    if not config.get("conditional", True):
        options["embedding"] = None
    kernel = arrays.get("Conv_0/kernel")
    if kernel is None or kernel.ndim != 4:
        raise ValueError(f"{path}: there is no convolution 'Conv_0/kernel'. {_other}")

    def network(height: int, width: int) -> NCSNpp:
        heights = [height // 2**i for i in range(len(options["multipliers"]))]
        attention = [h for h in config["attn_resolutions"] if h in heights]
        make = partial(
            NCSNpp, (height, width, kernel.shape[2]), attention=attention, **options
        )
        return eqx.filter_eval_shape(make, key=jax.random.key(0))

    if size is None:
        size = config.get("image_size")
    if size is not None:
        return network(*((size, size) if isinstance(size, int) else size))
    smallest = 2 ** (len(options["multipliers"]) - 1)
    sizes = [n for n in (32, 64, 128, 256, 16, 8) if n % smallest == 0]
    networks = [network(n, n) for n in sizes]
    return next((n for n in networks if _attends_as(n, arrays)), networks[0])


def _attends_as(network: NCSNpp, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the attention layers of a network have the shapes of the checkpoint's."""
    theirs = {n: x.shape for n, x in arrays.items() if n.startswith("AttnBlockpp")}
    ours = {n: _theirs(x.shape, axes) for n, x, axes in _arrays(network)}
    ours = {n: shape for n, shape in ours.items() if n.startswith("AttnBlockpp")}
    return ours == theirs
