import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from .discrete import as_list, DiscreteVP
from .scheduled import AbstractScheduledProcess, arguments


class VP(AbstractScheduledProcess):
    r"""The variance-preserving process of DDPM in continuous time:

    $$\mathrm{d}x = -\tfrac{1}{2} \beta_t\,x\,\mathrm{d}t + \sqrt{\beta_t}\,\mathrm{d}w.$$

    Paper, equation 8, with $\alpha_t = \exp(-\int_0^t \beta)$.

    ??? cite "Reference"

        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole,
        *Score-Based Generative Modeling through Stochastic Differential Equations*,
        ICLR 2021.
    """

    @staticmethod
    def from_betas(shape: tuple[int, ...] | int, betas: ArrayLike | list) -> DiscreteVP:
        """The process of a discrete-time model, from its betas.

        **Arguments:**

        - `shape`: the shape of one data sample.
        - `betas`: one per index, in (0, 1); the last may be 1, for zero-terminal SNR.

        **Returns:** a [`gddim_eqx.DiscreteVP`][].

        **Raises:** `ValueError` for numbers out of range.
        """
        return DiscreteVP(shape, np.cumprod(1 - as_list("betas", betas)))

    @staticmethod
    def from_alphas_cumprod(
        shape: tuple[int, ...] | int, alphas_cumprod: ArrayLike | list
    ) -> DiscreteVP:
        r"""The process of a discrete-time model, from the products $\bar\alpha_i$ of one
        minus its betas. Arguments as for [`gddim_eqx.DiscreteVP`][]."""
        return DiscreteVP(shape, alphas_cumprod)

    def _diffusion(self, t):
        return jnp.sqrt(self.schedule.rate(t))

    def _std(self, t):
        return jnp.sqrt(self.schedule.variance(t))


VP.__init__.__doc__ = arguments
