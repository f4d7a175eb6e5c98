import contextlib
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


class Checkpoints(contextlib.AbstractContextManager):
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
        check_count("keep", keep)
        policies = ocp.checkpoint_managers.preservation_policy
        kept = [policies.LatestN(keep)]
        kept += [] if keep_every is None else [policies.EveryNSteps(keep_every)]
        policy = policies.AnyPreservationPolicy(kept)
        # Orbax can do this too, in a thread that fails when Python exits first.
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

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
        args, step = _orbax().args, int(state.step)
        if step in self._manager.all_steps():
            return
        arrays, kinds = _arrays(state)
        about = {"config": self.config, "arrays": kinds}
        items = args.Composite(state=args.StandardSave(arrays), about=args.JsonSave(about))
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
        args, steps = _orbax().args, self.steps
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise ValueError(
                f"{self.directory} has no checkpoint of step {step}; it has {steps}."
            )
        folder = self.directory / str(step)
        about = self._read(step, about=args.JsonRestore()) or {}
        arrays, kinds = _arrays(state)
        _check_same("config", about.get("config", {}), self.config, folder)
        _check_same("network or optimiser", about.get("arrays", {}), kinds, folder)
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        abstract = {name: shape(x) for name, x in arrays.items()}
        restored = self._read(step, state=args.StandardRestore(abstract))

        def replace(path, x):
            if (new := restored.get(_name(path))) is None:
                return copy(x)  # No memory is shared with `state`.
            return jr.wrap_key_data(new, impl=jr.key_impl(x)) if is_key(x) else new

        return jtu.tree_map_with_path(replace, state)

    def _read(self, step: int, **item: Any) -> Any:
        try:
            items = _orbax().args.Composite(**item)
            return self._manager.restore(step, args=items)[next(iter(item))]
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
    there, here = _texts(there), _texts(here)
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


def _texts(config: dict) -> dict[str, str]:
    """All values in nested dictionaries as text, as NaN is not equal to itself, by names
    such as `optimiser.warmup`."""
    is_value = lambda x: not isinstance(x, dict) or not x
    values = jtu.tree_leaves_with_path(config, is_leaf=is_value)
    return {jtu.keystr(path, simple=True, separator="."): repr(x) for path, x in values}


def _brief(error: Exception) -> str:
    # TensorStore appends all its settings.
    return str(error).split(" [tensorstore_spec=")[0].split("\n")[0]


def _arrays(state: TrainState) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of a state, and the dtype and shape of each; of a random key its data, and
    its implementation."""
    arrays, kinds = {}, {}
    for path, x in jtu.tree_leaves_with_path(eqx.filter(state, eqx.is_array)):
        # Orbax cannot save empty arrays, which hold nothing.
        if x.size:
            dtype = f"{jr.key_impl(x)} key" if is_key(x) else str(x.dtype)
            kinds[_name(path)] = f"{dtype}{list(x.shape)}"
            arrays[_name(path)] = jr.key_data(x) if is_key(x) else x
    return arrays, kinds


def _name(path: Any) -> str:
    return jtu.keystr(path).lstrip(".")
