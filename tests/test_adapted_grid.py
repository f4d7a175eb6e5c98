"""Time grids that are learnt from a few samples."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import mixture_for, slow


_angle = np.pi / 4 * np.arange(8)
_ring = gd.GaussianMixture(np.stack([np.cos(_angle), np.sin(_angle)], -1), 0.05)


@pytest.mark.x64
@pytest.mark.parametrize(
    "solver, gain",
    [(gd.GDDIM(), 2), *slow((dfx.Heun(), 1.2))],
)
def test_other_samples_are_more_accurate_than_on_any_power(solver, gain):
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, _ring.model(process))
    draw = lambda seed: process.prior(jax.random.key(seed), (64,))
    grid = gd.adapted_grid(flow, draw(7), 10, solver)
    assert grid.ts.shape == (11,) and (jnp.diff(grid.ts) < 0).all()
    assert grid.ts[0] == process.t_max and grid.ts[-1] == process.t_min
    assert grid.error < 0.5 * grid.error_before

    u = draw(0)
    exact = gd.generate(flow, u, 300)
    run = jax.jit(lambda ts: gd.generate(flow, u, solver=solver, ts=ts))
    error = lambda ts: float(jnp.median(jnp.linalg.norm(run(ts) - exact, axis=-1)))
    powers = [error(gd.time_grid(process, 10, float(p))) for p in (1, 2, 3, 4, 5, 6, 7)]
    assert gain * error(grid.ts) < min(*powers, error(gd.time_grid(process, 10)))


@pytest.mark.x64
def test_other_grids_other_directions_and_other_precisions():
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, mixture_for(process, scale=0.5).model(process))
    u = process.prior(jax.random.key(0), (4,), jnp.float32)
    ts = gd.time_grid(process, 4, "quadratic", t0=0.01, t1=0.8, dtype=jnp.float32)
    grid = gd.adapted_grid(flow, u, ts=ts, num_iterations=5)
    assert grid.ts.dtype == jnp.float32 and (jnp.diff(grid.ts) > 0).all()
    assert grid.ts[0] == ts[0] and grid.ts[-1] == ts[-1]
    assert grid.error <= grid.error_before
    # Before the first improvement the grid is the one that was given.
    same = gd.adapted_grid(flow, u, ts=ts, num_iterations=1).ts
    np.testing.assert_allclose(same, ts, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_iterations=0), "`num_iterations` must be a positive integer; got 0"),
        (dict(u=np.zeros((0, 2), np.float32)), "`u` holds no states"),
        (dict(u=np.zeros((3, 4), np.float32)), "The states `u` must be an array of shape"),
        (dict(num_steps=0), "`num_steps` must be a positive integer"),
    ],
)
def test_bad_input_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    with pytest.raises(ValueError, match=message):
        gd.adapted_grid(flow, **{"u": np.zeros((3, 2), np.float32), **arguments})
