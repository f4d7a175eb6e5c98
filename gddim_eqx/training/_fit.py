import contextlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._misc import check_count, check_instance, show
from .._term import as_model
from ._batches import Augmentation, Batches, split_condition
from ._checkpoints import Checkpoints
from ._trainer import copy, Metrics, Trainer, TrainState


# Called with the number of completed steps and the metrics.
Log = Callable[[int, dict[str, float]], Any]


class JSONLines:
    """Writes metrics to a file, one JSON object per line.

    A run that resumes from a step first drops the lines of later steps, and any unfinished
    line.
    """

    def __init__(self, path: str | Path, since: int = 0):
        """**Arguments:**

        - `path`: the path of the file.
        - `since`: the number of completed steps.
        """
        path = Path(path)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= since]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Stop:
    """Whether this process, and the others with it, were asked to stop, by SIGTERM or
    SIGINT.

    A second SIGINT is handled as it would be without this: it raises `KeyboardInterrupt`.
    """

    def __init__(self, notice: bool):
        self._asked, self._notice = False, notice
        # With several processes, JAX handles SIGTERM itself.
        self._several = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self):
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGINT, self._interrupt)
            if not self._several:
                self._listen(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_):
        while self._before:
            signal.signal(*self._before.popitem())

    def _listen(self, number, handler):
        before = signal.getsignal(number)
        # Not if it is ignored, as under `nohup`, or was not installed from Python.
        if before not in (None, signal.SIG_IGN):
            self._before[number] = before
            signal.signal(number, handler)

    def _ask(self, *_):
        self._asked = True

    def _interrupt(self, *_):
        # Restore the previous handler for the next interrupt. (None is left while
        # `__exit__` does so.)
        before = self._before.pop(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGINT, before)
        self._asked = True
        if self._several:
            # JAX then tells the other processes too.
            os.kill(os.getpid(), signal.SIGTERM)
        if self._notice:
            # `print` must not be used here: it may be running already.
            os.write(2, _notice)

    def __call__(self, step: int) -> bool:
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


_notice = b"\nStopping after this step. Interrupt again to stop at once.\n"


