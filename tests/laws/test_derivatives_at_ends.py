"""Values that are known exactly at the ends of a step do not hide its derivative there."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import gddim_eqx as gd

from ..helpers import mixture_for, prior_state, processes, slow


_solvers = {
    "default": gd.GDDIM(),
    "order 1": gd.GDDIM(1),
    "noise": gd.GDDIM(3, "noise"),
    "cholesky": gd.GDDIM(2, "noise", frame="cholesky"),
    "reevaluated": gd.GDDIM(2, reevaluate=True),
    "in time": gd.GDDIM(2, corrector=0, coordinate="time"),
}


@pytest.mark.x64
@pytest.mark.parametrize(
    "process, name",
    [
        (gd.VP(()), "default"),
        (gd.CLD(()), "default"),
        *slow((gd.VP(()), "noise"), (gd.CLD(()), "noise")),
    ],
)
def test_root_finders_find_when_a_solution_crosses_a_level(process, name):
    mean, scale = 2.0, 0.5
    data = gd.GaussianMixture(jnp.array([mean]), scale)
    term = gd.ProbabilityFlow(process, data.model(process))
    start = -0.3 if process.num_components == 1 else gd.Phase(*jnp.array([-0.3, 0.1]))
    ts = gd.time_grid(process, 40)
    sol = dfx.diffeqsolve(
        term,
        _solvers[name],
        ts[0],
        ts[-1],
        None,
        jtu.tree_map(jnp.asarray, start),
        stepsize_controller=dfx.StepTo(ts),
        event=dfx.Event(
            lambda t, y, args, **kwargs: jtu.tree_leaves(y)[0] - 1.0,
            optx.Newton(1e-8, 1e-8),
        ),
    )
    if process.num_components == 1:
        # Along the flow of normal data the standardised state is constant.
        def exact(t):
            m = float(process.transition(t, 0.0).blocks[0, 0])
            return m * mean, np.sqrt(m**2 * scale**2 + 1 - m**2)

        middle, std = exact(1.0)
        z = (start - middle) / std
        at = lambda t: exact(t)[0] + exact(t)[1] * z - 1
        expected = scipy.optimize.brentq(at, 0.01, 0.99, xtol=1e-12)
        assert abs(expected - 0.299179) < 1e-6
    else:
        expected = 0.15813  # By Tsit5 with tolerances of 1e-10.
    np.testing.assert_allclose(sol.ts[-1], expected, rtol=1e-3)
    np.testing.assert_allclose(jtu.tree_leaves(sol.ys)[0][-1], 1.0, atol=1e-7)


_cases = [
    *(("cld", name, "sampling") for name in _solvers),
    *((process, "default", "sampling") for process in ("vp", "ve", "bdm")),
    *((process, "default", "encoding") for process in ("vp", "cld")),
]


@pytest.mark.x64
@pytest.mark.parametrize("process, name, way", _cases)
def test_dense_output_has_a_derivative_at_both_ends_of_a_step(process, name, way):
    made = processes[process]()
    term = gd.ProbabilityFlow(made, mixture_for(made).model(made))
    solver, ts = _solvers[name], gd.time_grid(made, 12)[3:6]
    ts = ts if way == "sampling" else ts[::-1]
    y = prior_state(made)
    step = eqx.filter_jit(lambda *args: solver.step(term, *args, jnp.asarray(False)))
    state = solver.init(term, ts[0], ts[1], y, None)
    for t0, t1 in zip(ts[:-1], ts[1:]):
        y, _, dense, state, _ = step(t0, t1, y, None, state)
    local = solver.interpolation_cls(t0=t0, t1=t1, **dense)

    near = 1e-8 * (t1 - t0)
    at = jnp.stack([t0, t0 + near, t1 - near, t1])
    slope = eqx.filter_jit(
        lambda local, t: jax.jvp(local.evaluate, (t,), (jnp.ones_like(t),))[1]
    )
    slopes = [slope(local, t) for t in at]
    for x in zip(*map(jtu.tree_leaves, slopes)):
        assert (jnp.abs(x[0]) > 0).all() and (jnp.abs(x[3]) > 0).all()
        np.testing.assert_allclose(x[0], x[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(x[3], x[2], rtol=1e-4, atol=1e-6)


@pytest.mark.x64
@pytest.mark.parametrize("process", ["vp", "cld", "bdm"])
@pytest.mark.parametrize("space", ["data", "noise"])
def test_a_step_of_no_length_grows_at_the_rate_of_the_flow(process, space):
    made = processes[process]()
    term = gd.ProbabilityFlow(made, mixture_for(made).model(made))
    solver, y = gd.GDDIM(2, space), prior_state(made)

    @jax.jit
    def end(t1):
        state = solver.init(term, jnp.array(0.5), t1, y, None)
        return solver.step(term, jnp.array(0.5), t1, y, None, state, False)[0]

    slope = jax.jacfwd(end)(jnp.array(0.5))
    for a, b in zip(jtu.tree_leaves(slope), jtu.tree_leaves(term.vf(0.5, y, None))):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
