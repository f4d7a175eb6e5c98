import gc
import math
import weakref

import diffrax as dfx
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given

import gddim_eqx as gd

from ..helpers import (
    every_process,
    processes,
)


X64 = jnp.result_type(float) == np.float64
EXACT = 1e-12 if X64 else 1e-5

grids = ["clock", "uniform", "quadratic", "log", 0.5, 1.0, 5.0]
every_grid = pytest.mark.parametrize("grid", grids)
dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.x64)]
)


@every_process
@every_grid
@dtypes
def test_grid_goes_from_the_start_to_the_end_of_sampling(name, grid, dtype):
    process = processes[name]()
    ts = gd.time_grid(process, 7, grid, dtype=dtype)
    assert ts.shape == (8,) and ts.dtype == dtype
    assert (ts[0], ts[-1]) == (dtype(process.t_max), dtype(process.t_min))
    assert (jnp.diff(ts) < 0).all()


@every_process
@every_grid
def test_grid_for_encoding_is_the_same_in_reverse(name, grid):
    process = processes[name]()
    sampling = gd.time_grid(process, 7, grid)
    encoding = gd.time_grid(process, 7, grid, t0=process.t_min, t1=process.t_max)
    assert (jnp.diff(encoding) > 0).all()
    np.testing.assert_allclose(encoding, sampling[::-1], rtol=EXACT)


@given(
    number=st.integers(1, 200),
    power=st.floats(0.5, 8),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(
        lambda ends: abs(ends[0] - ends[1]) > 0.01
    ),
)
def test_any_grid_is_monotone_with_exact_ends(number, power, ends):
    t0, t1 = ends
    ts = gd.time_grid(gd.VP((3,)), number, power, t0=t0, t1=t1)
    dtype = ts.dtype.type
    assert ts.shape == (number + 1,)
    assert (ts[0], ts[-1]) == (dtype(t0), dtype(t1))
    assert (np.sign(np.diff(ts)) == np.sign(t1 - t0)).all()


@every_grid
def test_spacing_is_uniform_after_the_change_of_variable(grid):
    process = gd.VP((3,))
    ts = np.asarray(gd.time_grid(process, 20, grid), float)
    if grid == "clock":
        half = 9.95 * ts**2 + 0.1 * ts
        log_snr = -0.5 * half - 0.5 * np.log(-np.expm1(-half))
        clock = sum((c - c[0]) / (c[-1] - c[0]) for c in (log_snr, np.sqrt(ts)))
        steps = np.diff(clock)
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-4)
        return
    if grid == "log":
        clock = np.log(ts)
    else:
        power = {"uniform": 1.0, "quadratic": 2.0}.get(grid) or grid
        clock = ts ** (1 / power)
    steps = np.diff(clock)
    np.testing.assert_allclose(steps, steps.mean(), rtol=100 * EXACT)


def test_quadratic_is_the_authors_grid():
    process = gd.CLD((3,))
    by_hand = np.linspace(1, 1e-3**0.5, 21) ** 2
    np.testing.assert_allclose(gd.time_grid(process, 20, "quadratic"), by_hand, rtol=EXACT)


def test_a_grid_can_be_made_while_jax_is_tracing():
    process = gd.CLD((3,))
    inside = jax.jit(lambda x: x * gd.time_grid(process, 5))(1.0)
    np.testing.assert_allclose(inside, gd.time_grid(process, 5), rtol=EXACT)


def test_one_step_is_allowed():
    ts = gd.time_grid(gd.VP((3,)), 1)
    np.testing.assert_array_equal(ts, jnp.array([1.0, 1e-3]))


def test_grid_may_reach_time_zero():
    ts = gd.time_grid(gd.VP((3,)), 5, t1=0.0)
    assert ts[-1] == 0 and (jnp.diff(ts) < 0).all()


@jax.jit
def times_stepped_to(ts):
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: jnp.ones_like(y)),
        dfx.Euler(),
        ts[0],
        ts[-1],
        None,
        jnp.zeros((), ts.dtype),
        saveat=dfx.SaveAt(steps=True),
        stepsize_controller=dfx.StepTo(ts),
        max_steps=6,
    ).ts


