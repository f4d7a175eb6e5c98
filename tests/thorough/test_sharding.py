"""Sampling over several devices, simulated on the CPU."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gddim_eqx as gd

from ..helpers import mixture_for, slow


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_sharded_batch_stays_sharded():
    process = gd.CLD((3,))
    term = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    u = process.prior(jax.random.key(0), (8,))
    ts = gd.time_grid(process, 5)

    @eqx.filter_jit
    def run(u):
        return dfx.diffeqsolve(
            term,
            gd.GDDIM(),
            ts[0],
            ts[-1],
            None,
            u,
            stepsize_controller=dfx.StepTo(ts),
            max_steps=5,
            throw=False,
        ).ys

    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    sharded = run(jax.device_put(u, sharding))
    assert not sharded.x.sharding.is_fully_replicated
    assert {s.data.shape for s in sharded.x.addressable_shards} == {(1, 4, 3)}
    # In single precision a rounding error of the first predictions, where there is almost
    # nothing of the data, is one of a thousandth in the data.
    tolerance = 1e-5 if jax.config.jax_enable_x64 else 5e-4
    np.testing.assert_allclose(sharded.x, run(u).x, atol=tolerance)
    assert jnp.isfinite(sharded.x).all()


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("lam", (0.0, 1.0))
def test_samples_are_the_same_on_all_devices(lam):
    process = gd.CLD((3,))
    model = mixture_for(process).model(process)
    draw = lambda placement: gd.sample(
        gd.ProbabilityFlow(process, model),
        jax.random.key(0),
        16,
        5,
        lam=lam,
        placement=placement,
    )
    one, eight = draw(None), draw(gd.Placement())
    assert len(eight.x.sharding.device_set) == 8
    assert not eight.x.sharding.is_fully_replicated
    assert one.evaluations == eight.evaluations == 5
    tolerance = 1e-5 if jax.config.jax_enable_x64 else 5e-4
    np.testing.assert_allclose(one.x, eight.x, atol=tolerance)
    with pytest.raises(ValueError, match="A batch of 4 cannot be divided over 8"):
        gd.sample(
            gd.ProbabilityFlow(process, model),
            jax.random.key(0),
            4,
            5,
            placement=gd.Placement(),
        )


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("lam", (1.0, *slow(0.0)))
def test_samples_are_the_same_in_batches_on_all_devices(lam):
    process = gd.CLD((3,))
    model = mixture_for(process).model(process)
    draw = lambda **options: gd.sample(
        gd.ProbabilityFlow(process, model), jax.random.key(0), 64, 3, lam=lam, **options
    )
    one = draw().x
    tolerance = 1e-5 if jax.config.jax_enable_x64 else 5e-4
    for size in (8, 24, 64):
        eight = draw(batch_size=size, placement=gd.Placement())
        assert eight.evaluations == 3
        np.testing.assert_allclose(eight.x, one, atol=tolerance)
    with pytest.raises(ValueError, match="A batch of 7 cannot be divided over 8"):
        draw(batch_size=7, placement=gd.Placement())
