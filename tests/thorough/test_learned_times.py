"""Time grids that are learnt from a few samples."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import mixture_for, slow


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
    grid = gd.fit_solver(flow, draw(7), 10, solver, "times", progress=False)
    assert grid.solver is solver
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
    u = process.prior(jax.random.key(0), (8,), jnp.float32)
    ts = gd.time_grid(process, 4, "quadratic", t0=0.01, t1=0.8, dtype=jnp.float32)
    grid = gd.fit_solver(flow, u, learn="times", ts=ts, num_iterations=5, progress=False)
    assert grid.ts.dtype == jnp.float32 and (jnp.diff(grid.ts) > 0).all()
    assert grid.ts[0] == ts[0] and grid.ts[-1] == ts[-1]
    assert grid.error <= grid.error_before
    # Without an improvement, the grid is the one that was given.
    same = gd.fit_solver(
        flow, u, learn="times", ts=ts, num_iterations=2, learning_rate=0.0, progress=False
    )
    np.testing.assert_array_equal(same.ts, ts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_iterations=1), "`num_iterations` must be a"),
        (dict(u=np.zeros((0, 2), np.float32)), "at least 8 pilots"),
        (dict(u=np.zeros((3, 4), np.float32)), "The states `u` must be an array of shape"),
        (dict(num_steps=0), "`num_steps` must be a positive integer"),
    ],
)
def test_bad_input_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    with pytest.raises(ValueError, match=message):
        options = {"u": np.zeros((8, 2), np.float32), **arguments}
        gd.fit_solver(flow, learn="times", **options)


def test_the_former_name_is_told_to_be_a_part_of_fit_solver():
    with pytest.raises(AttributeError, match="Use `fit_solver"):
        gd.adapted_grid  # pyright: ignore
    with pytest.raises(AttributeError, match="Use `gddim_eqx.results.Samples`"):
        gd.Samples  # pyright: ignore
