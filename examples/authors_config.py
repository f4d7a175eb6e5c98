"""Networks from configurations of the authors' code, to load their checkpoints:

network = authors_config.network(config.to_dict(), channels=6)
network = gd.checkpoints.load_authors("checkpoint_15", network)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax

import gddim_eqx as gd


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
    "normalization": "groupnorm",
    "nonlinearity": "swish",
    "progressive": "none",
    "scale_by_sigma": False,
    "conv_size": 3,
    "attention_type": "ddpm",
    # Data in [-1, 1], which the network does not shift.
    "centered": True,
}
# Entries that do not affect the network, or are read by `network`.
_other_entries = {
    *("name", "ema_rate", "num_scales", "sigma_min", "sigma_max", "beta_min", "beta_max"),
    *("progressive_combine", "conditional", "fir", "fir_kernel", "attn_resolutions"),
    *("image_size", "mixed_score", "m_inv", "beta_0", "beta_1", "vv_gamma"),
    *("is_R_rk", "R_dt", "used_cache", "x64", "sigma_blur_max"),
}


def network(
    config: Mapping[str, Any], channels: int, size: int | tuple[int, int] | None = None
) -> gd.nn.NCSNpp:
    """The network that a configuration describes, with shapes in place of parameters.

    **Arguments:**

    - `config`: the configuration, `config.to_dict()`, complete or only its entry `model`.
    - `channels`: the number of channels of a state: for CLD twice that of images.
    - `size`: the size of images, one number or height and width, for a configuration
        without `image_size`.

    **Raises:** `ValueError` for unknown, unsupported or missing entries.
    """
    if "model" in config:
        data = config.get("data", {})
        entries = {k: data[k] for k in ("image_size", "centered") if k in data}
        config = entries | dict(config["model"])
    if size is not None:
        config = {**config, "image_size": size}
    # The authors' code ignores case.
    config = {k: x.lower() if isinstance(x, str) else x for k, x in config.items()}
    for name, value in _fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`config` has {name}={config[name]!r}; only {value!r} is supported."
            )
    if unknown := sorted(set(config) - {*_options, *_fixed, *_other_entries}):
        raise ValueError(f"`config` has unknown entries: {unknown}.")
    needed = {*_options, "fir", "attn_resolutions", "image_size"} - {"fourier_scale"}
    if missing := sorted(needed - set(config)):
        raise ValueError(
            f"`config` lacks the entries {missing}. In place of image_size, pass `size`."
        )
    options = {ours: config[x] for x, ours in _options.items() if x in config}
    taps = config.get("fir_kernel", (1, 3, 3, 1)) if config["fir"] else None
    if not config.get("conditional", True):
        options["embedding"] = None
    images = config["image_size"]
    height, width = (images, images) if isinstance(images, int) else images
    heights = [height // 2**i for i in range(len(options["multipliers"]))]
    attention = [h for h in config["attn_resolutions"] if h in heights]
    options |= {"filter_taps": taps, "attention": attention}
    make = partial(gd.nn.NCSNpp, (height, width, channels), **options)
    return eqx.filter_eval_shape(make, key=jax.random.key(0))
