import functools as ft
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._misc import check_count, show
from .._sharding import is_key
from ._trainer import copy, TrainState


class Checkpoints:
    """Checkpoints of a training run in a directory, saved with Orbax: asynchronously and
    atomically, by all processes together.

    Needs Orbax (`pip install "gddim_eqx[train]"`).
    """

    def __init__(
        self,
        directory: str | Path,
        config: Mapping[str, Any],
        keep: int = 3,
        keep_every: int | None = None,
    ):
        """**Arguments:**

        - `directory`: created if missing.
        - `config`: what defines the run, serialisable as JSON, such as the
            `fingerprint()` of the [`gddim_eqx.training.Batches`][]. `restore` refuses
            checkpoints with another config, so leave out what may change, such as the
            number of steps.
        - `keep`: the number of latest checkpoints to keep.
        - `keep_every`: also keep, permanently, the checkpoints of steps that are multiples
            of this.

        **Raises:** `ValueError` for a directory that is a file, or a config that cannot be
        serialised as JSON.
        """
        ocp = _orbax()
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file; checkpoints need a directory.")
        try:
            self.config = json.loads(json.dumps(dict(config)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`config` must be serialisable as JSON: {error}.") from error
        policies = ocp.checkpoint_managers.preservation_policy
        check_count("keep", keep)
        policy = policies.LatestN(keep)
        if keep_every is not None:
            policy = policies.AnyPreservationPolicy(
                [policy, policies.EveryNSteps(keep_every)]
            )
        # Orbax can do this too, in a thread that fails when Python exits first.
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Save a state in the background, unless its step already has a checkpoint.

        **Arguments:**

        - `state`: a state, whose buffers may be reused as soon as this returns.

        **Raises:** `OSError` if this or the previous save failed. Earlier checkpoints
        remain.
        """
        ocp, step = _orbax(), int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = {name: _plain(x) for name, x in _named(state).items()}
        about = {
            "config": self.config,
            "sums": _as_numbers(_sums(arrays)),
            "kinds": _kinds(_named(state)),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        self._attempt(lambda: self._manager.save(step, args=items))

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """Restore the state of a step.

        **Arguments:**

        - `state`: a state of the same trainer, for instance from `init`. The result has its
            sharding, however many devices it was saved from.
        - `step`: by default the latest.

        **Raises:** `ValueError` if there is no checkpoint, if it is damaged, or if it is of
        another config, network, optimiser or precision. It names the first array that does
        not match, and none is read.
        """
        ocp, steps = _orbax(), self.steps
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise ValueError(
                f"{self.directory} has no checkpoint of step {step}; it has {steps}."
            )
        folder = self.directory / str(step)
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            config, sums = about["config"], about["sums"]
        except Exception as error:
            raise _damaged(folder, error) from error
        self._check_config(config, folder)
        if "kinds" not in about:
            raise ValueError(
                f"{folder} was saved by an earlier version of gddim_eqx, which this one "
                "cannot read. Use another directory."
            )
        wanted = _named(state)
        _check_kinds(about["kinds"], _kinds(wanted), folder)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in ((name, _plain(x)) for name, x in wanted.items())
        }
        try:
            arrays = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
            for name, value in _as_numbers(_sums(arrays)).items():
                if value != sums[name]:
                    raise ValueError(f"the array {name} is not what was saved")
        except Exception as error:
            raise _damaged(folder, error) from error
        values = iter(
            jr.wrap_key_data(arrays[name], impl=jr.key_impl(x))
            if is_key(x)
            else arrays[name]
            for name, x in wanted.items()
        )
        # No memory is shared with `state`.
        return jtu.tree_map(
            lambda x: next(values) if eqx.is_array(x) and x.size else copy(x), state
        )

    def _check_config(self, config: Any, folder: Path) -> None:
        # Compared as text, as NaN is not equal to itself.
        text = ft.partial(json.dumps, sort_keys=True)
        if text(config) != text(self.config):
            there, here, absent = _flat(config), _flat(self.config), "absent"
            differences = [
                f"{name}: {show(there.get(name, absent))} there, "
                f"{show(here.get(name, absent))} here"
                for name in sorted({*there, *here})
                if text(there.get(name, absent)) != text(here.get(name, absent))
            ]
            raise ValueError(
                f"{folder} was saved with another config ({'; '.join(differences)}). Use "
                "that one, or another directory."
            )

    def wait(self) -> None:
        """Wait for pending saves. **Raises:** `OSError` if one failed."""
        self._attempt(self._manager.wait_until_finished)

    def close(self) -> None:
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _attempt(self, function):
        try:
            return function()
        except Exception as error:
            raise OSError(
                f"Could not save to {self.directory}: {_brief(error)}. Is the disk full? "
                f"The checkpoints of steps {self.steps} are intact; start again to resume "
                "from the last."
            ) from error


def _orbax():
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "To save the state of training, install `gddim_eqx[train]`."
        ) from error
    return ocp


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """All values in nested dictionaries, by names such as `optimiser.warmup`."""
    if not isinstance(config, dict) or not config:
        return {name: config}
    parts = [
        _flat(value, f"{name}.{key}" if name else key) for key, value in config.items()
    ]
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} cannot be read: {_brief(error)}. If it is damaged, delete it to resume "
        "from the previous checkpoint."
    )


def _brief(error: Exception) -> str:
    # TensorStore appends all its settings.
    return str(error).split(" [tensorstore_spec=")[0].split("\n")[0]


def _named(state: TrainState) -> dict[str, jax.Array]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    named = {jtu.keystr(path).lstrip("."): leaf for path, leaf in leaves}
    # Orbax cannot save empty arrays, which hold nothing.
    return {name: x for name, x in named.items() if x.size}


def _kinds(arrays: dict[str, jax.Array]) -> dict[str, list]:
    """The shape and dtype of each array, for JSON; for a random key, its implementation."""
    dtype = lambda x: f"{jr.key_impl(x)} key" if is_key(x) else str(x.dtype)
    return {name: [list(x.shape), dtype(x)] for name, x in arrays.items()}


def _check_kinds(saved: dict, wanted: dict, folder: Path) -> None:
    cure = "Restore with those it was saved with, or use another directory."
    for name, (shape, dtype) in wanted.items():
        found_shape, found = saved.get(name, (None, dtype))
        if found_shape != shape:
            found = "not there" if found_shape is None else f"of shape {tuple(found_shape)}"
            raise ValueError(
                f"{folder}: the array {name} is {found}, where this network and optimiser "
                f"need shape {tuple(shape)}. {cure}"
            )
        if found != dtype:
            raise ValueError(
                f"{folder}: the array {name} was saved as {found}, asked for as {dtype}. "
                "Restore in the precision that it was saved in (of the parameters, or of "
                f"`JAX_ENABLE_X64`), or with that kind of key, or use another directory."
            )
    for name in saved:
        if name not in wanted:
            raise ValueError(
                f"{folder} has an array {name}, which has no place in this network and "
                f"optimiser. {cure}"
            )


def _plain(x: jax.Array) -> jax.Array:
    return jr.key_data(x) if is_key(x) else x


def _as_numbers(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(x) for name, x in arrays.items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A checksum of each array, as neither Orbax nor its file format detects a bit that
    flipped on disk. In integers, so that it does not depend on the sharding."""
    return {name: _sum(x) for name, x in arrays.items()}


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        words = x.astype(jnp.uint32)
    else:
        # Numbers of 8 bytes become two words, along a new axis.
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * jnp.uint32(size) + place
    # Odd factors: no change of a single word goes undetected.
    return jnp.sum(words * (jnp.uint32(2654435761) * index | 1), dtype=jnp.uint32)
