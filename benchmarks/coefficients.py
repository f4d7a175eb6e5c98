"""Time and accuracy of computing the coefficients of CLD, against the authors' procedure.

The authors integrate R_t over a million Runge-Kutta steps in float32, and then compute each
coefficient by a left Riemann sum over 10,000 nodes. That procedure is reimplemented here,
for order 3 on the 50-step quadratic grid: in float32, as in the authors' code, and in
float64, to measure the method rather than rounding.

    python benchmarks/coefficients.py
    python benchmarks/coefficients.py --quick  # only to see that it runs
"""

import argparse
import functools as ft
import time

import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np

import gddim_eqx as gd
from gddim_eqx._exponential import lagrange, NoiseSplitting, weights


_order = 3
_process = gd.CLD(shape=(1,))


@jax.jit
@jax.vmap
def _step(s, t, times, valid):
    nodes = (times - s) / (t - s)
    return weights(
        lagrange(nodes, valid), NoiseSplitting().integrate(_process, s, t, _order).moments
    )


def ours(ts: jax.Array) -> np.ndarray:
    """The coefficients `(steps, order, 2, 2)` of all steps."""
    number = len(ts) - 1
    index = np.arange(number)[:, None] - np.arange(_order)
    out = _step(ts[:-1], ts[1:], ts[np.maximum(index, 0)], jnp.asarray(index >= 0))
    return np.asarray(out)


@ft.partial(jax.jit, static_argnums=(0, 1))
def _authors_table(rk_steps: int, dtype) -> jax.Array:
    """R_t on a grid, by Runge-Kutta."""
    beta, mass_inverse, friction = 4.0, 4.0, 1.0
    drift = beta * jnp.array([[0, mass_inverse], [-1, -friction * mass_inverse]], dtype)
    noise = jnp.diag(jnp.array([0, 2 * friction * beta], dtype))
    dt = jnp.asarray(1 / rk_steps, dtype)

    def rate(sigma, r):
        turning = drift + 0.5 * noise @ jnp.linalg.inv(sigma)
        return drift @ sigma + sigma @ drift.T + noise, turning @ r

    def runge_kutta(carry, _):
        sigma, r = carry
        a = rate(sigma, r)
        b = rate(*(x + dt / 2 * k for x, k in zip(carry, a)))
        c = rate(*(x + dt / 2 * k for x, k in zip(carry, b)))
        d = rate(*(x + dt * k for x, k in zip(carry, c)))
        new = [
            x + dt / 6 * (i + 2 * j + 2 * k + m) for x, i, j, k, m in zip(carry, a, b, c, d)
        ]
        return tuple(new), r

    eps = 1e-6
    start = jnp.diag(jnp.array([eps, 0.01 + eps], dtype))
    return jax.lax.scan(runge_kutta, (start, jnp.sqrt(start)), length=rk_steps)[1]


@jax.jit
def _authors_integrand(table, tau, t):
    """The integrand of equation 19, with R_t interpolated linearly."""
    place = jnp.clip(tau * len(table), 0, len(table) - 2)
    left = place.astype(int)
    fraction = (place - left)[:, None, None]
    r = (1 - fraction) * table[left] + fraction * table[left + 1]
    psi = jax.vmap(lambda x: _process.transition(t, x).blocks)(tau)
    g = _process.diffusion(t).blocks
    return 0.5 * psi @ g @ g.T @ jnp.linalg.inv(r).swapaxes(1, 2)


def authors(ts: jax.Array, rk_steps: int, nodes: int, dtype) -> np.ndarray:
    """The same coefficients, by a table of R_t and left Riemann sums of equation 19."""
    table = _authors_table(rk_steps, dtype)
    out = np.zeros((len(ts) - 1, _order, 2, 2))
    times = np.asarray(ts, np.float64)
    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        tau = np.linspace(s, t, nodes, endpoint=False)
        values = np.asarray(
            _authors_integrand(table, jnp.asarray(tau, dtype), jnp.asarray(t, dtype))
        )
        known = times[max(0, i - _order + 1) : i + 1][::-1]
        for j, node in enumerate(known):
            others = np.delete(known, j)
            basis = np.prod((tau[:, None] - others) / (node - others), axis=1)
            out[i, j] = np.tensordot(basis, values, 1) * (t - s) / nodes
    return out


def exact(ts: jax.Array) -> np.ndarray:
    """Equation 19 as printed, by composite Gauss-Legendre quadrature in float64."""
    x, w = np.polynomial.legendre.leggauss(16)
    times = np.asarray(ts)
    out = np.zeros((len(ts) - 1, _order, 2, 2))

    @jax.jit
    @jax.vmap
    def integrand(tau, t):
        g, r = _process.diffusion(tau), _process.factor(tau)
        return 0.5 * (_process.transition(t, tau) @ g @ g.T @ r.inverse().T).blocks

    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        edges = np.linspace(s, t, 65)
        half = np.diff(edges)[:, None] / 2
        tau, weight = (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()
        values = np.asarray(integrand(jnp.asarray(tau), jnp.full(tau.shape, t)))
        known = times[max(0, i - _order + 1) : i + 1][::-1]
        for j, node in enumerate(known):
            others = np.delete(known, j)
            basis = np.prod((tau[:, None] - others) / (node - others), axis=1)
            out[i, j] = np.tensordot(basis * weight, values, 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    quick = parser.parse_args().quick
    steps, million, many = (5, 1000, 100) if quick else (50, 1_000_000, 10_000)
    ts = gd.time_grid(_process, steps, "quadratic")
    reference = exact(ts)

    def seconds(fn) -> float:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    columns = ("first call", "later calls", "max error", "relative")
    print(f"{f'CLD, order 3, {steps} steps':28s}" + "".join(f"{c:>12s}" for c in columns))

    def report(name: str, fn) -> tuple[float, float]:
        first, again = seconds(fn), min(seconds(fn) for _ in range(3))
        error = np.abs(fn() - reference).max()
        relative = error / np.abs(reference).max()
        print(f"{name:28s}{first:10.2e} s{again:10.2e} s{error:12.1e}{relative:12.1e}")
        return again, error

    report("this library, float32", lambda: ours(ts.astype(jnp.float32)))
    fast, exactness = report("this library, float64", lambda: ours(ts))
    report("the authors', float32", lambda: authors(ts, million, many, jnp.float32))
    slow, error = report(
        "the authors', float64", lambda: authors(ts, million, many, jnp.float64)
    )
    print(f"In float64 the authors' method takes {slow / fast:.0f} times as long", end=" ")
    print(f"and has {error / exactness:.0e} times the error.")
    print("The first call includes compilation and, for this library, its tables.")


if __name__ == "__main__":
    main()
