import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu

from .._misc import check_count
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
        named = _named(state)
        arrays = {name: _plain(x) for name, x in named.items()}
        about = {"config": self.config, "arrays": _kinds(named)}
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

        **Raises:** `ValueError` if there is no checkpoint, if it cannot be read, or if it
        is of another config, network, optimiser or precision. It names what differs, and no
        array is read.
        """
        ocp, steps = _orbax(), self.steps
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise ValueError(
                f"{self.directory} has no checkpoint of step {step}; it has {steps}."
            )
        folder = self.directory / str(step)
        about = self._read(step, about=ocp.args.JsonRestore())
        if not isinstance(about, dict) or "arrays" not in about:
            raise ValueError(
                f"{folder} was saved by an earlier version of gddim_eqx, which this one "
                "cannot read. Use another directory."
            )
        wanted = _named(state)
        _check_same("config", about["config"], self.config, folder)
        _check_same("network or optimiser", about["arrays"], _kinds(wanted), folder)
        plain = {name: _plain(x) for name, x in wanted.items()}
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in plain.items()
        }
        arrays = self._read(step, state=ocp.args.StandardRestore(abstract))
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

    def _read(self, step: int, **item: Any) -> Any:
        (name,) = item
        try:
            items = _orbax().args.Composite(**item)
            return self._manager.restore(step, args=items)[name]
        except Exception as error:
            raise ValueError(
                f"{self.directory / str(step)} cannot be read: {_brief(error)}. If it is "
                "damaged, delete it to resume from the previous checkpoint."
            ) from error

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


def _check_same(kind: str, there: dict, here: dict, folder: Path) -> None:
    there, here = _flat(there), _flat(here)
    differences = [
        f"{name}: {there.get(name, 'absent'):.160} there, "
        f"{here.get(name, 'absent'):.160} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"{folder} was saved with another {kind} ({'; '.join(differences[:5])}{more}). "
            "Use that one, or another directory."
        )


def _flat(config: Any, name: str = "") -> dict[str, str]:
    """All values in nested dictionaries as text, as NaN is not equal to itself, by names
    such as `optimiser.warmup`."""
    if not isinstance(config, dict) or not config:
        return {name: repr(config)}
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{name}.{key}" if name else key)
    return flat


def _brief(error: Exception) -> str:
    # TensorStore appends all its settings.
    return str(error).split(" [tensorstore_spec=")[0].split("\n")[0]


def _named(state: TrainState) -> dict[str, jax.Array]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    named = {jtu.keystr(path).lstrip("."): leaf for path, leaf in leaves}
    # Orbax cannot save empty arrays, which hold nothing.
    return {name: x for name, x in named.items() if x.size}


def _kinds(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """The dtype and shape of each array; for a random key, its implementation."""
    dtype = lambda x: f"{jr.key_impl(x)} key" if is_key(x) else str(x.dtype)
    return {name: f"{dtype(x)}{list(x.shape)}" for name, x in arrays.items()}


def _plain(x: jax.Array) -> jax.Array:
    return jr.key_data(x) if is_key(x) else x