def fit(
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    num_steps: int,
    *,
    checkpoints: Checkpoints | None = None,
    save_every: int = 1000,
    logs: Sequence[Log] = (),
    log_every: int = 100,
    callbacks: Sequence[tuple[int, Callable[[TrainState], Any]]] = (),
    progress: bool = True,
) -> TrainState:
    """Train up to a total number of steps.

    If `checkpoints` has any, training resumes from the latest, and reaches the same
    parameters as if it had never stopped.

    On SIGTERM, and on SIGINT (Ctrl-C, or a notebook's "interrupt"), it finishes the step,
    saves if there are `checkpoints`, and returns the newest state; a second SIGINT raises
    `KeyboardInterrupt` at once. Signals are handled in the main thread only.

    Afterwards, sample with `state.averaged`; see [`gddim_eqx.training.Trainer`][] for how
    to choose the EMA decay, and [`gddim_eqx.training.adam`][] for the learning rate.

    **Arguments:**

    - `trainer`: how to train.
    - `state`: a state from its `init`, or of a run to resume. It is not donated, so it can
        be used again. Its memory is freed after the first step only if you keep no
        reference to it: `fit(trainer, trainer.init(model, key), ...)`.
    - `batches`: the training data.
    - `num_steps`: the total number of steps, including those of `state`.
    - `checkpoints`: where to save.
    - `save_every`: the number of steps between checkpoints. The last step is saved too.
    - `logs`: functions called as `log(step, metrics)`, on the first process only, with
        means since the last call: `loss`, `gradient_norm` and `images_per_second`. For
        example [`gddim_eqx.training.JSONLines`][].
    - `log_every`: the number of steps between calls.
    - `callbacks`: pairs of a number of steps and a function to call with the state every so
        many steps, for example to draw samples. They run on all processes. The next step
        donates the buffers of this state: copy what you keep of it.
    - `progress`: whether to show a progress bar. Needs tqdm.

    **Returns:** the state. If its `step` is less than `num_steps`, a signal stopped
    training.

    **Raises:** `ValueError` for conditions that the model refuses, such as labels out of
    range: those of the first batch before it begins, and those of a step whose loss is not
    finite. `FloatingPointError` when the loss or its gradient is not finite. Such a
    step is not saved. `OSError` if a checkpoint could not be saved.

    **Warns:** if labels of the first batch stand for no class; or if the initial parameters
    still make up more than a twentieth of the EMA.
    """
    check_instance("trainer", trainer, Trainer, "a `Trainer(loss)`")
    check_instance("state", state, TrainState, "a state from `Trainer.init`")
    check_instance("batches", batches, Batches, "`Batches(data, batch_size)`")
    wanted = "`Checkpoints(directory, config)`"
    check_instance("checkpoints", checkpoints, Checkpoints | None, wanted)
    check_count("num_steps", num_steps, least=0)
    check_count("save_every", save_every)
    check_count("log_every", log_every)
    for log in logs:
        if not callable(log):
            raise ValueError(
                f"`logs` must be callable as `log(step, metrics)`; got {show(log)}."
            )
    for pair in callbacks:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and callable(pair[1])):
            raise ValueError(
                "`callbacks` must be pairs of a number of steps and a function to call "
                f"with the state; got {show(pair)}."
            )
        check_count("callbacks", pair[0])
    _check_condition(trainer, state, batches, 0)
    if checkpoints is not None and checkpoints.steps:
        state = checkpoints.restore(state)
    elif int(state.step) < num_steps:
        # A step donates the buffers of its state.
        state = copy(state)
    start = done = int(state.step)
    first = jax.process_index() == 0
    measured: list[tuple[int, Metrics]] = []
    totals: list[tuple[float, float]] = []
    since, timed = time.perf_counter(), 0

    def read(keep: int) -> None:
        """Wait for all but the last `keep` steps, and check that they are finite."""
        while len(measured) > keep:
            step, metrics = measured.pop(0)
            loss, norm = float(metrics.loss), float(metrics.gradient_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _check_condition(trainer, state, batches, step - 1)
                raise FloatingPointError(
                    f"In step {step} the loss is {loss} and its gradient has norm {norm}. "
                    + _kept(checkpoints)
                )
            totals.append((loss, norm))

    with contextlib.ExitStack() as stack:
        # First, so that signals are handled while the last checkpoint is written.
        stop = stack.enter_context(_Stop(notice=progress))
        if checkpoints is not None:
            stack.callback(checkpoints.wait)
        bar = stack.enter_context(_bar(num_steps, done)) if progress and first else None
        stream = stack.enter_context(contextlib.closing(batches.iterate_from(done)))
        while done < num_steps:
            state, metrics = trainer.step(state, next(stream))
            done, timed = done + 1, timed + 1
            measured.append((done, metrics))
            if done == start + 1:
                # Compilation does not count.
                read(keep=0)
                since, timed = time.perf_counter(), 0
            # One step is being computed while Python prepares the next.
            read(keep=1)
            if bar is not None:
                bar.update()
            if done % log_every == 0 or done == num_steps:
                read(keep=0)
                losses, norms = map(np.mean, zip(*totals))
                means = {"loss": float(losses), "gradient_norm": float(norms)}
                if timed:
                    rate = timed * batches.batch_size / (time.perf_counter() - since)
                    means["images_per_second"] = rate
                for log in logs if first else ():
                    log(done, means)
                if bar is not None:
                    bar.set_postfix({name: f"{x:.4g}" for name, x in means.items()})
                totals.clear()
                since, timed = time.perf_counter(), 0
            stopped = stop(done)
            at_end = stopped or done == num_steps
            if checkpoints is not None and (done % save_every == 0 or at_end):
                read(keep=0)
                checkpoints.save(state)
            for every, callback in callbacks:
                if done % every == 0:
                    read(keep=0)
                    callback(state)
            if stopped:
                break
    if done >= num_steps and first:
        _warn_of_initial(trainer, done)
    return state


def _check_condition(trainer: Trainer, state: TrainState, batches: Batches, n: int) -> None:
    """Let the model check the conditions of batch n, unless they are yet to be prepared."""
    if not (trainer.prepare is None or isinstance(trainer.prepare, Augmentation)):
        return
    _, condition = split_condition(batches.read(n))
    if condition is None:
        return
    model = as_model(state.model)
    model.check_args(condition)
    none = model.no_condition
    if isinstance(none, int) and (number := int(np.sum(condition == none))):
        warnings.warn(
            f"{number} of the {batches.batch_size} labels of a batch are {none}, which "
            "stands for no class: classes are counted from 0.",
            stacklevel=3,
        )


def _warn_of_initial(trainer: Trainer, steps: int) -> None:
    share = 0.0 if trainer.debias else trainer.ema_decay**steps
    if share > 0.05:
        warnings.warn(
            f"After {steps} steps with `ema_decay={trainer.ema_decay}` the initial "
            f"parameters are still {share:.0%} of the EMA. Sample with `state.model` "
            "in place of `state.averaged`, train for longer, or choose a smaller "
            "`ema_decay` or `debias=True`.",
            stacklevel=3,
        )


def _kept(checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return "Nothing was saved."
    checkpoints.wait()
    steps = checkpoints.steps
    if not steps:
        return f"Nothing was saved in {checkpoints.directory} before."
    return f"The last checkpoint is that of step {max(steps)} in {checkpoints.directory}."


def _bar(total: int, initial: int):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "To show progress, install `gddim_eqx[train]`; or pass `progress=False`."
        ) from error
    return tqdm(total=total, initial=initial, unit=" steps", mininterval=1)
