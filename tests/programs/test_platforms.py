"""Programs for accelerators: that nothing in them is for CPUs only, and that what must be
precise stays so where networks compute in bfloat16."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax import lax

import gddim_eqx as gd
from gddim_eqx._exponential import SemilinearSplitting
from gddim_eqx._sampling.sample import _Sampler
from gddim_eqx._sampling.solve import PaddedGrid
from gddim_eqx._term import without_errors
from gddim_eqx.training import DenoisingLoss, Trainer

from ..helpers import every_process, mixture_for, processes, slow


_platforms = ("cuda", "tpu")


def _small(dtype=None):
    shape = (8, 8, 1)
    make = lambda: gd.nn.presets.small((8, 8, 2), key=jr.key(0), features=8, dtype=dtype)
    return gd.CLD(shape), make


_presets = {
    "small": _small,
    "cifar10_cld": lambda: (
        gd.CLD((32, 32, 3)),
        lambda: gd.nn.presets.cifar10_cld(key=jr.key(0), dtype=jnp.bfloat16),
    ),
    "cifar10_bdm": lambda: (
        gd.BDM((32, 32, 3)),
        lambda: gd.nn.presets.cifar10_bdm(key=jr.key(0), dtype=jnp.bfloat16),
    ),
    "dit": lambda: (
        gd.VP((16, 16, 3)),
        lambda: gd.nn.DiT((16, 16, 3), width=32, depth=2, num_heads=2, key=jr.key(0)),
    ),
}


def _exported(run, *args):
    """A program that is lowered for accelerators, of a function of arrays."""
    arrays, static = eqx.partition(args, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    merged = lambda arrays: eqx.filter(run(*eqx.combine(arrays, static)), eqx.is_array)
    return jax.export.export(jax.jit(merged), platforms=_platforms)(arrays)


def _draw(flow, solver, lam, key, num_steps=10):
    """What `sample` compiles."""
    with jax.ensure_compile_time_eval():
        grid = PaddedGrid.of(gd.time_grid(flow.process, num_steps))
    rest = None, solver, lam, None, grid, key, None
    sampler, index = _Sampler(without_errors(flow), *rest), jnp.arange(4, dtype=jnp.uint32)
    return sampler.draw(index, dfx.NoProgressMeter())


@pytest.mark.float32
@pytest.mark.parametrize("name", ["small", *slow("cifar10_cld", "cifar10_bdm", "dit")])
def test_sampling_and_training_are_lowered_for_accelerators(name):
    process, make = _presets[name]()
    shapes = eqx.filter_eval_shape(lambda: gd.nn.NetworkModel(process, make()))
    key = eqx.filter_eval_shape(jr.key, 0)
    flow = gd.ProbabilityFlow(process, shapes)
    for lam, solver in ((0.0, gd.GDDIM()), (1.0, gd.GDDIM(1))):
        solve = lambda flow, key: _draw(flow, solver, lam, key)
        assert _exported(solve, flow, key).platforms == _platforms
    trainer = Trainer(DenoisingLoss(process))
    state = eqx.filter_eval_shape(trainer._init, shapes, key)
    batch = jax.ShapeDtypeStruct((4, *process.shape), jnp.uint8)
    step = lambda state, batch: trainer._step(state, batch, None)
    assert _exported(step, state, batch).platforms == _platforms


def _equations(jaxpr):
    """All equations of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _solved(flow, solver, lam, num_steps=10):
    """The program that `sample` compiles, and what it returns."""
    solve = lambda: _draw(flow, solver, lam, jr.key(0), num_steps)
    return jax.make_jaxpr(solve)().jaxpr, jax.eval_shape(solve)


def _rounded(jaxpr):
    """The matrix products whose factors GPUs and TPUs round, to TF32 or bfloat16."""
    full = lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2
    products = ("dot_general", "conv_general_dilated")
    return [
        equation
        for equation in _equations(jaxpr)
        if equation.primitive.name in products and equation.params["precision"] not in full
    ]


@every_process
def test_accelerators_round_no_factors_of_matrix_products(name):
    process = processes[name]()
    flow = gd.ProbabilityFlow(process, mixture_for(process).model(process))
    for solver, lam in ((gd.GDDIM(), 0.0), (gd.GDDIM(2), 1.0), (dfx.Euler(), 1.0)):
        assert not _rounded(_solved(flow, solver, lam)[0])


def test_accelerators_round_no_factors_in_semilinear_equations():
    blocks = jnp.array([[-1.0, 3.0], [-2.0, 0.5]])
    linear = lambda t: gd.BlockLinearOperator(blocks * t, (3,))
    term = gd.Semilinear(linear, lambda t, u, args: u)
    t0, t1, u = jnp.asarray(0.0), jnp.asarray(1.0), gd.Phase(jnp.ones(3), jnp.zeros(3))
    integrate = lambda: SemilinearSplitting().integrate(term.linear_part(u), t0, t1, 4)
    assert not _rounded(jax.make_jaxpr(integrate)().jaxpr)


@pytest.mark.parametrize("lam, casts", ((0.0, True), (1.0, True), (0.0, False)))
def test_coefficients_and_times_are_not_in_bfloat16_where_the_network_is(lam, casts):
    process = gd.CLD((3,))

    def model(t, u, args):
        assert t.dtype != jnp.bfloat16
        half = jax.tree.map(lambda x: jnp.tanh(x.astype(jnp.bfloat16)), u)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), half, u) if casts else half

    solver = gd.GDDIM() if lam == 0 else gd.GDDIM(2)
    jaxpr, results = _solved(gd.ProbabilityFlow(process, model), solver, lam)
    values = [value.aval for equation in _equations(jaxpr) for value in equation.outvars]
    # Only what the model computes, which has the shape of a batch.
    assert {x.shape for x in values if x.dtype == jnp.bfloat16} == {(4, 3)}
    assert results[0].dtype == jnp.zeros(()).dtype
