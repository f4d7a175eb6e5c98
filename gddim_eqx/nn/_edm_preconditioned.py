from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from .._custom_types import Args, PredictionName, RealScalarLike
from .._misc import check_instance, check_positive
from .._model import NormalData, precondition
from .._process import AbstractProcess, as_time, EDM, time_for
from .._term import AbstractModel


class EDMPreconditioned(AbstractModel):
    r"""A data prediction model for [`gddim_eqx.EDM`][], made from a network $F$ with the
    preconditioning of the EDM paper: the posterior mean of normal data, plus their
    posterior standard deviation times the output,

    $$D(x; \sigma) = c_\text{skip}\,x + c_\text{out}\,F(c_\text{noise}, c_\text{in}\,x),$$

    with $c_\text{skip} = \sigma_d^2 / (\sigma^2 + \sigma_d^2)$,
    $c_\text{out} = \sigma \sigma_d / \sqrt{\sigma^2 + \sigma_d^2}$,
    $c_\text{in} = 1 / \sqrt{\sigma^2 + \sigma_d^2}$ and
    $c_\text{noise} = \frac{1}{4} \log \sigma$ (Karras et al. 2022, table 1).

    !!! example

        ```python
        import gddim_eqx as gd
        import jax.numpy as jnp

        network = lambda noise, x, args: jnp.zeros_like(x)
        model = gd.nn.EDMPreconditioned(network, sigma_data=0.5)
        flow = gd.ProbabilityFlow(gd.EDM((2,)), model)
        ```
    """

    network: Callable
    sigma_data: float = eqx.field(static=True)

    def __init__(self, network: Callable, sigma_data: float = 0.5):
        r"""**Arguments:**

        - `network`: $F$, called as `network(c_noise, x, args)` with `x` already multiplied
            by $c_\text{in}$; returns an array of the same shape.
        - `sigma_data`: $\sigma_d$, the standard deviation of the data.
        """
        wanted = "callable as `network(c_noise, x, args)`"
        check_instance("network", network, Callable, wanted)
        check_positive(sigma_data=sigma_data)
        self.network, self.sigma_data = network, float(sigma_data)

    @property
    def predicts(self) -> PredictionName:
        return "data"

    def normal_data(self, process: AbstractProcess) -> NormalData:
        """Independent data with mean 0 and standard deviation `sigma_data`."""
        return NormalData(jnp.zeros(process.shape), self.sigma_data**2)

    def __call__(
        self, t: RealScalarLike, u: Inexact[Array, "..."], args: Args
    ) -> Inexact[Array, "..."]:
        sigma = as_time(t)
        scale = (1 / jnp.sqrt(sigma**2 + self.sigma_data**2)).astype(u.dtype)
        value = self.network(0.25 * jnp.log(sigma), scale * u, args)
        # All axes are batch axes.
        process, data = EDM(()), NormalData(0.0, self.sigma_data**2)
        return precondition(process, data, time_for(u, sigma), u, value)
