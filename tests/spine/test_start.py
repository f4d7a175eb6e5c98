"""Starts in closed form at high noise levels."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.solvers import Clock

from ..helpers import accurate, every_process, max_difference, processes, solve


def normal_for(process, seed=0):
    """Correlated normal data; under a spectrum, independent in its basis."""
    rng = np.random.default_rng(seed)
    shape = process.shape
    mean = jnp.asarray(rng.normal(size=shape))
    if len(shape) == 3:
        return gd.NormalData(mean, rng.uniform(0.1, 2, shape), basis=process.basis)
    factor = rng.normal(size=(shape[0], shape[0]))
    return gd.NormalData(mean, factor @ factor.T)


def flow_of(process, data):
    return gd.ProbabilityFlow(process, data.model(process, "data"), "data")


def _never(t, u, args):
    """A model that must not be evaluated at high noise levels."""
    return jtu.tree_map(lambda x: jnp.where(t > 0.45, jnp.nan, 0 * x), u)


@every_process
def test_free_steps_converge_to_the_flow_of_normal_data(name):
    process = processes[name]()
    data, t = normal_for(process), 0.5 * (process.t_max + process.t_min)
    exact = flow_of(process, data)
    u = process.prior(jr.key(0), (4,))
    expected = accurate(exact, process.t_max, t, u)
    errors = []
    for number in (40, 80):
        start = gd.GaussianStart(data, t, num_free=number)
        flow, ts = start.flow(exact, 3), start.time_grid(process, 3)[: number + 1]
        assert float(ts[-1]) == pytest.approx(t)
        errors.append(max_difference(solve(flow, gd.GDDIM(), ts, u), expected))
    size = max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(expected))
    assert errors[1] < 2e-4 * size
    assert errors[1] < errors[0] / 4


@pytest.mark.precision
def test_free_steps_follow_the_closed_form():
    """Under VP, normal data keep their distance from the mean in standard deviations."""
    process, t = gd.VP((3,)), 0.4
    mean, variances = np.array([0.5, -1.0, 0.2]), np.array([0.1, 1.0, 3.0])
    data = gd.NormalData(mean, variances)
    u = process.prior(jr.key(0), (5,))
    start = gd.GaussianStart(data, t, num_free=100)
    ts = start.time_grid(process, 2)[:101]
    found = solve(start.flow(flow_of(process, data), 2), gd.GDDIM(), ts, u)

    def moments(t):
        signal = float(process.transition(t, 0.0).blocks[0, 0])
        noise = float(process.covariance(t).blocks[0, 0])
        return signal * mean, np.sqrt(noise + signal**2 * variances)

    (before, wide), (after, narrow) = moments(process.t_max), moments(t)
    expected = after + (np.asarray(u, np.float64) - before) / wide * narrow
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "cld", "rectified"])
@pytest.mark.parametrize("number", [2, 5])
def test_error_is_at_most_half_on_normal_data(name, number):
    process = processes[name]()
    data = normal_for(process)
    exact, u = flow_of(process, data), process.prior(jr.key(1), (32,))
    expected = process.decode(accurate(exact, process.t_max, process.t_min, u))
    start = gd.GaussianStart(data)
    few = (exact, gd.time_grid(process, number))
    started = start.flow(exact, number), start.time_grid(process, number)
    error = [
        max_difference(process.decode(solve(flow, gd.GDDIM(), ts, u)), expected)
        for flow, ts in (few, started)
    ]
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("name", ["vp", "cld", "bdm", "edm"])
def test_every_step_is_exact_for_two_points(name):
    """If the data are one point for the closed form and another for the model, without a
    slope the state moves towards one and then towards the other."""
    process = processes[name]()
    points = [gd.NormalData(np.full(process.shape, x), 0.0) for x in (0.3, -0.7)]
    t = 0.5 * (process.t_max + process.t_min)
    start = gd.GaussianStart(points[0], t, slope=0.0)
    flow, ts = start.flow(flow_of(process, points[1]), 4), start.time_grid(process, 4)
    u = process.prior(jr.key(2), (3,))
    found = solve(flow, gd.GDDIM(), ts, u)
    for point, ends in zip(points, ((ts[0], ts[6]), (ts[6], ts[-1]))):
        u = solve(flow_of(process, point), gd.GDDIM(1), jnp.stack(ends), u)
    assert max_difference(found, u) < 1e-9


def test_slope_is_that_of_the_first_step():
    """A difference that grows linearly in the coordinate of the first step is integrated
    exactly."""
    process, t = gd.VP((2,)), 0.45
    ts = gd.GaussianStart(gd.NormalData(jnp.zeros(2), 0.0), t).time_grid(process, 2)

    def place(t):
        return Clock()(process, t, process.log_snr(t))

    start, end = place(ts[6]), place(ts[7])

    def model(t, u, args):
        return jnp.full_like(u, 1 + 0.8 * Clock().rescale(place(t), start, end))

    exact = gd.ProbabilityFlow(process, model, "data")
    u = process.prior(jr.key(3), (2,))
    for slope, close in ((0.8, True), (0.0, False), (2.0, False)):
        start_ = gd.GaussianStart(gd.NormalData(jnp.zeros(2), 0.0), t, slope=slope)
        flow = start_.flow(exact, 2)
        before = solve(flow, gd.GDDIM(), ts[:7], u)
        after = solve(flow, gd.GDDIM(), ts[:8], u)
        expected = accurate(exact, ts[6], ts[7], before)
        assert (max_difference(after, expected) < 1e-6) == close


@pytest.mark.parametrize(
    "solver, lam, evaluations",
    [
        (gd.GDDIM(), 0.0, 5),
        (gd.GDDIM(), 0.5, 5),
        (gd.GDDIM(2, "noise"), 0.0, 5),
        (gd.GDDIM(1, "noise"), 0.5, 5),
        (gd.GDDIM(reevaluate=True), 0.0, 11),
        (dfx.Euler(), 0.5, 5),
        (dfx.Heun(), 0.0, 11),
    ],
    ids=str,
)
def test_model_is_evaluated_only_after_the_start(solver, lam, evaluations):
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, _never, "data")
    start = gd.GaussianStart(gd.NormalData(jnp.zeros(2), 1.0), 0.4)
    options: dict[str, Any] = dict(lam=lam, start=start)
    x, found = gd.sample(flow, jr.key(0), 6, 5, solver, **options)
    assert np.isfinite(x).all()
    assert found == evaluations
    again = gd.sample(flow, jr.key(0), 6, 5, solver, batch_size=4, **options)
    np.testing.assert_allclose(x, again.x, atol=1e-5)
    ts = start.time_grid(process, 5)
    again = gd.sample(flow, jr.key(0), 6, ts=ts, solver=solver, **options)
    np.testing.assert_array_equal(x, again.x)


def test_stochastic_start_has_the_law_of_the_data():
    """A point has the exact law under `lam=1` in any number of steps."""
    process = gd.VP((2,))
    point = gd.NormalData(jnp.array([0.3, -0.4]), 0.0)
    flow = flow_of(process, point)
    start = gd.GaussianStart(gd.NormalData(point.mean, 1e-12), 0.5, slope=0.0)
    x, _ = gd.sample(flow, jr.key(0), 4000, 3, lam=1.0, start=start)
    std = float(process.factor(process.t_min).blocks[0, 0])
    np.testing.assert_allclose(x.mean(0), point.mean, atol=5 * std / 60)
    np.testing.assert_allclose(x.std(0), std, rtol=0.06)


def test_default_time_is_earlier_for_more_evaluations():
    process = gd.CLD((30,))
    start = gd.GaussianStart(normal_for(process))
    times = [start.time(process, n) for n in (2, 3, 5, 10, 30)]
    assert times == sorted(times)
    assert process.t_min < times[0] < times[-1] < process.t_max


@pytest.mark.precision
@pytest.mark.parametrize("variance, size", [(1.0, 4), (0.04, 100)])
def test_default_time_is_that_of_some_information(variance, size):
    """Under VP, of independent data of equal variance."""
    process = gd.VP((size,))
    t = gd.GaussianStart(gd.NormalData(jnp.zeros(size), variance)).time(process, 4)
    snr = float(process.transition(t, 0.0).blocks[0, 0] / process.factor(t).blocks[0, 0])
    information = 0.5 * size * np.log1p(variance * snr**2)
    assert information == pytest.approx(7 * np.exp(-4 / 2.4), rel=0.02)


def test_sample_starts_by_itself_where_it_knows_the_data():
    process = gd.VP((3,))
    network = lambda t, x: jnp.where(t > 0.99, jnp.nan, 0.1 * jnp.cos(3 * x))
    model = gd.nn.NetworkModel(process, network, data_std=0.8)
    flow = gd.ProbabilityFlow(process, model, "data")
    x, evaluations = gd.sample(flow, jr.key(0), 8, 4)
    assert evaluations == 4
    data = gd.NormalData(jnp.zeros(3), 0.8**2)
    # As early as for two more evaluations, as only the standard deviation is known.
    start = gd.GaussianStart(data, gd.GaussianStart(data).time(process, 6))
    np.testing.assert_array_equal(x, gd.sample(flow, jr.key(0), 8, 4, start=start).x)
    cld = gd.CLD((3,))
    model = gd.nn.NetworkModel(cld, lambda t, x: 0.1 * jnp.cos(x[..., :3]), data_std=0.8)
    rows = [
        gd.sample(gd.ProbabilityFlow(cld, model, "data"), jr.key(0), 8, 4, **options).x
        for options in ({}, dict(start=gd.GaussianStart(data, None, "sharpest")))
    ]
    np.testing.assert_array_equal(*rows)
    # A flow that has a start keeps it.
    x, evaluations = gd.sample(start.flow(flow, 4), jr.key(0), 8, 4)
    assert np.isfinite(x).all() and evaluations < 4
    others: list[dict[str, Any]] = [
        dict(num_steps=4, start=None),
        dict(num_steps=4, lam=1.0),
        dict(num_steps=4, solver=gd.GDDIM(space="noise")),
        dict(ts=gd.time_grid(process, 4)),
    ]
    for options in others:
        with pytest.raises(FloatingPointError, match="not finite"):
            gd.sample(flow, jr.key(0), 8, **options)


def test_started_flow_has_a_likelihood_and_derivatives():
    process = gd.VP((2,))
    data = normal_for(process)
    started = gd.GaussianStart(data, 0.4).flow(flow_of(process, data), 3)
    x = data.sample(jr.key(0), 3)
    found = gd.log_likelihood(started, x).value
    expected = gd.log_likelihood(flow_of(process, data), x).value
    np.testing.assert_allclose(found, expected, atol=1e-3)
    ts = gd.GaussianStart(data, 0.4).time_grid(process, 3)
    u = process.prior(jr.key(1), (2,))
    total = lambda u: gd.generate(started, u, solver=gd.GDDIM(), ts=ts).sum()
    step = 1e-4
    ahead, behind = total(u + step), total(u - step)
    slope = jax.grad(total)(u).sum()
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-2)


@pytest.mark.precision
def test_start_in_half_precision_and_for_a_mixture():
    process = gd.VP((2,))
    mixture = gd.GaussianMixture([[1.0, 0.0], [-1.0, 0.0]], 0.3)
    flow = gd.ProbabilityFlow(process, mixture.model(process, "data"), "data")
    start = gd.GaussianStart(mixture, 0.3)
    exact = gd.sample(flow, jr.key(0), 64, 30, start=None).x
    x = gd.sample(flow, jr.key(0), 64, 4, start=start).x
    assert np.median(np.abs(x - exact)) < 0.02
    half = gd.sample(flow, jr.key(0), 64, 4, start=start, dtype=jnp.bfloat16).x
    assert half.dtype == jnp.bfloat16


_data = gd.NormalData(jnp.zeros(2), 1.0)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: gd.GaussianStart(_data, t=float("nan")), "`t` must be finite"),
        (lambda p: gd.GaussianStart(_data, num_free=0), "`num_free`"),
        (lambda p: gd.GaussianStart(_data, power=0.0), "`power` must be positive"),
        (lambda p: gd.GaussianStart(_data, slope=float("inf")), "`slope` must be fin"),
        (lambda p: gd.GaussianStart(gd.GaussianMixture([[0.0, 1.0]])), "Pass `t`"),
        (lambda p: gd.GaussianStart(_data, 1.0).time_grid(p, 3), "between 0.001 and 1"),
        (lambda p: gd.GaussianStart(_data).time_grid(p, 0), "`num_steps` must be a pos"),
        (
            lambda p: gd.GaussianStart(gd.NormalData(jnp.zeros(3), 1.0)).flow(
                flow_of(p, _data), 3
            ),
            r"data have shape \(3,\)",
        ),
        (
            lambda p: gd.GaussianStart(_data).flow(
                gd.GaussianStart(_data).flow(flow_of(p, _data), 3), 3
            ),
            "has a start already",
        ),
        (
            lambda p: gd.sample(
                flow_of(p, _data),
                jr.key(0),
                2,
                ts=gd.time_grid(p, 3),
                start=gd.GaussianStart(_data),
            ),
            "pass the time `t`",
        ),
        (
            lambda p: gd.fit_solver(
                gd.GaussianStart(_data).flow(flow_of(p, _data), 3),
                p.prior(jr.key(0), (8,)),
                3,
            ),
            "Pass the flow without it",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make(gd.VP((2,)))


def test_default_time_is_not_traced():
    process = gd.VP((2,))

    @eqx.filter_jit
    def grid(data):
        return gd.GaussianStart(data).time_grid(process, 3)

    with pytest.raises(ValueError, match="cannot be traced"):
        grid(_data)
