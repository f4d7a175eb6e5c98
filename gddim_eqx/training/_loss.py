import functools as ft
from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact, PyTree

from .._custom_types import Args, FrameName, Key, PredictionName, State
from .._linear import append_axes, apply, check_state, coefficient_dtype, subtract
from .._misc import (
    as_constant,
    check_instance,
    check_key,
    check_per_sample,
    renamed,
    show,
)
from .._process import AbstractProcess, DiscreteVP, latest, require_process
from .._term import check_prediction, make_prediction, PerturbationKernel, ProbabilityFlow
from ._times import AbstractTimeSampler, UniformTimes
from ._weighting import DataWeighting


class NoisedBatch(NamedTuple):
    """A batch, with all random draws for its loss. Every leaf has a leading batch axis."""

    x: Inexact[Array, "batch *shape"]
    t: Float[Array, " batch"]
    u: State
    noise: State
    weight: Float[Array, " batch"]
    key: Key | None
    condition: PyTree = None


def _holds(dtype, value) -> bool:
    if isinstance(value, Tracer):
        return jnp.issubdtype(dtype, jnp.inexact) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
    value = np.asarray(value)
    with np.errstate(invalid="ignore", over="ignore"):
        return bool((value.astype(dtype) == value).all())


def _ends(process: AbstractProcess, times: AbstractTimeSampler) -> tuple[float, float]:
    """The first and the last time."""
    start = process.t_min if times.start is None else times.start
    return start, process.t_end if times.end is None else times.end


