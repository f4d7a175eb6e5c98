import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import Key
from .._misc import as_constant, check_count, check_instance, check_key, show
from .._sharding import Placement
from ._batches import Augmentation, split_condition
from ._loss import DenoisingLoss


class TrainState(eqx.Module):
    """Everything that training updates, and the random key for all of training."""

    model: PyTree
    """The model, with its current parameters."""
    ema: PyTree
    """The EMA of the parameters, at least in single precision; `None` for all other
    leaves."""
    optimiser: PyTree
    """The state of the optimiser."""
    step: Int[Array, ""]
    """The number of completed steps."""
    key: Key
    """The randomness of step n is a function of this and n."""
    precise: PyTree = None
    """Master weights: single-precision copies of the parameters that are in half precision,
    which the optimiser updates, as half precision would lose small updates. `None`
    elsewhere."""

    @property
    def averaged(self) -> Any:
        """The model with the EMA of its parameters, in the precision of the model, for
        sampling."""
        return eqx.combine(
            optax.tree.cast_like(self.ema, _parameters(self.model)), self.model
        )


class StepInfo(eqx.Module):
    """The loss and the gradient of a step."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    """The global norm, before clipping."""


class Trainer(eqx.Module):
    """How a model is trained: a loss, an optimiser, and an EMA of the parameters.

    A step is a function of the state and a batch:

    ```python
    trainer = Trainer(DenoisingLoss(process))
    state = trainer.init(model, jax.random.key(0))
    state, info = trainer.step(state, images)
    ```

    Its randomness depends only on the state's key and the number of the step: not on the
    number of devices, nor on whether training was interrupted.

    Mixed precision: a model may have its parameters in bfloat16 or float16. The optimiser
    then works on float32 master weights, which are rounded to the model's after each step;
    gradients, the optimiser's moments and the EMA are in float32 too. There is no loss
    scaling against underflow of gradients, which float16 may need: prefer bfloat16.
    """

    loss: DenoisingLoss
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    ema_decay: float = eqx.field(static=True)
    debias: bool = eqx.field(static=True)
    accumulate: int = eqx.field(static=True)
    prepare: Callable | None = eqx.field(static=True)
    placement: Placement | None

    def __init__(
        self,
        loss: DenoisingLoss,
        optimiser: optax.GradientTransformation | None = None,
        *,
        ema_decay: float = 0.995,
        debias: bool = True,
        accumulate: int = 1,
        prepare: Callable | None = Augmentation(),
        placement: Placement | None = None,
    ):
        """**Arguments:**

        - `loss`: what to minimise.
        - `optimiser`: an Optax optimiser. By default Adam with the learning rate 5e-4,
            reached after 100 steps, and gradients clipped to norm 1, for small networks and
            thousands of steps. The paper's, for large networks and hundreds of thousands of
            steps, has the learning rate 2e-4 after 5,000 (Table 4, and the authors'
            configurations):

            ```python
            learning_rate = optax.warmup_constant_schedule(0.0, 2e-4, 5000)
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
            ```

            For short runs take a higher rate, up to 2e-3 for small networks, that decays
            to 0: `optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, num_steps)`.
        - `ema_decay`: the decay of the EMA of the parameters. It averages over about
            the last `1 / (1 - ema_decay)` steps, which should be at most a tenth of
            all: 0.995 suits runs of at least 2,000 steps, 0.999 of 10,000, and 0.9999, as
            in the paper, of 100,000. With a longer EMA, `state.averaged` may be worse than
            `state.model`; and single precision loses changes of the parameters of less than
            `1e-7 / (1 - ema_decay)` of their size.
        - `debias`: whether to remove the initial parameters from the EMA, by Adam's bias
            correction. Otherwise, as in the authors' code, the EMA starts at them, and they
            still have weight `ema_decay**n` after n steps.
        - `accumulate`: the number of microbatches for gradient accumulation, to save
            memory. The result is the same up to rounding.
        - `prepare`: called as `prepare(key, batch)` on the whole batch; returns the data,
            or a pair `(data, condition)`. By default
            [`gddim_eqx.training.Augmentation`][], which scales integer images to [-1, 1],
            leaves floating-point data as they are, and can also flip and dequantise images.
            `None` to leave all data as they are.
        - `placement`: the sharding over devices; by default everything is on one device.

        **Raises:** `ValueError` for numbers out of range.
        """
        check_instance("loss", loss, DenoisingLoss, "a `DenoisingLoss(process)`")
        optimiser = _default_optimiser() if optimiser is None else optimiser
        wanted = "an Optax optimiser, such as `optax.adam(1e-3)`"
        check_instance("optimiser", optimiser, optax.GradientTransformation, wanted)
        check_instance("placement", placement, Placement | None, "a `Placement()`")
        wanted = "callable as `prepare(key, batch)`"
        check_instance("prepare", prepare, Callable | None, wanted)
        ema_decay = as_constant("ema_decay", ema_decay)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1); got {ema_decay}.")
        check_count("accumulate", accumulate)
        self.loss = loss
        self.optimiser = optimiser
        self.ema_decay, self.debias = ema_decay, debias
        self.accumulate, self.prepare, self.placement = accumulate, prepare, placement

    def init(self, model: PyTree, key: Key) -> TrainState:
        """The state before the first step.

        **Arguments:**

        - `model`: the model, whose floating-point arrays are the parameters. Or a function
            without arguments that returns it: it is then made in a compiled program. With
            `Placement(shard_parameters=True)` no device ever holds the whole model.
        - `key`: a random key, for all of training.

        **Raises:** `ValueError` for a model without parameters, or an invalid key.
        """
        check_key(key)
        if callable(model) and not jtu.tree_leaves(_parameters(model)):
            try:
                return self._init_compiled(model, key)
            except TypeError as error:
                raise ValueError(
                    "`model` must be a model with parameters, that is, floating-point JAX "
                    "arrays, or a function without arguments that returns one; got "
                    f"{show(model)}, which raised: {error}"
                ) from error
        state = self._init(model, key)
        return state if self.placement is None else self.placement.put(state)

    @eqx.filter_jit
    def _init_compiled(self, make_model: Callable[[], Any], key: Key) -> TrainState:
        return self._constrain(self._init(make_model(), key))

    def _constrain(self, tree: PyTree) -> Any:
        return tree if self.placement is None else self.placement.constrain(tree)

    def _init(self, model: PyTree, key: Key) -> TrainState:
        if not jtu.tree_leaves(_parameters(model)):
            raise ValueError(
                "`model` has no parameters, that is, no floating-point JAX arrays; got "
                f"{type(model).__name__}."
            )
        # Copied, as a step donates the buffers of its input.
        copied, ema = copy(model), copy(_in_single(_parameters(model)))
        optimiser = copy(self.optimiser.init(ema))
        precise = copy(_where_changed(ema, _parameters(model)))
        return TrainState(
            copied, ema, optimiser, jnp.zeros((), jnp.int32), copy(key), precise
        )

    def step(
        self, state: TrainState, batch: PyTree, args: Any = None
    ) -> tuple[TrainState, StepInfo]:
        """One compiled step. The buffers of `state` are donated, so it cannot be used
        again.

        **Arguments:**

        - `state`: from `init`, or from the previous step.
        - `batch`: data, `(batch, *shape)`, or a pair `(data, condition)`; or what `prepare`
            converts to these. The condition is a pytree of arrays with a leading batch
            axis, which the model receives as `args`.
        - `args`: arrays that are passed to a model without condition.

        **Returns:** the new state, and [`gddim_eqx.training.StepInfo`][].

        **Raises:** `ValueError` for a batch size not divisible by `accumulate`, or by the
        number of devices.
        """
        check_instance("state", state, TrainState, "a state from `Trainer.init`")
        batch = jnp.asarray(batch) if isinstance(batch, list) else batch
        return _step((self, batch, args), state)

    def lower(self, state: TrainState, batch: PyTree, args: Any = None) -> Any:
        """A lowered step, as from `jax.jit(...).lower`, for inspection."""
        step: Any = _step
        return step.lower((self, batch, args), state).lowered

    def _step(self, state, batch, args):
        key = jr.fold_in(state.key, state.step)
        prepare_key, loss_key = jr.split(key)
        batch = batch if self.prepare is None else self.prepare(prepare_key, batch)
        x, condition = split_condition(batch)
        noised = self.loss.noised(loss_key, x, condition)
        parameters, static = eqx.partition(state.model, eqx.is_inexact_array)
        precise = eqx.combine(state.precise, parameters)

        def mean_loss(precise, noised):
            model = eqx.combine(optax.tree.cast_like(precise, parameters), static)
            return self.loss(model, noised, args).mean()

        loss, gradient = self._gradient(mean_loss, precise, noised)
        gradient = self._constrain(gradient)
        info = StepInfo(loss, optax.tree.norm(gradient))
        # Optax mixes integers with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimiser = self.optimiser.update(gradient, state.optimiser, precise)
        precise = eqx.apply_updates(precise, updates)
        parameters = optax.tree.cast_like(precise, parameters)
        model, step = eqx.combine(parameters, static), state.step + 1
        ema = self._update_ema(state.ema, parameters, step)
        precise = _where_changed(precise, parameters)
        state = TrainState(model, ema, optimiser, step, state.key, precise)
        return self._constrain(state), info

    def _update_ema(self, ema, parameters, step):
        # Not `optax.ema`, whose rounding of the decay rescales the average: at 0.9999, by
        # 1e-4 in single precision.
        share = 1 - self.ema_decay
        if self.debias:
            # One minus a power of the decay, without cancellation.
            log = math.log(max(self.ema_decay, 1e-300))
            share = share / -jnp.expm1(step.astype(float) * log)

        def update(old, new):
            new = new.astype(old.dtype)
            return old + jnp.asarray(share, old.real.dtype) * (new - old)

        return jtu.tree_map(update, ema, parameters)

    def _gradient(self, mean_loss, precise, noised):
        value_and_gradient = jax.value_and_grad(mean_loss)
        number = self.accumulate
        size = noised.x.shape[0]
        if self.placement is not None:
            self.placement.check_batch(size)
            noised = self.placement.shard(noised)
        if number == 1:
            return value_and_gradient(precise, noised)
        if size % number:
            raise ValueError(
                f"A batch of {size} cannot be divided into `accumulate={number}` equal "
                "parts."
            )
        # Every `number`-th sample, so that each device has its share of each part.
        parts = jtu.tree_map(
            lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0), noised
        )

        def add(total, part):
            if self.placement is not None:
                part = self.placement.shard(part)
            return jtu.tree_map(jnp.add, total, value_and_gradient(precise, part)), None

        shapes = jax.eval_shape(value_and_gradient, precise, noised)
        zero = jtu.tree_map(jnp.zeros_like, shapes)
        total, _ = jax.lax.scan(add, zero, parts)
        return jtu.tree_map(lambda x: x / number, total)


def copy(tree: PyTree) -> Any:
    """The same tree with copied arrays."""
    return jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)


def _parameters(model: PyTree) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def _in_single(tree: PyTree) -> Any:
    """Arrays at least in single precision."""
    half = lambda x: jnp.finfo(x.dtype).bits < 32
    return jtu.tree_map(lambda x: x.astype(jnp.float32) if half(x) else x, tree)


def _where_changed(tree: PyTree, other: PyTree) -> Any:
    """The arrays that have another precision in the other tree."""
    return jtu.tree_map(lambda x, y: None if x.dtype == y.dtype else x, tree, other)


@eqx.filter_jit(donate="all-except-first")
def _step(inputs: tuple[Trainer, PyTree, Any], state: TrainState):
    trainer, batch, args = inputs
    return trainer._step(state, batch, args)


def _default_optimiser() -> optax.GradientTransformation:
    learning_rate = optax.warmup_constant_schedule(0.0, 5e-4, 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
