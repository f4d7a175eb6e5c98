import functools as ft
import math

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from .._custom_types import RealScalarLike
from .._linear import BlockLinearOperator, matmul
from .._misc import as_shape, check_not_negative, check_positive, constant_field
from .langevin import AbstractAugmentedProcess
from .tables import integration_matrix, nodes_of_panels, PiecewisePolynomial
from .time_axis import as_times


class CLD(AbstractAugmentedProcess):
    r"""Critically-damped Langevin diffusion: data $x$ with a velocity $v$,

    $$\mathrm{d}x = \beta_t M^{-1} v\,\mathrm{d}t, \qquad
    \mathrm{d}v = -\beta_t (x + \Gamma M^{-1} v)\,\mathrm{d}t
    + \sqrt{2 \Gamma \beta_t}\,\mathrm{d}w, \qquad \Gamma = 2 \sqrt{M},$$

    $\beta_t = \beta_0 + \beta_1 t$. The initial velocity is normal with variance
    $\gamma M$, and is included in the covariance given data: $\Sigma_0 = \mathrm{diag}
    (\varepsilon, \gamma M + \varepsilon)$, as in the authors' code. Sample with the
    $\varepsilon$ that the network was trained with, as the frame $R_t$ in which noise is
    predicted depends on it.

    Train networks with preconditioning, by the `data_std` of
    [`gddim_eqx.nn.NetworkModel`][], to predict data. At the end of the process, the noise
    in the velocity carries almost no information about the data, and a small error in it,
    even by rounding, becomes a very large one in the samples.

    This is equation 10 of the paper with two misprints corrected (the sign of the force,
    and the noise, which lacks the mass).

    ??? cite "Reference"

        T. Dockhorn, A. Vahdat, K. Kreis, *Score-Based Generative Modeling with
        Critically-Damped Langevin Diffusion*, ICLR 2022.

    **Arguments:**

    - `shape`: the shape of one data sample.
    - `beta`, `beta_slope`: the rate is `beta + beta_slope * t`.
    - `mass_inverse`: 1 / M. The friction follows from critical damping.
    - `gamma`: the variance of the initial velocity, divided by the mass.
    - `epsilon`: added to both initial variances, so that the covariance is non-singular at
        time 0.
    - `t_min`, `t_end`: sampling runs from `t_end` down to `t_min`.
    """

    # In the coordinates (x, w) with v = sqrt(M) w, and in rescaled time y with
    # dy = beta dt / sqrt(M), nothing depends on the mass:
    #   dx = w dy,  dw = -(x + 2 w) dy + 2 dW(y),  stationary covariance the identity.

    shape: tuple[int, ...] = eqx.field(static=True, converter=as_shape)
    beta: float = constant_field("beta", 4.0)
    beta_slope: float = constant_field("beta_slope", 0.0)
    mass_inverse: float = constant_field("mass_inverse", 4.0, check_positive)
    gamma: float = constant_field("gamma", 0.04, check_not_negative)
    epsilon: float = constant_field("epsilon", 1e-6, check_positive)
    t_min: float = constant_field("t_min", 1e-3)
    t_end: float = constant_field("t_end", 1.0)

    num_components = 2

    def _elapsed(self, t, s: RealScalarLike = 0.0):
        """The increase of rescaled time from `s` to `t`."""
        return math.sqrt(self.mass_inverse) * self._rescaled(t, s)

    def _initial_variances(self) -> tuple[float, float]:
        return self.epsilon, self.gamma + self.epsilon * self.mass_inverse

    def _unscaled(self, rows, power_of_rows, power_of_columns) -> Array:
        """Convert blocks from (x, w) to (x, v): multiply the velocity's row and column by
        the given powers of sqrt(M)."""
        root = 1 / math.sqrt(self.mass_inverse)
        down, right = root**power_of_rows, root**power_of_columns
        (a, b), (c, d) = rows
        return jnp.array([[a, right * b], [down * c, down * right * d]])

    def _drift(self, t):
        speed = math.sqrt(self.mass_inverse) * self._rate(t)
        return self._unscaled([[0.0, speed], [-speed, -2 * speed]], 1, -1)

    def _diffusion(self, t):
        speed = math.sqrt(self.mass_inverse) * self._rate(t)
        return self._unscaled([[0.0, 0.0], [0.0, 2 * jnp.sqrt(speed)]], 1, 0)

    def _transition(self, t, s):
        y = self._elapsed(t, s)
        decay = jnp.exp(-y)
        rows = [[decay * (1 + y), decay * y], [-decay * y, decay * (1 - y)]]
        return self._unscaled(rows, 1, -1)

    def _covariance(self, t):
        xx, xw, ww = _covariance(self._elapsed(t), *self._initial_variances())
        return self._unscaled([[xx, xw], [xw, ww]], 1, 1)

    def _cholesky(self, t):
        p, q, r = _cholesky(self._elapsed(t), *self._initial_variances())
        return self._unscaled([[p, 0.0], [q, r]], 1, 0)

    def _factor(self, t):
        table = _rotation(self._elapsed(self.t_end), *self._initial_variances())
        cosine, sine = table(self._elapsed(t))
        return matmul(self._cholesky(t), jnp.array([[cosine, -sine], [sine, cosine]]))

    def stationary_reversal(
        self, t: RealScalarLike, s: RealScalarLike
    ) -> tuple[BlockLinearOperator, BlockLinearOperator]:
        """The reverse diffusion if the distribution at all times were the prior: an
        Ornstein-Uhlenbeck process, which the symmetric splitting of Dockhorn et al. solves
        exactly.

        **Arguments:**

        - `t`, `s`: times with `t <= s`.

        **Returns:** the transition from `s` down to `t`, and the Cholesky factor of its
        covariance.
        """
        # The forward process with the velocity's sign flipped, started without noise.
        y = -self._elapsed(*as_times(t, s))
        decay = jnp.exp(-y)
        rows = [[decay * (1 + y), -decay * y], [decay * y, decay * (1 - y)]]
        p, q, r = _cholesky(y, 0.0, 0.0)
        root = self._unscaled([[p, 0.0], [-q, r]], 1, 0)
        transition = self._operator(self._unscaled(rows, 1, -1))
        return transition, self._operator(root, lx.lower_triangular_tag)

    def _prior_factor(self):
        return self._unscaled(jnp.eye(2), 1, 0)


