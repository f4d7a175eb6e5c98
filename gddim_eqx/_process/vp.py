import jax.numpy as jnp

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

    def _diffusion(self, t):
        return jnp.sqrt(self.schedule.rate(t))

    def _std(self, t):
        return jnp.sqrt(self.schedule.variance(t))


VP.__init__.__doc__ = arguments
