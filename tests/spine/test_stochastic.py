"""GDDIM on the reverse diffusions."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import (
    adaptive,
    flow_of,
    last,
    max_difference,
    NoNoise,
    prior_state,
    processes,
    solve,
    thorough,
)


# What depends on precision is in test_accuracy.py.
pytestmark = pytest.mark.x64

_vp_or_cld = pytest.mark.parametrize("name", ["vp", *thorough("cld")])


@eqx.filter_jit
def _solve(terms, solver, ts, u, **kwargs):
    # For `UnsafeBrownianPath`.
    kwargs = dict(adjoint=dfx.DirectAdjoint(), max_steps=len(ts) - 1) | kwargs
    controller = dfx.StepTo(ts)
    return dfx.diffeqsolve(
        terms, solver, ts[0], ts[-1], None, u, stepsize_controller=controller, **kwargs
    )


def _end(*args, **kwargs):
    return last(_solve(*args, **kwargs).ys)


def _path(y, seed=1):
    """A path that compiles and runs faster than the default."""
    leaves = jtu.tree_map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), y)
    return dfx.UnsafeBrownianPath(leaves, jax.random.key(seed))


def _terms(name, lam, batch=()):
    return gd.reverse_sde(flow_of(name, scale=0.6), lam, jax.random.key(0), batch)


@pytest.mark.parametrize(
    "name, order, space",
    [("vp", 1, "noise"), *thorough(("cld", 4, "data"), ("bdm", 1, "data"))],
)
def test_without_noise_it_is_the_probability_flow(name, order, space):
    flow = flow_of(name, scale=0.6)
    ts, u = gd.time_grid(flow.process, 10), prior_state(flow.process, (3,))
    solver = gd.GDDIM(order, space)
    expected = solve(flow, solver, ts, u)

    def change(lam):
        return max_difference(
            _end(gd.reverse_sde(flow, lam, _path(u)), solver, ts, u), expected
        )

    assert change(0.0) == 0
    # And with little noise, by other formulas, little is changed.
    changes = [change(jnp.asarray(lam)) for lam in (0.0, 1e-6, 1e-4)]
    assert changes[0] < 1e-9 and 0 < changes[1] < 1e-4
    np.testing.assert_allclose(changes[2] / changes[1], 100, rtol=2e-2)


def _random_grid(process, number):
    steps = np.random.default_rng(3).uniform(0.05, 1, number)
    fraction = np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
    root = process.t_max**0.25 * (1 - fraction) + process.t_min**0.25 * fraction
    times = root**4
    times[0], times[-1] = process.t_max, process.t_min
    return jnp.asarray(times)


@pytest.mark.parametrize(
    "name, number, solver",
    [
        ("cld", 5, gd.GDDIM()),
        ("bdm", 5, gd.GDDIM(1, "noise")),
        *thorough(
            *((name, 1, gd.GDDIM(1)) for name in ("vp", "cld", "bdm")),
            *((name, 5, gd.GDDIM(1, "noise")) for name in ("vp", "cld")),
            *((name, 5, gd.GDDIM()) for name in ("vp", "bdm")),
            ("cld", 5, gd.GDDIM(1)),
        ),
    ],
)
def test_samples_of_one_data_point_have_its_distribution(name, number, solver):
    process = gd.BDM((2, 3, 1)) if name == "bdm" else processes[name]()
    n, size, ts = process.num_components, 20_000, _random_grid(process, number)
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    flow = gd.ProbabilityFlow(process, gd.GaussianMixture(x[None]).model(process))
    data = jnp.broadcast_to(x, (size, *process.shape))
    u, _ = jax.jit(process.perturb)(jax.random.key(0), data, ts[0])
    mean = process.transition(ts[-1], jnp.zeros_like(ts[-1])).mv(process.encode(x))
    mean = np.stack(jtu.tree_leaves(mean))
    covariance = np.asarray(process.covariance(ts[-1]).blocks)
    covariance = covariance.reshape(n, n, *[1] * (mean.ndim - 1))
    for lam in (0.3, 1.0, 2.0):
        terms = gd.reverse_sde(flow, jnp.asarray(lam), _path(u))
        error = np.stack(jtu.tree_leaves(_end(terms, solver, ts, u))) - mean[:, None]
        variance = np.stack([covariance[i, i] for i in range(n)])
        # Of the mean, and of the entries of the covariance, in standard errors.
        assert np.abs(error.mean(1) / np.sqrt(variance / size)).max() < 4
        for i in range(n):
            for j in range(i + 1):
                got = (error[i] * error[j]).mean(0) - covariance[i, j]
                square = covariance[i, i] * covariance[j, j] + covariance[i, j] ** 2
                assert np.abs(got / np.sqrt(square / size)).max() < 4


@pytest.mark.parametrize(
    "name, lam", [("cld", 0.7), *thorough(("vp", 0.7), ("bdm", 1.0), ("cld", 0.0))]
)
def test_a_step_in_noise_space_is_exact_along_its_linear_part(name, lam):
    """Along d(eps) = lam^2 / 2 K eps dt, and without noise."""
    process = processes[name]()
    ts = jnp.array([0.8, 0.72, 0.6, 0.55, 0.42])
    start = prior_state(process, (2,))

    def noise_field(t, eps, args):
        loading = process.factor(t).inverse() @ process.diffusion(t)
        return (loading @ loading.T * (0.5 * lam**2)).mv(eps)

    def whole_field(t, y, args):
        u, eps = y
        g = process.diffusion(t)
        forcing = g @ g.T @ process.factor(t).inverse().T * (0.5 * (1 + lam**2))
        drift = jtu.tree_map(lambda a, b: a + b, process.drift(t).mv(u), forcing.mv(eps))
        return drift, noise_field(t, eps, None)

    def exact(field, t0, t1, y, **kwargs):
        term, solver = dfx.ODETerm(field), dfx.Dopri8()
        return adaptive(term, solver, t0, t1, None, y, 1e-12, **kwargs).ys

    noise = exact(noise_field, ts[0], ts[-1], start, saveat=dfx.SaveAt(ts=ts))

    def model(t, u, args):
        at = jnp.argmin(jnp.abs(ts - t))
        return process.to_data(jtu.tree_map(lambda x: x[at], noise))

    flow, solver = gd.ProbabilityFlow(process, model), gd.GDDIM(1, "noise")
    terms = gd.reverse_sde(flow, jnp.asarray(lam), NoNoise(start))
    before = solve(terms, solver, ts[:-1], start)
    y = solve(terms, solver, ts, start)
    state = before, jtu.tree_map(lambda x: x[-2], noise)
    expected = last(exact(whole_field, ts[-2], ts[-1], state)[0])
    size = max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(expected))
    assert max_difference(y, expected) < 1e-8 * size


@pytest.mark.thorough
@pytest.mark.parametrize("name", ("vp", "cld"))
def test_converges_along_the_path_to_the_limit_of_euler(name):
    process, number = processes[name](), 32
    u, _ = process.perturb(
        jax.random.key(1),
        jax.random.normal(jax.random.key(5), (number, *process.shape)),
        0.7,
    )
    terms = _terms(name, 0.5, (number,))

    def run(solver, steps):
        return solve(terms, solver, jnp.linspace(0.7, 0.3, steps + 1), u)

    def distance(a, b):
        squares = jtu.tree_map(lambda a, b: ((a - b) ** 2).mean(), a, b)
        return float(jnp.sqrt(sum(jtu.tree_leaves(squares))))

    accurate = run(gd.GDDIM(2), 512)
    # Euler's own error is of the first order.
    euler = [distance(run(dfx.Euler(), n), accurate) for n in (64, 256)]
    assert euler[1] < euler[0] / 3
    errors = [distance(run(gd.GDDIM(1), n), accurate) for n in (8, 64)]
    assert 6 < errors[0] / errors[1] < 12
    assert errors[1] < 0.7 * euler[0]
    if name == "vp":
        assert distance(run(gd.GDDIM(2), 64), accurate) < 0.5 * errors[1]


@pytest.mark.thorough
@_vp_or_cld
def test_one_path_gives_one_sample_in_both_precisions(name):
    process = processes[name]()
    u = process.prior(jax.random.key(1), (4,), jnp.float32)
    for lam in (0.5, 1.0):
        samples = []
        for dtype in (jnp.float32, jnp.float64):
            ts = gd.time_grid(process, 20, dtype=dtype)
            start = jtu.tree_map(lambda x: x.astype(dtype), u)
            level = jnp.asarray(lam, dtype)
            y = solve(_terms(name, level, (4,)), gd.GDDIM(2), ts, start)
            assert all(x.dtype == dtype for x in jtu.tree_leaves(y))
            samples.append(process.decode(y).astype(jnp.float64))
        assert float(jnp.abs(samples[0] - samples[1]).max()) < 1e-4


@pytest.mark.thorough
@_vp_or_cld
def test_vmap_and_jit_give_the_sample_of_a_loop(name):
    flow = flow_of(name)
    ts, u = gd.time_grid(flow.process, 8), prior_state(flow.process, (4,))
    keys = jax.random.split(jax.random.key(2), 4)
    run = lambda u, key: solve(gd.reverse_sde(flow, 1.0, key), gd.GDDIM(2), ts, u)
    batched = jax.jit(jax.vmap(run))(u, keys)
    for i in range(4):
        one = run(jtu.tree_map(lambda x: x[i], u), keys[i])
        assert max_difference(one, jtu.tree_map(lambda x: x[i], batched)) < 1e-4


@pytest.mark.thorough
def test_gradients():
    process = gd.VP((2,))
    ts, u = gd.time_grid(process, 3), prior_state(process, (3,))
    model = gd.GaussianMixture(jnp.eye(2), 0.6).model(process)
    scaled = lambda t, u, args: args * model(t, u, None)
    flow = gd.ProbabilityFlow(process, scaled)
    terms = gd.reverse_sde(flow, 0.8, jax.random.key(0), (3,))
    adjoint = dfx.RecursiveCheckpointAdjoint()

    @jax.jit
    def loss(scale):
        return (_end(terms, gd.GDDIM(2), ts, u, args=scale, adjoint=adjoint) ** 2).sum()

    one, h = jnp.ones(()), 1e-7
    difference = (loss(one + h) - loss(one - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(one), difference, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("order", [3, 1])
def test_adaptive_steps_converge_along_the_path(order):
    terms, process = _terms("vp", 0.3), processes["vp"]()
    u, errors = prior_state(process), []
    accurate = solve(terms, gd.GDDIM(1), gd.time_grid(process, 1000, t1=0.1), u)
    for tol in (1e-2, 1e-3):
        controller = dfx.PIDController(rtol=0, atol=tol, dtmin=1e-5)
        kwargs = dict(stepsize_controller=controller)
        sol = adaptive(terms, gd.GDDIM(order), process.t_max, 0.1, -0.05, u, **kwargs)
        errors.append(max_difference(last(sol.ys), accurate))
    assert errors[1] < 0.05 and errors[1] < errors[0]


@_vp_or_cld
def test_a_resumed_solve_equals_an_unbroken_one(name):
    flow, solver = flow_of(name), gd.GDDIM(3)
    ts, u = gd.time_grid(flow.process, 10), prior_state(flow.process, (2,))
    terms = gd.reverse_sde(flow, 0.6, _path(u))
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    whole = _solve(terms, solver, ts, u, saveat=saveat)
    first = _solve(terms, solver, ts[:6], u, saveat=saveat)
    state = dict(solver_state=first.solver_state, saveat=saveat)
    rest = _end(terms, solver, ts[5:], last(first.ys), **state)
    assert max_difference(rest, last(whole.ys)) < 1e-5
    # Without its history it is another.
    fresh = _end(terms, solver, ts[5:], last(first.ys), saveat=saveat)
    assert max_difference(fresh, last(whole.ys)) > 1e-4


@pytest.mark.thorough
def test_saved_states_are_those_of_the_steps():
    flow = flow_of("vp")
    ts, u = gd.time_grid(flow.process, 6), prior_state(flow.process, (2,))
    terms = gd.reverse_sde(flow, 1.0, _path(u))
    subs = [dfx.SubSaveAt(steps=True), dfx.SubSaveAt(ts=ts[1:])]
    sol = _solve(terms, gd.GDDIM(2), ts, u, saveat=dfx.SaveAt(subs=subs, dense=True))
    steps = sol.ys[0]
    np.testing.assert_allclose(sol.ys[1], steps, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(sol.evaluate)(ts[1:]), steps, atol=1e-5)
    # Between steps there is a straight line, as for every stochastic solver of Diffrax.
    middle = sol.evaluate(0.5 * (ts[2] + ts[3]))
    np.testing.assert_allclose(middle, 0.5 * (steps[1] + steps[2]), atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name, dtype", [("vp", jnp.bfloat16), ("cld", jnp.float16)])
def test_half_precision(name, dtype):
    u = processes[name]().prior(jax.random.key(1), (3,), dtype)
    terms, solver = _terms(name, 1.0, (3,)), gd.GDDIM(2)
    s, t = jnp.asarray(0.5, jnp.float32), jnp.asarray(0.4, jnp.float32)
    state = solver.init(terms, s, t, u, None)
    step = eqx.filter_jit(solver.step)
    y, error, _, state, _ = step(terms, s, t, u, None, state, False)
    y, error, _, state, _ = step(terms, t, t - 0.1, y, None, state, False)
    for leaf in jtu.tree_leaves((y, error, state.last.base)):
        assert leaf.dtype == dtype and jnp.isfinite(leaf).all()


def test_close_times():
    process = gd.VP((1,))
    data = gd.GaussianMixture(jnp.array([[1.3]]), 0.4)
    flow = gd.ProbabilityFlow(process, data.model(process))
    ts, u = np.asarray(gd.time_grid(process, 20)), prior_state(process, (3,))
    terms = gd.reverse_sde(flow, 1.0, jax.random.key(3), (3,))
    samples = solve(terms, gd.GDDIM(), ts, u)
    for i in (5, 10, 15):
        extra = ts[i] + 1e-3 * (ts[i + 1] - ts[i])
        # The same path, so only the discretisation differs.
        again = solve(terms, gd.GDDIM(), np.insert(ts, i + 1, extra), u)
        assert jnp.abs(again - samples).max() < 0.1