def _exponential_tail(x, xp):
    """1 - exp(-x) (1 + x + x^2 / 2), to full relative precision for all x >= 0."""
    # Where cancellation costs less than a digit, and these terms more than suffice.
    switch = 1.0 if x.dtype == np.float64 else 3.0
    # Not a minimum: its derivative compares numbers for equality, and XLA may compute
    # them twice with different rounding.
    small = xp.where(x < switch, x, switch)
    series = 0.0
    for k in range(18, 3, -1):
        series = (1 + series) * small / k
    series = xp.exp(-small) * small**3 / 6 * (1 + series)
    return xp.where(x < switch, series, 1 - xp.exp(-x) * (1 + x + x * x / 2))


def _covariance(y, a, b, xp=jnp):
    """The covariance of (x, w) at rescaled time y, from diag(a, b) at 0, without
    cancellation."""
    decay, tail = xp.exp(-2 * y), _exponential_tail(2 * y, xp)
    xx = decay * (a * (1 + y) ** 2 + b * y * y) + tail
    xw = decay * y * ((b - a) + (2 - a - b) * y)
    ww = decay * (b * (1 - y) ** 2 + a * y * y + 4 * y) + tail
    return xx, xw, ww


def _cholesky(y, a, b, xp=jnp):
    xx, xw, ww = _covariance(y, a, b, xp)
    p = xp.sqrt(xx)
    q = xw / xp.where(p > 0, p, 1)
    return p, q, xp.sqrt(ww - q * q)


@ft.lru_cache(maxsize=64)
def _rotation(end: float, a: float, b: float) -> PiecewisePolynomial:
    """The cosine and sine of the angle from L_t to R_t, as a function of rescaled time.

    Equation 17 of the paper with R = L Rot(angle) becomes d(angle)/dy = -L_22 / L_11:
    one quadrature.
    """
    degree = 9
    # The rotation is fast at first, while noise overtakes `a`, and then linear in the
    # logarithm of time: geometric panels.
    onset = min(math.sqrt(a / b), a ** (1 / 3))
    panels = 40 + 14 * math.ceil(math.log2(1 + end / onset))
    grid = np.linspace(0, np.arcsinh(end / onset), panels + 1)
    edges = onset * np.sinh(grid)
    # Eventually it rotates at unit speed: no panel may be wider than half a radian.
    pieces = np.ceil(2 * np.diff(edges))
    edges = np.interp(
        np.arange(pieces.sum() + 1), np.concatenate([[0], np.cumsum(pieces)]), edges
    )
    p, _, r = _cholesky(nodes_of_panels(edges, degree), a, b, np)
    # The integrals from the left edge of each panel, and those before it.
    integrals = (-r / p) @ integration_matrix(degree).T * np.diff(edges)[:, None] / 2
    before = np.concatenate([[0.0], np.cumsum(integrals[:-1, -1])])
    angle = before[:, None] + integrals[:, :-1]
    return PiecewisePolynomial(edges, np.stack([np.cos(angle), np.sin(angle)], -1))
