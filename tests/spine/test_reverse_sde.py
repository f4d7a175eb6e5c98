"""The reverse diffusions as terms for Diffrax's own solvers."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gddim_eqx as gd

from ..helpers import max_difference, mixture_for, processes, solve


def _flow(process):
    return gd.ProbabilityFlow(process, mixture_for(process, scale=0.6).model(process))


@pytest.mark.x64
@pytest.mark.parametrize("name, lam", [("vp", 1.0), ("cld", 0.5), ("bdm", 0.5)])
def test_euler_is_the_scheme_of_euler_and_maruyama(name, lam):
    process = processes[name]()
    s, t = (jnp.asarray(x, jnp.result_type(float)) for x in (0.5, 0.45))
    u = process.prior(jax.random.key(0), (3,))
    terms = gd.reverse_sde(_flow(process), lam, jax.random.key(1), (3,))
    got = solve(terms, dfx.Euler(), jnp.stack([s, t]), u)
    score = _flow(process).score(s, u, None)
    g = process.diffusion(s)
    forcing = (g @ g.T).mv(score)
    # The path itself, over the same interval.
    increments = jtu.tree_map(lambda w: -w, terms.terms[1].path.evaluate(t, s))
    increments = jtu.tree_map(lambda w, y: w.astype(y.dtype), increments, u)
    expected = jtu.tree_map(
        lambda u, f, p, w: u + (t - s) * (f - 0.5 * (1 + lam**2) * p) + lam * w,
        u,
        process.drift(s).mv(u),
        forcing,
        g.mv(increments),
    )
    assert max_difference(got, expected) < 2e-5


@pytest.mark.x64
@pytest.mark.slow
def test_other_solvers_of_diffrax_converge_to_the_same_sample():
    process, batch = gd.VP((2,)), (16,)
    u = process.prior(jax.random.key(0), batch)
    ts = jnp.linspace(0.8, 0.3, 129)
    terms = gd.reverse_sde(_flow(process), 0.7, jax.random.key(1), batch)
    run = eqx.filter_jit(lambda solver, ts: solve(terms, solver, ts, u))
    expected = run(gd.GDDIM(2), jnp.linspace(0.8, 0.3, 513))
    for solver in (dfx.Heun(), dfx.EulerHeun(), dfx.ItoMilstein()):
        assert max_difference(run(solver, ts), expected) < 4e-2, type(solver).__name__


@pytest.mark.x64
def test_solvers_that_are_wrong_backward_in_time_are_refused():
    process = gd.VP((2,))
    leaf, key = jax.ShapeDtypeStruct((2,), jnp.float32), jax.random.key(1)
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, leaf, key, dfx.SpaceTimeLevyArea)
    terms = gd.reverse_sde(_flow(process), 0.7, path)
    u, ts = process.prior(jax.random.key(0)), gd.time_grid(process, 3)
    with pytest.raises(ValueError, match="wrong results backward in time"):
        solve(terms, dfx.SRA1(), ts, u)
    assert jnp.isfinite(solve(terms, gd.GDDIM(1), ts, u)).all()


def test_the_path_is_the_same_whatever_the_precision():
    process = gd.CLD((3,))
    path = gd.reverse_sde(_flow(process), 1.0, jax.random.key(0)).terms[1].path
    ts = gd.time_grid(process, 30, dtype=jnp.float32)
    single = jax.vmap(path.evaluate)(ts[1:], ts[:-1])
    assert single.x.dtype == jnp.float32
    if jax.config.jax_enable_x64:
        ts = gd.time_grid(process, 30, dtype=jnp.float64)
        double = jax.vmap(path.evaluate)(ts[1:], ts[:-1])
        assert double.x.dtype == jnp.float32
        assert max_difference(single, double) < 1e-6


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_sharded_batch_has_the_same_sample_and_stays_sharded():
    process = gd.CLD((3,))
    u, ts = process.prior(jax.random.key(0), (8,)), gd.time_grid(process, 5)
    terms = gd.reverse_sde(_flow(process), 1.0, jax.random.key(1), (8,))
    run = eqx.filter_jit(lambda u: solve(terms, gd.GDDIM(2), ts, u, throw=False))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = run(jax.device_put(u, NamedSharding(mesh, PartitionSpec("batch"))))
    assert {s.data.shape for s in sharded.x.addressable_shards} == {(4, 3)}
    tolerance = 1e-5 if jax.config.jax_enable_x64 else 1e-4
    np.testing.assert_allclose(sharded.x, run(u).x, atol=tolerance)


@pytest.mark.x64
def test_a_path_of_the_wrong_shape_is_refused():
    process = gd.CLD((3,))
    u, ts = process.prior(jax.random.key(0), (4,)), gd.time_grid(process, 3)
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    one = dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, leaf, jax.random.key(0))
    keys = {"no batch": (jax.random.key(0),), "one array": (one,)}
    keys["other batch"] = (jax.random.key(0), (2,))
    for arguments in keys.values():
        terms = gd.reverse_sde(_flow(process), 1.0, *arguments)
        for solver in (gd.GDDIM(1), gd.SSCS(), dfx.Euler()):
            with pytest.raises(ValueError, match="Brownian path must have increments"):
                solve(terms, solver, ts, u)


@pytest.mark.x64
@pytest.mark.parametrize("solver", (gd.GDDIM(1), dfx.Euler()))
def test_steps_shorter_than_the_path_resolves_are_refused(solver):
    process = gd.VP((3,))
    u = process.prior(jax.random.key(0))
    ts = jnp.array([0.5, 0.4, 0.4 - 3e-4])
    terms = gd.reverse_sde(_flow(process), 1.0, jax.random.key(0), tol=1e-3)
    with pytest.raises(Exception, match="shorter than the tolerance of the Brownian path"):
        solve(terms, solver, ts, u)
    finer = gd.reverse_sde(_flow(process), 1.0, jax.random.key(0), tol=1e-4)
    assert jnp.isfinite(solve(finer, solver, ts, u)).all()


@pytest.mark.parametrize("lam", (-0.5, float("nan"), float("inf"), jnp.ones(2)))
def test_bad_levels_of_noise_are_refused(lam, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    process = gd.VP((2,))
    with pytest.raises(ValueError, match="`lam` must be"):
        gd.reverse_sde(_flow(process), lam, jax.random.key(0))


@pytest.mark.x64
def test_a_traced_negative_level_is_refused():
    process = gd.VP((2,))
    u, ts = process.prior(jax.random.key(0)), gd.time_grid(process, 2)

    @jax.jit
    def run(lam):
        terms = gd.reverse_sde(_flow(process), lam, jax.random.key(0))
        return solve(terms, gd.GDDIM(1), ts, u)

    assert jnp.isfinite(run(jnp.asarray(0.5))).all()
    with pytest.raises(Exception, match="`lam` must be finite and not negative"):
        run(jnp.asarray(-0.5))


def test_other_bad_arguments_are_refused():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    path = gd.reverse_sde(flow, 1.0, key).terms[1].path
    with pytest.raises(ValueError, match="`batch` and `tol` are for the path"):
        gd.reverse_sde(flow, 1.0, path, (3,))
    with pytest.raises(ValueError, match="`tol` must be positive"):
        gd.reverse_sde(flow, 1.0, key, tol=0.0)
