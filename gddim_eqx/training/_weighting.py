import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, PyTree

from .._custom_types import PredictionName, State
from .._linear import subtract
from .._misc import show
from .._model import check_normal_data, error_of_output, normal_data, NormalData
from .._process import AbstractProcess, require_process


class DataWeighting(eqx.Module):
    r"""A weighting for [`gddim_eqx.training.DenoisingLoss`][] by which errors of the data
    prediction count equally at all times: in units of the posterior standard deviation of
    the data given the state, if they were normal.

    Without it, errors late in the process, where a state says little about its data, hardly
    count, although they decide the global appearance of images. For a preconditioned
    [`gddim_eqx.nn.NetworkModel`][] of the same data, the loss is the mean squared error of
    the network's output.

    For noise prediction, the error of the noise is multiplied by the number that makes this
    so wherever the prediction is consistent with some data; under [`gddim_eqx.BDM`][], by
    that of the lowest frequency.

    ??? cite "Reference"

        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
        2022, table 1: $\lambda(\sigma)$. Here for every process.
    """

    process: AbstractProcess
    data_std: float | None = eqx.field(static=True)
    data: NormalData | None

    def __init__(
        self,
        process: AbstractProcess,
        data_std: float | int | None = None,
        data: NormalData | None = None,
    ):
        """**Arguments:**

        - `process`: the forward process.
        - `data_std`: the standard deviation of the data.
        - `data`: for data prediction, the mean and the covariance of the data in place of
            `data_std`, as for [`gddim_eqx.nn.NetworkModel`][].

        **Raises:** `ValueError` for a variance that is not positive, and for `data` as in
        `NetworkModel`.
        """
        require_process(process)
        check_normal_data(process, data_std, data)
        if data is not None and not (data.covariance.variances > 0).all():
            raise ValueError(
                "`data` must have a positive variance in every direction, as errors are "
                "measured in units of it. Add a small variance to all."
            )
        self.process, self.data = process, data
        self.data_std = None if data_std is None else float(data_std)

    def check(self, process: AbstractProcess, predicts: PredictionName) -> None:
        """**Raises:** `ValueError` unless this weighting is for this prediction."""
        if self.process != process:
            raise ValueError(
                f"The weighting is for {show(self.process)}, but the loss is for "
                f"{show(process)}."
            )
        if predicts not in (("data",) if self.data_std is None else ("data", "noise")):
            raise ValueError(
                "`DataWeighting` is for predictions of 'data', and with `data_std` of "
                f"'noise'; got predicts={show(predicts)}."
            )

    def error(
        self, t: Array, predicted: State, target: State, predicts: PredictionName
    ) -> PyTree[Inexact[Array, "..."]]:
        """The error of a prediction in these units, in the basis of states: of the data
        alone, or of all components of the noise.

        **Arguments:**

        - `t`: the time.
        - `predicted`, `target`: what a model predicts, and should predict, in the basis of
            states.
        - `predicts`: what that is.
        """
        error = subtract(predicted, target)
        data = normal_data(self.process, self.data_std, self.data)
        if predicts == "data" and data is not None:
            return error_of_output(self.process, data, t, error)
        process = self.process
        signal = process.transition(t, jnp.zeros_like(t)) * process.data_scale
        share = (process.factor(t).inverse() @ signal).blocks[:, 0]
        signal = (share**2).sum(axis=0).max()
        assert self.data_std is not None
        weight = process.num_components * (1 + 1 / (self.data_std**2 * signal))
        return jtu.tree_map(lambda x: jnp.sqrt(weight).astype(x.dtype) * x, error)