@every_grid
@dtypes
@pytest.mark.parametrize("encode", [False, True], ids=["sampling", "encoding"])
def test_diffrax_steps_to_exactly_these_times(grid, dtype, encode):
    process = gd.VE((3,))
    ends = dict(t0=process.t_min, t1=process.t_max) if encode else {}
    ts = gd.time_grid(process, 6, grid, dtype=dtype, **ends)
    np.testing.assert_array_equal(times_stepped_to(ts), ts[1:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_steps=0), "num_steps.*0"),
        (dict(num_steps=-3), "num_steps.*-3"),
        (dict(num_steps=True), "num_steps.*True"),
        (dict(num_steps=5, grid="cubic"), "'cubic'"),
        (dict(num_steps=5, grid=0.0), "got 0.0"),
        (dict(num_steps=5, grid=-2.0), "got -2.0"),
        (dict(num_steps=5, grid=math.nan), "got nan"),
        (dict(num_steps=5, grid=math.inf), "got inf"),
        (dict(num_steps=5, t0=1.5), "t0.*1.5"),
        (dict(num_steps=5, t1=-0.5), "t1.*-0.5"),
        (dict(num_steps=5, t0=math.nan), "t0.*nan"),
        (dict(num_steps=5, t0=0.5, t1=0.5), "both are 0.5"),
        (dict(num_steps=5, grid="log", t1=0.0), "cannot reach time 0"),
        (dict(num_steps=5, dtype=jnp.int32), "int32"),
        (dict(num_steps=5000, dtype=jnp.float16), "5000 steps.*float16"),
        (dict(num_steps=1000, dtype=jnp.bfloat16), "1000 steps.*bfloat16"),
        (dict(num_steps=5, t0=0.5, t1=0.5 + 1e-9, dtype=jnp.float32), "float32"),
    ],
    ids=repr,
)
def test_bad_arguments_raise_and_are_named(arguments, message, monkeypatch):
    # Without the run-time type checks that only this test-suite has.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        gd.time_grid(gd.VP((3,)), **arguments)


def test_the_time_axis_in_the_message_is_the_process_own():
    with pytest.raises(ValueError, match=r"\[0, 0.9946\], the time axis of VP"):
        gd.time_grid(gd.VP((3,), "cosine"), 5, t0=1.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_holds_a_few_times(dtype):
    ts = gd.time_grid(gd.VP((3,)), 10, dtype=dtype)
    assert ts.dtype == dtype
    assert (ts[0], ts[-1]) == (dtype(1.0), dtype(1e-3))
    assert (np.diff(np.asarray(ts, float)) < 0).all()


# Half of all end times round up in single precision.
_ends_that_round_up = {
    "vp": lambda: gd.VP((2,), gd.LinearSchedule(t_end=0.6)),
    "ve": lambda: gd.VE((2,), t_end=0.6),
    "cld": lambda: gd.CLD((2,), beta=0.1, t_end=70.3),
    "edm": lambda: gd.LinearSDE(
        (2,), jnp.zeros_like, lambda t: jnp.sqrt(2 * t), t_end=80.3, t_min=2e-3
    ),
}


@pytest.mark.precision
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, jnp.float32) for name in _ends_that_round_up),
        *(("vp", dtype) for dtype in (jnp.bfloat16, jnp.float16)),
    ],
)
def test_times_that_rounding_takes_past_the_end_are_the_librarys_own(name, dtype):
    process = _ends_that_round_up[name]()
    assert float(jnp.asarray(process.t_end, jnp.float32)) > process.t_end
    model = gd.GaussianMixture([[0.5, 0.0]], 0.3).model(process)
    flow = gd.ProbabilityFlow(process, model)
    ts = gd.time_grid(process, 3, dtype=dtype)
    back = gd.time_grid(process, 3, t0=float(ts[-1]), t1=float(ts[0]), dtype=dtype)
    assert back[-1] == ts[0]
    # States in single precision, times perhaps in double.
    u = process.prior(jax.random.key(0), (3,), jnp.float32)
    solver = gd.GDDIM(1)
    assert jnp.isfinite(gd.generate(flow, u, 3, solver)).all()
    if name == "vp":
        pilots = process.prior(jax.random.key(0), (8,), jnp.float32)
        options = dict(learn="times", ts=ts, num_iterations=2, progress=False)
        assert jnp.isfinite(gd.fit_solver(flow, pilots, 3, solver, **options).error)
        sampled = gd.sample(flow, jax.random.key(0), 2, solver=solver, ts=ts).x
        assert sampled.dtype == dtype and jnp.isfinite(sampled).all()
        t1 = float(jnp.asarray(process.t_end, jnp.float32))
        assert jnp.isfinite(gd.log_density(flow, u, t0=0.5, t1=t1).value).all()


def test_times_that_are_really_past_the_end_are_refused():
    process = gd.VP((2,), gd.LinearSchedule(t_end=0.6))
    with pytest.raises(ValueError, match="`t0` must be in"):
        gd.time_grid(process, 5, t0=0.60001)
    with pytest.raises(ValueError, match="`ts` must be in"):
        model = gd.GaussianMixture([[0.5, 0.0]], 0.3).model(process)
        gd.generate(gd.ProbabilityFlow(process, model), jnp.ones(2), ts=[0.61, 0.1])


