import equinox as eqx
from jaxtyping import Array, Float

from .._custom_types import RealScalarLike
from .._misc import check_positive
from .._process import AbstractProcess, require_process


class DataWeighting(eqx.Module):
    r"""A weighting of the error of the noise prediction, for
    [`gddim_eqx.training.DenoisingLoss`][], by which errors of the data prediction count
    equally at all times: in units of the posterior standard deviation of the data given the
    state, if they were normal.

    Without it, errors late in the process, where a state says little about its data, hardly
    count, although they decide the global appearance of images. The output of a
    [`gddim_eqx.nn.NetworkModel`][] with the same `data_std` has weight 1 at all times.

    For [`gddim_eqx.BDM`][] it is the weight of the lowest frequency.

    ??? cite "Reference"

        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
        2022, table 1: $\lambda(\sigma)$. Here for every process.
    """

    process: AbstractProcess
    data_std: float = eqx.field(static=True)

    def __init__(self, process: AbstractProcess, data_std: float | int):
        """**Arguments:**

        - `process`: the forward process.
        - `data_std`: the standard deviation of the data.

        **Raises:** `ValueError` for a standard deviation that is not positive.
        """
        require_process(process)
        check_positive(data_std=data_std)
        self.process, self.data_std = process, float(data_std)

    def __call__(self, t: RealScalarLike) -> Float[Array, ""]:
        """**Arguments:**

        - `t`: the time.
        """
        process = self.process
        signal = process.transition(t, 0.0) * process.data_scale
        share = (process.factor(t).inverse() @ signal).blocks[:, 0]
        signal = (share**2).sum(axis=0).max()
        components = process.num_components
        return components * (1 + 1 / (self.data_std**2 * signal))
