import contextlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._misc import check_count, check_instance, write_whole
from .._term import as_model
from ._batches import Augmentation, Batches, split_condition
from ._checkpoints import Checkpoints
from ._trainer import copy, StepInfo, Trainer, TrainState


# Called with the number of completed steps and the metrics.
Log = Callable[[int, dict[str, float]], Any]


class JSONLines(contextlib.AbstractContextManager):
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
        text = "".join(f"{line}\n" for line in kept)
        write_whole(path, lambda file: file.write(text.encode()))
        self._file = path.open("a")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def _signals_to_stop(notice: bool) -> Iterator[Callable[[int], bool]]:
    """Whether this process, or another with it, was asked to stop by SIGTERM or SIGINT, as
    a function of the step. A second signal is handled as it would be without this."""
    asked: list[int] = []
    # With several processes, JAX handles SIGTERM itself, and tells the others.
    several = jax.process_count() > 1
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # Not if it is ignored, as under `nohup`, or was not installed from Python.
    handlers = {n: signal.getsignal(n) for n in numbers}
    handlers = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}

    def ask(number, _):
        signal.signal(number, handlers[number])
        asked.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice and number == signal.SIGINT:
            # `print` must not be used here: it may be running already.
            os.write(2, b"\nStopping after this step. Interrupt again to stop at once.\n")

    try:
        for number in handlers:
            signal.signal(number, ask)
        sync = multihost_utils.reached_preemption_sync_point
        yield sync if several else lambda _: bool(asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Meter:
    """Means of the loss and the gradient norm, and the speed, since the last call of
    `means`. Some steps are still being computed."""

    def __init__(self, batch_size: int, check: Callable[[int, float, float], None]):
        self._batch_size, self._check = batch_size, check
        self._pending: list[tuple[int, StepInfo]] = []
        self._values: list[tuple[float, float]] = []
        self._times: list[float] = []

    def push(self, step: int, info: StepInfo) -> None:
        self._pending.append((step, info))
        # One step is being computed while Python prepares the next, but for the first,
        # whose compilation does not count.
        self.read(keep=1 if self._times else 0)
        self._times.append(time.perf_counter())

    def read(self, keep: int = 0) -> None:
        """Wait for all but the last `keep` steps, and check them."""
        while len(self._pending) > keep:
            step, info = self._pending.pop(0)
            self._values.append((float(info.loss), float(info.gradient_norm)))
            self._check(step, *self._values[-1])

    def means(self) -> dict[str, float]:
        self.read()
        loss, norm = np.mean(self._values, axis=0).tolist()
        means = {"loss": loss, "gradient_norm": norm}
        start, *others = self._times
        now = time.perf_counter()
        if others:
            means["images_per_second"] = len(others) * self._batch_size / (now - start)
        self._values, self._times = [], [now]
        return means


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
    saves if there are `checkpoints`, and returns the newest state. A second one acts as
    usual: SIGINT raises `KeyboardInterrupt` at once. Signals are handled in the main thread
    only.

    Afterwards, sample with `state.averaged`; see [`gddim_eqx.training.Trainer`][] for how
    to choose the EMA decay and the optimiser.

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
        check_instance("logs", log, Callable, "callable as `log(step, metrics)`")
    for every, callback in callbacks:
        check_count("callbacks", every)
        check_instance("callbacks", callback, Callable, "callable as `callback(state)`")
    _check_condition(trainer, state, batches, 0)
    if checkpoints is not None and checkpoints.steps:
        state = checkpoints.restore(state)
    elif int(state.step) < num_steps:
        # A step donates the buffers of its state.
        state = copy(state)
    start, first = int(state.step), jax.process_index() == 0

    def check_finite(step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _check_condition(trainer, state, batches, step - 1)
            raise FloatingPointError(
                f"In step {step} the loss is {loss} and its gradient has norm {norm}. "
                + _kept(checkpoints)
            )

    meter = _Meter(batches.batch_size, check_finite)
    with contextlib.ExitStack() as stack:
        # First, so that signals are handled while the last checkpoint is written.
        asked_to_stop = stack.enter_context(_signals_to_stop(notice=progress))
        if checkpoints is not None:
            stack.callback(checkpoints.wait)
        bar = stack.enter_context(_bar(num_steps, start)) if progress and first else None
        stream = stack.enter_context(contextlib.closing(batches.iterate_from(start)))
        for step in range(start + 1, num_steps + 1):
            state, info = trainer.step(state, next(stream))
            meter.push(step, info)
            stop = asked_to_stop(step)
            last = stop or step == num_steps
            if bar is not None:
                bar.update()
            if step % log_every == 0 or step == num_steps:
                means = meter.means()
                for log in logs if first else ():
                    log(step, means)
                if bar is not None:
                    bar.set_postfix({name: f"{x:.4g}" for name, x in means.items()})
            if checkpoints is not None and (step % save_every == 0 or last):
                meter.read()
                checkpoints.save(state)
            for every, callback in callbacks:
                if step % every == 0:
                    meter.read()
                    callback(state)
            if stop:
                break
    if int(state.step) >= num_steps and first:
        _warn_of_initial(trainer, int(state.step))
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
    if checkpoints is not None:
        checkpoints.wait()
    if checkpoints is None or not checkpoints.steps:
        return "Nothing was saved."
    last = max(checkpoints.steps)
    return f"The last checkpoint is that of step {last} in {checkpoints.directory}."


def _bar(total: int, initial: int):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "To show progress, install `gddim_eqx[train]`; or pass `progress=False`."
        ) from error
    return tqdm(total=total, initial=initial, unit=" steps", mininterval=1)
