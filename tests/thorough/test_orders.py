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

from ..helpers import accurate, adaptive, mixture_for


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
    saveat = dfx.SaveAt(dense=True)
    sol = adaptive(term, dfx.Dopri8(), before, t1, None, y, 1e-13, saveat=saveat)
    return term, t0, t1, sol


@ft.cache
def _solver(name, solver, seeded):
    """One function for all grids: from times to the states at the last."""
    before = solver._slots if seeded else 0

    def run(sol, ts, number):
        term = _flow(name, True)[0]

        def step(i, y, state):
            return solver.step(term, ts[i], ts[i + 1], y, None, state, False)

        y = sol.evaluate(ts[before])
        start = state = solver.init(term, ts[before], ts[before + 1], y, None)
        stored = lambda state: (state.places, state.values)
        for i in range(before):
            # A step from an exact state, which without history is not corrected. Its
            # evaluation is in the first slot.
            new = step(i, sol.evaluate(ts[i]), start)[3]
            seeded = jtu.tree_map(
                lambda x, y: x.at[i].set(y[0]), stored(state), stored(new)
            )
            state = eqx.tree_at(stored, new, seeded)
        if before:
            state = eqx.tree_at(lambda s: s.stored, state, jnp.ones(before, bool))

        def body(i, carry):
            y, _, _, state, _ = step(i, *carry)
            return y, state

        return jax.lax.fori_loop(before, before + number, body, (y, state))[0]

    return eqx.filter_jit(eqx.filter_vmap(run, in_axes=(None, 0, None)))


def _error(name, solver, kind, backward, number, seeded):
    _, t0, t1, sol = _flow(name, backward)
    before = solver._slots if seeded else 0
    ys = _solver(name, solver, seeded)(
        sol, _grids(kind, t0, t1, number, before), jnp.asarray(number)
    )
    squares = jtu.tree_map(
        lambda y, end: ((y - end[None]) ** 2).reshape(y.shape[0], -1).sum(1),
        ys,
        sol.evaluate(t1),
    )
    return np.exp(0.5 * np.log(np.asarray(sum(jtu.tree_leaves(squares)))).mean())


def _observed_order(errors):
    return -np.polyfit(np.log(_numbers[: len(errors)]), np.log(errors), 1)[0]


_variants = {
    **{f"noise{q}": (gd.GDDIM(q, "noise"), q) for q in (1, 2, 3, 4)},
    **{f"data{q}": (gd.GDDIM(q), q) for q in (2, 3, 4)},
    "data2_corrector2": (gd.GDDIM(2, corrector=2), 3),
    "data3_corrector1": (gd.GDDIM(3, corrector=1), 2),
    "data3_time": (gd.GDDIM(3, corrector=0, coordinate="time"), 3),
    "noise3_log_snr": (gd.GDDIM(3, "noise", coordinate="log_snr"), 3),
    "noise2_corrector2": (gd.GDDIM(2, "noise", 2), 3),
    "noise2_reevaluate2": (gd.GDDIM(2, "noise", 2, reevaluate=True), 3),
    "data3_reevaluate2": (gd.GDDIM(3, reevaluate=True), 3),
}


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, variant",
    [("vp", v) for v in _variants]
    + [(name, v) for name in ("cld", "bdm") for v in ("data4", "noise4")],
)
def test_multistep_formula_has_its_order(name, variant):
    solver, order = _variants[variant]
    for backward in (True, False):
        errors = [_error(name, solver, "random", backward, n, True) for n in _numbers]
        # With a variable that slows down the last of the order comes late, when the errors
        # of the fourth are those of the reference.
        numbers, tolerance = (2, 0.25) if variant == "data4" else (3, 0.15)
        observed = _observed_order(errors[:numbers])
        assert abs(observed - order) < tolerance, (backward, observed, errors)


@pytest.mark.x64
def test_a_start_with_lower_orders_leaves_a_second_order_error():
    solver = gd.GDDIM(4, "noise")
    errors = [_error("vp", solver, "uniform", True, n, False) for n in _numbers]
    assert abs(_observed_order(errors) - 2) < 0.15


@pytest.mark.x64
def test_the_corrector_makes_that_third_order():
    errors = [_error("vp", gd.GDDIM(), "uniform", True, n, False) for n in _numbers]
    assert abs(_observed_order(errors) - 3) < 0.25
