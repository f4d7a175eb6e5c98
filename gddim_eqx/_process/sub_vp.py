import jax.numpy as jnp

from .scheduled import AbstractScheduledProcess, arguments


class SubVP(AbstractScheduledProcess):
    r"""The sub-variance-preserving process:

    $$\mathrm{d}x = -\tfrac{1}{2} \beta_t\,x\,\mathrm{d}t
    + \sqrt{\beta_t (1 - e^{-2 \int_0^t \beta})}\,\mathrm{d}w,$$

    whose standard deviation given data is $1 - e^{-\int_0^t \beta}$.

    ??? cite "Reference"

        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole,
        *Score-Based Generative Modeling through Stochastic Differential Equations*,
        ICLR 2021.
    """

    def _diffusion(self, t):
        variance = self.schedule.variance(t)
        return jnp.sqrt(self.schedule.rate(t) * variance * (2 - variance))

    def _std(self, t):
        return self.schedule.variance(t)


SubVP.__init__.__doc__ = arguments