class DenoisingLoss(eqx.Module):
    r"""The denoising loss: the mean squared error of a model's prediction at
    $u_t = \Psi(t, 0) u_0 + R_t \epsilon$.

    One loss for all processes. The default is the paper's: noise prediction with respect to
    $R_t$, unweighted, at uniform times. For [`gddim_eqx.CLD`][] this is hybrid score
    matching (Dockhorn et al. 2022): the initial velocity is not sampled but part of the
    noise.
    """

    process: AbstractProcess
    predicts: PredictionName = eqx.field(static=True)
    frame: FrameName = eqx.field(static=True)
    times: AbstractTimeSampler
    weighting: str | Callable | DataWeighting
    dropout: bool = eqx.field(static=True)
    condition_dropout: float = eqx.field(static=True)
    no_condition: PyTree

    @renamed(factor="frame")
    def __init__(
        self,
        process: AbstractProcess,
        predicts: PredictionName = "noise",
        frame: FrameName = "R",
        *,
        times: AbstractTimeSampler = UniformTimes(),
        weighting: Literal["prediction", "noise", "likelihood"]
        | Callable
        | DataWeighting = "prediction",
        dropout: bool = False,
        condition_dropout: float = 0.0,
        no_condition: PyTree = None,
    ):
        r"""**Arguments:**

        - `process`: the forward process.
        - `predicts`, `frame`: what the model predicts, as in
            [`gddim_eqx.ProbabilityFlow`][].
        - `times`: the distribution of times.
        - `weighting`: which error is squared.
            - `"prediction"`: the error of what the model predicts.
            - `"noise"`: the error of the noise prediction that follows from it, so that all
                kinds of prediction have the same objective.
            - `"likelihood"`: the error of the diffusion coefficient times the score,
                $G_t^\top R_t^{-\top} \epsilon$, for a bound on the likelihood (Song et al.
                2021b). It grows fast towards time 0: sample times there more often, by
                [`gddim_eqx.training.ImportanceTimes`][].
            - a [`gddim_eqx.training.DataWeighting`][]: the error of the data prediction, in
                units of what can be known of the data. For a preconditioned network, the
                error of its output.
            - a function of time: `"prediction"`, times its value.
        - `dropout`: whether to call the model with `key=`, as needed by a
            [`gddim_eqx.nn.NetworkModel`][] of a network with dropout.
        - `condition_dropout`: the probability with which the condition of a sample is
            replaced by `no_condition`, so that one network learns the conditional and the
            unconditional model, for [`gddim_eqx.classifier_free_guidance`][]. Commonly 0.1.
        - `no_condition`: what stands for no condition, with the structure of the condition
            of one sample. What that is, is for the network to say: the networks of
            `gddim_eqx.nn` have it as `network.no_condition`.

        **Raises:** `ValueError` for invalid arguments, as in `ProbabilityFlow`, and for
        times beyond the process' time axis, or before the first index of a
            [`gddim_eqx.DiscreteVP`][].
        """
        require_process(process)
        check_prediction(process, predicts, frame)
        known = ("prediction", "noise", "likelihood")
        if isinstance(weighting, DataWeighting):
            weighting.check(process, predicts)
        elif weighting not in known and not callable(weighting):
            raise ValueError(
                f"`weighting` must be one of {known}, a function of time or a "
                f"`DataWeighting`; got {show(weighting)}."
            )
        wanted = "a time sampler such as `UniformTimes()`"
        check_instance("times", times, AbstractTimeSampler, wanted)
        start, end = _ends(process, times)
        # Before its first index, a discrete-time process has no network to train.
        least = process.t_min if isinstance(process, DiscreteVP) else 0
        if not least <= start < end <= latest(process.t_end, np.float32):
            raise ValueError(
                f"`times` must lie between {least} and {process.t_end}, the times of a "
                f"{type(process).__name__}; got {start} to {end}. Leave out `start` and "
                "`end` for those at which it is sampled."
            )
        self.process, self.predicts, self.frame = process, predicts, frame
        condition_dropout = as_constant("condition_dropout", condition_dropout)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(
                f"`condition_dropout` must be in [0, 1]; got {condition_dropout}."
            )
        if condition_dropout and no_condition is None:
            raise ValueError(
                "With `condition_dropout` pass `no_condition`, which replaces the dropped "
                "conditions, for example `network.no_condition`."
            )
        self.times, self.weighting, self.dropout = times, weighting, dropout
        self.condition_dropout, self.no_condition = condition_dropout, no_condition

    def noised(
        self, key: Key, x: Inexact[Array, "batch *shape"], condition: PyTree = None
    ) -> NoisedBatch:
        """Sample times and noise for a batch.

        **Arguments:**

        - `key`: a random key.
        - `x`: data, `(batch, *shape)`.
        - `condition`: the condition of each sample, if any: a pytree of arrays with a
            leading batch axis.

        **Returns:** all that the loss of each sample depends on, except the model.

        **Raises:** `ValueError` for data of another shape, or integer data, and for
        conditions of another batch size or structure.
        """
        process = self.process
        check_key(key)
        x = check_state(x, 1, process.shape, "The batch")
        if x.ndim != 1 + len(process.shape) or x.shape[0] == 0:
            raise ValueError(
                f"The batch must have one axis of samples before {process.shape}, and not "
                f"be empty; got {x.shape}."
            )
        time_key, noise_key, model_key = jr.split(key, 3)
        number, dtype = x.shape[0], coefficient_dtype(x)
        fractions, weight = self.times.fractions(time_key, number, dtype)
        start, end = _ends(process, self.times)
        # The sum may round to more than `end`.
        t = jnp.minimum(start + (end - start) * fractions, end)
        u, noise = jax.vmap(process.perturb)(jr.split(noise_key, number), x, t)
        keys = jr.split(model_key, number) if self.dropout else None
        check_per_sample("The condition", condition, (number,))
        if self.condition_dropout:
            condition = self._drop(jr.fold_in(key, 2**31 - 1), condition, number)
        return NoisedBatch(x, t, u, noise, weight, keys, condition)

    def _drop(self, key, condition, number):
        if jtu.tree_structure(condition) != jtu.tree_structure(self.no_condition):
            raise ValueError(
                "`no_condition` must have the structure of the condition of a sample, "
                f"{show(jtu.tree_structure(condition))}; got {show(self.no_condition)}."
            )
        dropped = jr.bernoulli(key, self.condition_dropout, (number,))

        def replace(x, none):
            if not _holds(x.dtype, none):
                raise ValueError(
                    f"The condition has dtype {x.dtype}, which cannot hold `no_condition`, "
                    f"{none}. Convert it, for example to float32."
                )
            none = jnp.broadcast_to(jnp.asarray(none, x.dtype), x.shape[1:])
            return jnp.where(append_axes(dropped, x.ndim), none[None], x)

        return jtu.tree_map(replace, condition, self.no_condition)

    def __call__(
        self, model: Callable, batch: NoisedBatch, args: Args = None
    ) -> Float[Array, " batch"]:
        """The loss of each sample; minimise the mean.

        **Arguments:**

        - `model`: called as in sampling, as `model(t, u, args)` with one time and a batch
            of states `(batch, *shape)` in the data's coordinates, and with `key=` for
            dropout. As each sample has its own time, it is called on batches of one
            (under `jax.vmap`).
        - `batch`: from [`gddim_eqx.training.DenoisingLoss.noised`][].
        - `args`: passed to the model, the same for all samples. A model of a batch with
            conditions gets these instead, each with its sample.

        **Returns:** an array of shape `(batch,)`, at least in single precision.

        **Raises:** `ValueError` if both `args` and the batch's conditions are given.
        """
        if not (args is None or batch.condition is None):
            raise ValueError(
                "The batch has conditions, which models get as `args`: leave out `args`."
            )
        return jax.vmap(lambda sample: self._of_one(model, sample, args))(batch)

    def _of_one(self, model, sample, args):
        # Models take batches, here as in sampling.
        one = sample.x, sample.u, sample.noise, sample.condition
        x, u, noise, condition = jtu.tree_map(lambda x: x[None], one)
        t, weight, key = sample.t, sample.weight, sample.key
        args = args if condition is None else condition
        keyed = model if key is None else ft.partial(model, key=key)
        flow = ProbabilityFlow(self.process, keyed, self.predicts, self.frame)
        if self.weighting in ("noise", "likelihood"):
            error = subtract(flow.noise(t, u, args), noise)
            if self.weighting == "likelihood":
                whitening = self.process.factor(t).inverse() @ self.process.diffusion(t)
                error = apply(whitening.transpose(), error)
        else:
            # Not from `u`, which late in the process hardly depends on the data.
            scale = self.process.data_scale
            data = jtu.tree_map(lambda x: x / scale, self.process.encode(x))
            prediction = make_prediction(self.predicts, self.frame)
            target = prediction.target(PerturbationKernel(self.process, t), data, noise)
            predicted = flow.predict(t, u, args)
            if isinstance(self.weighting, DataWeighting):
                error = self.weighting.error(t, predicted, target, self.predicts)
            else:
                error = subtract(predicted, target)
        squares = [x.astype(t.dtype) ** 2 for x in jtu.tree_leaves(error)]
        loss = weight * jnp.mean(jnp.stack([x.mean() for x in squares]))
        if callable(self.weighting):
            loss = loss * jnp.asarray(self.weighting(t), t.dtype)
        return loss
