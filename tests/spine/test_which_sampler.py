"""Samplers by their names elsewhere: each row of the site's table that claims equality,
against the published formulas in NumPy."""

import diffrax as dfx
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import solve


pytestmark = pytest.mark.x64

_rng = np.random.default_rng(0)
_mixture = gd.GaussianMixture(_rng.normal(size=(3, 2)), 0.3)
_start = _rng.normal(size=(5, 2))


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


class _VP:
    """A variance-preserving process at some times, given alpha-bar at these."""

    def __init__(self, process, ts, alphas):
        self.process, self.ts, self.alphas = process, ts, alphas
        self.model = _mixture.model(process)
        self.flow = gd.ProbabilityFlow(process, self.model)

    @classmethod
    def discrete(cls):
        betas, indices = np.linspace(1e-4, 0.02, 1000), [999, 850, 700, 500, 400, 200]
        process = gd.VP.from_betas((2,), betas)
        return cls(
            process, process.time(jnp.asarray(indices)), np.cumprod(1 - betas)[indices]
        )

    @classmethod
    def continuous(cls):
        ts = np.linspace(1.0, 0.1, 6)
        return cls(gd.VP((2,)), jnp.asarray(ts), np.exp(-0.1 * ts - 9.95 * ts**2))

    def noise(self, n, x):
        return np.asarray(self.model(self.ts[n], jnp.asarray(x), None))

    def data(self, n, x):
        a = self.alphas[n]
        return (x - np.sqrt(1 - a) * self.noise(n, x)) / np.sqrt(a)


def _karras(number, low=0.02, high=8.0):
    powers = np.linspace(high ** (1 / 7), low ** (1 / 7), number + 1)
    return powers**7


class _EDM:
    def __init__(self):
        self.process = gd.EDM((2,))
        self.sigmas = _karras(8)
        self.model = _mixture.model(self.process, "data")
        self.flow = gd.ProbabilityFlow(self.process, self.model, "data")

    def slope(self, sigma, x):
        return (x - np.asarray(self.model(sigma, jnp.asarray(x), None))) / sigma

    def solve(self, solver):
        return solve(self.flow, solver, jnp.asarray(self.sigmas), jnp.asarray(8 * _start))


def test_ddim():
    d, x = _VP.discrete(), _start
    for n, a in enumerate(d.alphas[1:]):
        x = np.sqrt(a) * d.data(n, x) + np.sqrt(1 - a) * d.noise(n, x)
    for solver in (gd.GDDIM(1), gd.GDDIM(1, "noise")):
        _close(solve(d.flow, solver, d.ts, jnp.asarray(_start)), x)


def test_ddim_with_eta_one_and_ddpm_with_the_posterior_variance():
    d = _VP.discrete()
    for n, (a, b) in enumerate(zip(d.alphas[1:], d.alphas[:-1])):
        variance = (1 - a) / (1 - b) * (1 - b / a)
        back, added = gd.reverse_transition(d.process, d.ts[n + 1], d.ts[n], 1.0)
        _close(added.blocks.squeeze(), variance)
        # What multiplies the noise prediction; that of the data prediction follows.
        _close(back.blocks.squeeze(), np.sqrt((1 - a - variance) / (1 - b)))
        # DDPM's form: the mean of q(x_t | x_s, x_0), and beta_t for a step of one index.
        _close(back.blocks.squeeze(), np.sqrt(b / a) * (1 - a) / (1 - b))


def test_dpm_solver_pp_2m_is_exact_here():
    """As DPM-Solver++(2M), but with the exact integral of the linear polynomial. Theirs
    differs in a term of third order in the step."""
    d, x, before = _VP.continuous(), _start, None
    signal, std = np.sqrt(d.alphas), np.sqrt(1 - d.alphas)
    log_snr = np.log(signal / std)
    steps = np.diff(log_snr)
    for n, h in enumerate(steps):
        data = d.data(n, x)
        slope = 0.0 if before is None else (data - before) / steps[n - 1]
        theirs = (1 - np.exp(-h)) * h / 2
        exact = h - 1 + np.exp(-h)
        assert abs(theirs - exact) < h**3 / 6
        x = std[n + 1] / std[n] * x + signal[n + 1] * (
            (1 - np.exp(-h)) * data + exact * slope
        )
        before = data
    solver = gd.GDDIM(2, corrector=0, coordinate="log_snr")
    _close(solve(d.flow, solver, d.ts, jnp.asarray(_start)), x)


@pytest.mark.parametrize("order", (2, 4))
def test_lms_of_k_diffusion(order):
    """An Adams-Bashforth method in sigma, with a warm-up of lower order."""
    e, x, slopes = _EDM(), 8 * _start, []
    for n, (s, t) in enumerate(zip(e.sigmas[:-1], e.sigmas[1:])):
        slopes = [e.slope(s, x), *slopes][:order]
        times = e.sigmas[n::-1][: len(slopes)]
        for j, slope in enumerate(slopes):
            basis = np.polynomial.Polynomial([1.0])
            for other in np.delete(times, j):
                basis *= np.polynomial.Polynomial([-other, 1]) / (times[j] - other)
            integral = basis.integ()
            x = x + (integral(t) - integral(s)) * slope
    _close(e.solve(gd.GDDIM(order, "noise")), x)


def test_euler_of_k_diffusion():
    e, x = _EDM(), 8 * _start
    for s, t in zip(e.sigmas[:-1], e.sigmas[1:]):
        x = x + (t - s) * e.slope(s, x)
    _close(e.solve(gd.GDDIM(1)), x)
    _close(e.solve(dfx.Euler()), x)


def test_heun_of_edm():
    e, x = _EDM(), 8 * _start
    for s, t in zip(e.sigmas[:-1], e.sigmas[1:]):
        slope = e.slope(s, x)
        x = x + (t - s) * (slope + e.slope(t, x + (t - s) * slope)) / 2
    _close(e.solve(dfx.Heun()), x)


def test_euler_ancestral_of_k_diffusion():
    e = _EDM()
    for s, t in zip(e.sigmas[:-1], e.sigmas[1:]):
        up = np.sqrt(t**2 * (s**2 - t**2) / s**2)
        down = np.sqrt(t**2 - up**2)
        back, added = gd.reverse_transition(e.process, jnp.asarray(t), jnp.asarray(s), 1.0)
        _close(added.blocks.squeeze(), up**2)
        _close(back.blocks.squeeze(), down / s)


def test_euler_of_flow_matching():
    process = gd.RectifiedFlow((2,), shift=3.0)
    flow = gd.ProbabilityFlow(process, _mixture.model(process, "flow"), "flow")
    ts = gd.time_grid(process, 8, "uniform")
    x = _start
    for s, t in zip(ts[:-1], ts[1:]):
        change = process.sigma(t) - process.sigma(s)
        x = x + np.asarray(change * flow.model(s, jnp.asarray(x), None))
    _close(solve(flow, gd.GDDIM(1), ts, jnp.asarray(_start)), x)