@pytest.mark.x64
def test_a_grid_does_not_depend_on_what_was_computed_before():
    """In single precision."""
    alone = gd.time_grid(gd.VP((2,), gd.LinearSchedule(beta_max=19.0)), 10)
    with jax.enable_x64(False):
        gd.time_grid(gd.VP((2,), gd.LinearSchedule(beta_max=18.0)), 10)
    after = gd.time_grid(gd.VP((2,), gd.LinearSchedule(beta_max=18.0)), 10)
    # From the definition: the mean of two clocks.
    for ts, slope in ((alone, 18.9), (after, 17.9)):
        t = np.asarray(ts)
        integral = 0.1 * t + 0.5 * slope * t**2
        log_snr = -0.5 * np.log(np.expm1(integral))
        clocks = [(x - x[0]) / (x[-1] - x[0]) for x in (log_snr, np.sqrt(t))]
        np.testing.assert_allclose(sum(clocks) / 2, np.linspace(0, 1, 11), atol=2e-7)


def test_grids_do_not_keep_processes_alive():
    process = gd.VP((2,), gd.LinearSchedule(beta_max=17.0))
    gd.time_grid(process, 10)
    reference = weakref.ref(process)
    del process
    gc.collect()
    assert reference() is None


def test_a_signal_that_underflows_is_no_reason_to_refuse_a_grid():
    process = gd.LinearSDE(
        (2,), lambda t: -5.0 + 0 * t, lambda t: 10.0**0.5 + 0 * t, t_end=40.0
    )
    for t, expected in ((0.1, -0.5 * math.log(math.expm1(1.0))), (7.0, -35.0)):
        np.testing.assert_allclose(process.log_snr(t), expected, rtol=1e-5)
    slope = jax.grad(process.log_snr)(jnp.asarray(7.0))
    np.testing.assert_allclose(slope, -5.0, rtol=1e-4)
    ts = gd.time_grid(process, 20)
    assert (jnp.diff(ts) < 0).all() and ts[0] == 40 and jnp.isfinite(ts).all()


def _cosine_betas(number):
    squares = np.cos((np.linspace(0, 1, number + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - squares[1:] / squares[:-1], 0.999)


# Their signal-to-noise ratio falls many-fold within a thousandth of the time axis.
_fast_ends = {
    "discrete": lambda: gd.VP.from_betas((2,), _cosine_betas(1000)),
    "path": lambda: gd.GaussianPath((2,), lambda t: 1.0001 - t, lambda t: t),
    "steep": lambda: gd.GaussianPath(
        (2,), lambda t: jnp.exp(-9 * t**200), lambda t: 1.0 * t
    ),
    "linear": lambda: gd.LinearSDE(
        (2,), lambda t: -5 * t - 30 / (1.003 - t), lambda t: (10 * t) ** 0.5
    ),
}


@pytest.mark.precision
@pytest.mark.parametrize("name", _fast_ends)
def test_spacing_is_uniform_where_the_signal_falls_fast(name):
    process = _fast_ends[name]()
    grids = {grid: gd.time_grid(process, 20, grid) for grid in ("karras", "log_snr")}
    grids["clock"] = gd.time_grid(process, 20)
    with jax.enable_x64(True):
        at = jax.jit(jax.vmap(lambda t: process.log_snr(t)))
        log_snr = {
            k: np.asarray(at(jnp.asarray(np.float64(ts)))) for k, ts in grids.items()
        }
    root = np.log1p(np.exp(-2 * np.minimum(log_snr["clock"], 40))) ** 0.25
    if name == "linear":
        root = np.sqrt(np.float64(grids["clock"]))
    rescaled = lambda x: (x - x[0]) / (x[-1] - x[0])
    clocks = {
        "karras": rescaled(np.exp(-log_snr["karras"] / 7)),
        "log_snr": rescaled(log_snr["log_snr"]),
        "clock": 0.5 * (rescaled(log_snr["clock"]) + rescaled(root)),
    }
    for clock in clocks.values():
        # In single precision, times close to 1 are rounded.
        tolerance = 2e-5 if X64 else 2e-3
        np.testing.assert_allclose(clock, np.linspace(0, 1, 21), atol=tolerance)


@pytest.mark.parametrize("ends", [(80.0, 1e-4), (1e-3, 1e-5), (2e-5, 0.3)])
def test_grids_of_noise_levels_may_go_below_t_min(ends):
    process = gd.EDM((2,))
    grid = lambda name: gd.time_grid(process, 7, name, t0=ends[0], t1=ends[1])
    first, last = ends
    expected = np.linspace(first ** (1 / 7), last ** (1 / 7), 8) ** 7
    np.testing.assert_allclose(grid("karras"), expected, rtol=EXACT)
    # Its table is interpolated.
    np.testing.assert_allclose(grid("log_snr"), np.geomspace(first, last, 8), rtol=1e-4)


def test_a_signal_may_vanish_with_its_derivative():
    process = gd.GaussianPath((2,), lambda t: (1 - t) ** 2, lambda t: t)
    assert process.t_zero_signal == 1
    assert (jnp.diff(gd.time_grid(process, 10)) < 0).all()


def test_a_process_that_holds_arrays_is_refused():
    class Own(gd.VP):
        extra: jax.Array = eqx.field(default_factory=lambda: jnp.ones(2))

    with pytest.raises(ValueError, match="Own holds arrays"):
        gd.time_grid(Own((2,)), 5)
