"""`GDDIM(process=...)` on a vector field, as other libraries hand it to a solver."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import gddim_eqx as gd

from ..helpers import diffrax_solve, forward, max_difference, mixture_for, slow


pytestmark = pytest.mark.precision

_processes = {
    "vp": gd.VP((3,)),
    "rectified": gd.RectifiedFlow((3,)),
    "shifted": gd.RectifiedFlow((3,), 3.0),
    "edm": gd.EDM((3,)),
    "bdm": gd.BDM((4, 6, 2)),
}


def _flow(process):
    return gd.ProbabilityFlow(process, mixture_for(process).model(process, "data"), "data")


@pytest.mark.parametrize(
    "name, space",
    [
        *((name, "data") for name in _processes),
        *(("shifted", "noise"), ("edm", "noise")),
        *slow(("vp", "noise"), ("rectified", "noise"), ("bdm", "noise")),
    ],
)
def test_it_is_the_probability_flow(name, space):
    process = _processes[name]
    flow = _flow(process)
    # In noise space not from where there is no signal.
    ts = gd.time_grid(process, 8, t0=0.98 * process.t_max)
    y0 = process.prior(jax.random.key(0), (5,))

    ode = dfx.ODETerm(lambda t, y, args: flow.vf(t, y, args))
    found = diffrax_solve(ode, gd.GDDIM(3, space, process=process), ts, y0)
    wanted = diffrax_solve(flow, gd.GDDIM(3, space), ts, y0)
    tolerance = 1e-10 if jax.config.jax_enable_x64 else 1e-4
    scale = float(jnp.abs(wanted).max())
    assert max_difference(found, wanted) < tolerance * scale


def test_from_zero_signal_and_forward_and_adaptively():
    process = gd.RectifiedFlow((2,))
    velocity = dfx.ODETerm(lambda t, y, args: (y - args[None]) / t)
    point = jnp.array([0.3, -2.0])
    solver = gd.GDDIM(process=process)
    y0 = process.prior(jax.random.key(0), (4,))
    for kwargs in (
        dict(dt0=-0.999),
        dict(dt0=-0.3, stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-5)),
    ):
        y1 = dfx.diffeqsolve(velocity, solver, 1.0, 1e-3, y0=y0, args=point, **kwargs).ys[0]
        # In single precision, rounding errors of 57 adaptive steps are 1e-5.
        single = y1.dtype == jnp.float32 and kwargs["dt0"] == -0.3
        tolerance = 2e-5 if single else 2e-6
        assert max_difference(y1, 0.999 * point[None] + 1e-3 * y0) < tolerance
        back = dfx.diffeqsolve(
            velocity,
            solver,
            1e-3,
            1.0,
            0.333,
            y1,
            args=point,
            adjoint=forward,
        ).ys[0]
        # Encoding multiplies them by 1,000.
        assert max_difference(back, y0) < 1e3 * tolerance


def test_a_process_is_part_of_the_solver():
    vp, edm = gd.VP((2,)), gd.EDM((2,))
    solver = gd.GDDIM(2, process=vp)
    assert "process=VP(" in repr(solver)
    assert solver == gd.GDDIM(2, process=vp)
    assert solver != gd.GDDIM(2) and solver != gd.GDDIM(2, process=edm)
    flow = _flow(vp)
    solver.init(flow, 1.0, 0.5, jnp.ones(2), None)
    with pytest.raises(ValueError, match="EDM.*is not that of the terms, VP"):
        gd.GDDIM(process=edm).init(flow, 1.0, 0.5, jnp.ones(2), None)


def test_where_the_vector_field_does_not_determine_the_prediction(without_type_checks):
    with pytest.raises(ValueError, match="for CLD, as its diffusion is singular"):
        gd.GDDIM(process=gd.CLD((2,)))
    with pytest.raises(ValueError, match="must be a forward process"):
        gd.GDDIM(process="vp")
