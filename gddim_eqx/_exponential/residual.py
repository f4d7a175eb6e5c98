import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._custom_types import State
from .._linear import apply, BlockLinearOperator
from .reverse_transition import NoiseTransition


class Residual(eqx.Module):
    r"""The part of the noise predictions along a reverse diffusion that the linear part of
    the equation does not explain,

    $$\eta_t = \eta_s + W\,(\epsilon_t - \Omega(t, s)\,\epsilon_s - \xi), \qquad
    W^{-1} = \frac{1}{t - s} \int_s^t \Omega(t, \tau)\,\mathrm{d}\tau,$$

    assuming that it grows uniformly over the step from $s$ to $t$.
    """

    gain: BlockLinearOperator
    """$W$."""
    offset: State
    r"""The term added to $W \epsilon_t$."""

    def __call__(self, noise: State, known: Bool[Array, ""]) -> State:
        """The residual at a new noise prediction, if that of the previous step is known."""
        grown = apply(self.gain, noise)
        return jtu.tree_map(
            lambda x, g, o: jnp.where(known, g + o, x), noise, grown, self.offset
        )


def next_residual(
    shape: tuple[int, ...],
    transition: NoiseTransition,
    noise: State,
    value: State,
    normal: State,
) -> Residual:
    """The map from the next noise prediction to its residual.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `transition`: the transition of the noise prediction over the step.
    - `noise`, `value`: the noise prediction and the residual at the start of the step.
    - `normal`: the standard normals of the step.
    """
    omega, noise_root, mean_omega = (
        BlockLinearOperator(x, shape)
        for x in (transition.omega, transition.noise_root, transition.mean_omega)
    )
    gain = mean_omega.inverse()
    explained = apply(gain @ omega, noise), apply(gain @ noise_root, normal)
    offset = jtu.tree_map(lambda v, a, b: v - a - b, value, *explained)
    return Residual(gain, offset)
