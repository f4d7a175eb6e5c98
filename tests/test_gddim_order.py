"""How fast the error of GDDIM falls with the step."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from .helpers import accurate, mixture_for


# Where the flow bends, away from either end.
_flows = {
    "vp": (gd.VP((2,)), 0.7, 0.3),
    "cld": (gd.CLD((2,)), 0.5, 0.2),
    "bdm": (gd.BDM((2, 2, 1), sigma_blur_max=2.0), 0.6, 0.3),
}
_numbers = (128, 256, 512)
_longest = 512 + 4


def _grids(kind, t0, t1, number, before):
    """Grids, `(grids, _longest)`, whose times at `before` and `before + number` are `t0`
    and `t1`; padded at the end."""
    index = np.arange(-before, number + 1) / number
    if kind == "uniform":
        ts = (t0 + (t1 - t0) * index)[None]
    elif kind == "power":
        ts = ((t0**0.5 + (t1**0.5 - t0**0.5) * index) ** 2)[None]
    else:
        steps = np.random.default_rng(0).uniform(0.7, 1.3, (12, number + before))
        ts = np.cumsum(np.pad(steps, ((0, 0), (1, 0))), axis=1)
        start, end = ts[:, before, None], ts[:, -1:]
        ts = t0 + (t1 - t0) * (ts - start) / (end - start)
    ts[:, before], ts[:, -1] = t0, t1
    return jnp.asarray(np.pad(ts, ((0, 0), (0, _longest - ts.shape[1])), mode="edge"))


@ft.cache
def _flow(name, backward):
    """The term, where it starts and ends, and its solution from a little before."""
    process, late, early = _flows[name]
    t0, t1 = (late, early) if backward else (early, late)
    term = gd.ProbabilityFlow(process, mixture_for(process, scale=0.6).model(process))
    before = t0 + 0.25 * (t0 - t1)
    y = accurate(term, t0, before, process.prior(jax.random.key(0), (3,)), rtol=1e-13)
    controller = dfx.PIDController(rtol=1e-13, atol=1e-13)
    sol = dfx.diffeqsolve(
        term,
        dfx.Dopri8(),
        before,
        t1,
        None,
        y,
        stepsize_controller=controller,
        saveat=dfx.SaveAt(dense=True),
        max_steps=4096,
    )
    return term, t0, t1, sol


@ft.cache
def _solver(name, order, seeded):
    """One function for all grids: from times to the states at the last."""
    solver = gd.GDDIM(order)
    before = order - 1 if seeded else 0

    def run(sol, ts, number):
        term = _flow(name, True)[0]
        y = sol.evaluate(ts[before])
        state = solver.init(term, ts[before], ts[before + 1], y, None)
        for i in range(before):
            noise = term.noise(ts[i], sol.evaluate(ts[i]), None)
            state = eqx.tree_at(
                lambda s: (s.times, s.noises),
                state,
                (
                    state.times.at[i].set(ts[i]),
                    jtu.tree_map(lambda a, b: a.at[i].set(b), state.noises, noise),
                ),
            )
        seeds = jnp.asarray(before, jnp.int32)
        slot = seeds % state.times.shape[0]
        state = eqx.tree_at(lambda s: (s.count, s.slot), state, (seeds, slot))

        def step(i, carry):
            y, state = carry
            y, _, _, state, _ = solver.step(term, ts[i], ts[i + 1], y, None, state, False)
            return y, state

        return jax.lax.fori_loop(before, before + number, step, (y, state))[0]

    return eqx.filter_jit(eqx.filter_vmap(run, in_axes=(None, 0, None)))


def _error(name, order, kind, backward, number, seeded):
    _, t0, t1, sol = _flow(name, backward)
    before = order - 1 if seeded else 0
    ys = _solver(name, order, seeded)(
        sol, _grids(kind, t0, t1, number, before), jnp.asarray(number)
    )
    squares = jtu.tree_map(
        lambda y, end: ((y - end[None]) ** 2).reshape(y.shape[0], -1).sum(1),
        ys,
        sol.evaluate(t1),
    )
    return np.exp(0.5 * np.log(np.asarray(sum(jtu.tree_leaves(squares)))).mean())


def _observed_order(errors):
    return -np.polyfit(np.log(_numbers), np.log(errors), 1)[0]


@pytest.mark.x64
@pytest.mark.parametrize("order", (1, 2, 3, 4))
@pytest.mark.parametrize("name", _flows)
def test_multistep_formula_has_its_order(name, order):
    for kind in ("uniform", "power", "random"):
        for backward in (True, False):
            errors = [_error(name, order, kind, backward, n, True) for n in _numbers]
            observed = _observed_order(errors)
            assert abs(observed - order) < 0.15, (kind, backward, observed, errors)


@pytest.mark.x64
def test_a_start_with_lower_orders_leaves_a_second_order_error():
    errors = [_error("vp", 4, "uniform", True, n, False) for n in _numbers]
    assert abs(_observed_order(errors) - 2) < 0.15
