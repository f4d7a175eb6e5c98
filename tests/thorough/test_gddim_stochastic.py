"""GDDIM on the reverse diffusions."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import forward, max_difference, mixture_for, NoNoise, processes, slow, solve


_solve_once = eqx.filter_jit(
    lambda *args: solve(*args, adjoint=dfx.DirectAdjoint())  # for `UnsafeBrownianPath`
)


def _terms(process, lam, batch=(), seed=0, **kwargs):
    model = mixture_for(process, scale=0.6).model(process)
    key = jax.random.key(seed)
    return gd.reverse_sde(gd.ProbabilityFlow(process, model), lam, key, batch, **kwargs)


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, order, space",
    [
        ("vp", 1, "noise"),
        ("cld", 4, "data"),
        *slow(("cld", 1, "noise"), ("bdm", 1, "data")),
    ],
)
def test_without_noise_it_is_the_probability_flow(name, order, space):
    process = processes[name]()
    model = mixture_for(process, scale=0.6).model(process)
    u, ts = process.prior(jax.random.key(1), (3,)), gd.time_grid(process, 10)
    solver = gd.GDDIM(order, space)
    flow = solve(gd.ProbabilityFlow(process, model), solver, ts, u)

    def change(lam):
        terms = gd.reverse_sde(gd.ProbabilityFlow(process, model), lam, _unsafe_path(u))
        return max_difference(_solve_once(terms, solver, ts, u), flow)

    assert change(0.0) == 0
    # And with little noise, by other formulas, little is changed.
    changes = [change(jnp.asarray(lam)) for lam in (0.0, 1e-6, 1e-4)]
    assert changes[0] < (1e-9 if jax.config.jax_enable_x64 else 1e-3)
    if jax.config.jax_enable_x64:
        assert 0 < changes[1] < 1e-4
        np.testing.assert_allclose(changes[2] / changes[1], 100, rtol=2e-2)


def _unsafe_path(y, seed=1):
    """A path that compiles and runs faster than the default."""
    leaves = jtu.tree_map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), y)
    return dfx.UnsafeBrownianPath(leaves, jax.random.key(seed))


def _state(process, seed):
    return process.prior(jax.random.key(seed), (2,))


def _grid(process, kind):
    if kind == "one step":
        return gd.time_grid(process, 1)
    steps = np.random.default_rng(3).uniform(0.05, 1, 5)
    fraction = np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
    root = process.t_max**0.25 * (1 - fraction) + process.t_min**0.25 * fraction
    times = root**4
    times[0], times[-1] = process.t_max, process.t_min
    return jnp.asarray(times, jnp.result_type(float))


# In single precision rounding errors, of data that are hardly there at first, exceed the
# standard errors.
@pytest.mark.x64
@pytest.mark.parametrize(
    "name, kind, solver",
    [
        ("vp", "one step", gd.GDDIM(1)),
        ("cld", "one step", gd.GDDIM(1)),
        ("cld", "random", gd.GDDIM(1, "noise")),
        ("bdm", "random", gd.GDDIM(1, "noise")),
        ("cld", "random", gd.GDDIM()),
        ("bdm", "random", gd.GDDIM()),
        *slow(
            ("vp", "random", gd.GDDIM(1, "noise")),
            ("vp", "random", gd.GDDIM()),
            ("bdm", "one step", gd.GDDIM(1)),
            ("cld", "random", gd.GDDIM(1)),
        ),
    ],
)
def test_samples_of_one_data_point_have_its_distribution(name, kind, solver):
    number = 20_000
    process = gd.BDM((2, 3, 1)) if name == "bdm" else processes[name]()
    n = process.num_components
    x = jnp.asarray(np.random.default_rng(0).normal(size=process.shape))
    model = gd.GaussianMixture(x[None]).model(process)
    ts = _grid(process, kind)
    u, _ = process.perturb(
        jax.random.key(0), jnp.broadcast_to(x, (number, *process.shape)), ts[0]
    )
    mean = process.transition(ts[-1], jnp.zeros_like(ts[-1])).mv(process.encode(x))
    mean = np.stack(jtu.tree_leaves(mean))
    covariance = process.covariance(ts[-1]).blocks
    covariance = np.asarray(covariance).reshape(n, n, *[1] * (mean.ndim - 1))
    for lam in (0.3, 1.0, 2.0):
        terms = gd.reverse_sde(
            gd.ProbabilityFlow(process, model), jnp.asarray(lam), _unsafe_path(u)
        )
        y = _solve_once(terms, solver, ts, u)
        error = np.stack(jtu.tree_leaves(y)) - mean[:, None]
        variance = np.stack([covariance[i, i] for i in range(n)])
        # Of the mean, and of the entries of the covariance, in standard errors.
        assert np.abs(error.mean(1) / np.sqrt(variance / number)).max() < 4
        for i in range(n):
            for j in range(i + 1):
                got = (error[i] * error[j]).mean(0) - covariance[i, j]
                square = covariance[i, i] * covariance[j, j] + covariance[i, j] ** 2
                assert np.abs(got / np.sqrt(square / number)).max() < 4


@pytest.mark.x64
@pytest.mark.parametrize(
    "name, lam", [("vp", 0.7), ("cld", 0.7), ("bdm", 1.0), *slow(("cld", 0.0))]
)
def test_a_step_in_noise_space_is_exact_along_its_linear_part(name, lam):
    """Along d(eps) = lam^2 / 2 K eps dt, and without noise."""
    process = processes[name]()
    ts = jnp.array([0.8, 0.72, 0.6, 0.55, 0.42])
    start = _state(process, 9)

    def loading(t):
        return process.factor(t).inverse() @ process.diffusion(t)

    def noise_field(t, eps, args):
        k = loading(t) @ loading(t).T * (0.5 * lam**2)
        return k.mv(eps)

    controller = dfx.PIDController(rtol=1e-12, atol=1e-12)
    noise = dfx.diffeqsolve(
        dfx.ODETerm(noise_field),
        dfx.Dopri8(),
        ts[0],
        ts[-1],
        None,
        start,
        stepsize_controller=controller,
        saveat=dfx.SaveAt(ts=ts),
        adjoint=forward,
    ).ys

    def model(t, u, args):
        at = jnp.argmin(jnp.abs(ts - t))
        return process.to_data(jtu.tree_map(lambda x: x[at], noise))

    def whole_field(t, y, args):
        u, eps = y
        g = process.diffusion(t)
        forcing = g @ g.T @ process.factor(t).inverse().T * (0.5 * (1 + lam**2))
        drift = jtu.tree_map(lambda a, b: a + b, process.drift(t).mv(u), forcing.mv(eps))
        return drift, noise_field(t, eps, None)

    y = start
    terms = gd.reverse_sde(gd.ProbabilityFlow(process, model), jnp.asarray(lam), NoNoise(y))
    solver = gd.GDDIM(1, "noise")
    state = solver.init(terms, ts[0], ts[1], y, None)
    step = eqx.filter_jit(solver.step)
    for i in range(len(ts) - 1):
        before = y
        y, _, _, state, _ = step(terms, ts[i], ts[i + 1], y, None, state, False)
    exact, _ = dfx.diffeqsolve(
        dfx.ODETerm(whole_field),
        dfx.Dopri8(),
        ts[-2],
        ts[-1],
        None,
        (before, jtu.tree_map(lambda x: x[-2], noise)),
        stepsize_controller=controller,
        adjoint=forward,
    ).ys
    exact = jtu.tree_map(lambda x: x[-1], exact)
    size = max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(exact))
    assert max_difference(y, exact) < 1e-8 * size


@pytest.mark.x64
@pytest.mark.slow
@pytest.mark.parametrize("name", ("vp", "cld"))
def test_converges_along_the_path_to_the_limit_of_euler(name):
    process, number = processes[name](), 32
    data = mixture_for(process, scale=0.6).sample(jax.random.key(5), number)
    u, _ = process.perturb(jax.random.key(1), data, 0.7)
    terms = _terms(process, 0.5, (number,))

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


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *slow("cld")])
def test_one_path_gives_one_sample_in_both_precisions(name):
    process = processes[name]()
    u = process.prior(jax.random.key(1), (4,), jnp.float32)
    for lam in (0.5, 1.0):
        samples = []
        for dtype in (jnp.float32, jnp.float64):
            ts = gd.time_grid(process, 20, dtype=dtype)
            start = jtu.tree_map(lambda x: x.astype(dtype), u)
            level = jnp.asarray(lam, dtype)
            y = solve(_terms(process, level, (4,)), gd.GDDIM(2), ts, start)
            assert all(x.dtype == dtype for x in jtu.tree_leaves(y))
            samples.append(process.decode(y).astype(jnp.float64))
        assert float(jnp.abs(samples[0] - samples[1]).max()) < 1e-4


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *slow("cld")])
def test_vmap_and_jit_give_the_sample_of_a_loop(name):
    process = processes[name]()
    ts = gd.time_grid(process, 8)
    u = process.prior(jax.random.key(1), (4,))
    keys = jax.random.split(jax.random.key(2), 4)
    model = mixture_for(process).model(process)

    def run(u, key):
        return solve(
            gd.reverse_sde(gd.ProbabilityFlow(process, model), 1.0, key), gd.GDDIM(2), ts, u
        )

    batched = jax.jit(jax.vmap(run))(u, keys)
    for i in range(4):
        one = run(jtu.tree_map(lambda x: x[i], u), keys[i])
        same = jtu.tree_map(lambda x: x[i], batched)
        assert max_difference(one, same) < 1e-4


@pytest.mark.x64
def test_gradients():
    process = gd.VP((2,))
    ts, u = gd.time_grid(process, 3), process.prior(jax.random.key(1), (3,))
    model = mixture_for(process, scale=0.6).model(process)

    @jax.jit
    def loss(scale):
        scaled = lambda t, u, args: jtu.tree_map(lambda e: args * e, model(t, u, None))
        terms = gd.reverse_sde(
            gd.ProbabilityFlow(process, scaled), 0.8, jax.random.key(0), (3,)
        )
        adjoint = dfx.RecursiveCheckpointAdjoint()
        return (solve(terms, gd.GDDIM(2), ts, u, args=scale, adjoint=adjoint) ** 2).sum()

    one, h = jnp.ones(()), 1e-7
    difference = (loss(one + h) - loss(one - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(one), difference, rtol=1e-5)


@pytest.mark.x64
@pytest.mark.parametrize("solver", [gd.GDDIM(3), *slow(gd.GDDIM(1))])
def test_adaptive_steps_converge_along_the_path(solver):
    process = gd.VP((2,))
    u, terms = process.prior(jax.random.key(1)), _terms(process, 0.3)
    accurate = solve(terms, gd.GDDIM(1), gd.time_grid(process, 1000, t1=0.1), u)
    errors = []
    for tolerance in (1e-2, 1e-3):
        sol = dfx.diffeqsolve(
            terms,
            solver,
            process.t_max,
            0.1,
            -0.05,
            u,
            stepsize_controller=dfx.PIDController(rtol=0, atol=tolerance, dtmin=1e-5),
            adjoint=forward,
        )
        errors.append(max_difference(sol.ys[-1], accurate))
    assert errors[1] < 0.05 and errors[1] < errors[0]


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", *slow("cld")])
def test_a_resumed_solve_equals_an_unbroken_one(name):
    process = processes[name]()
    u, ts = process.prior(jax.random.key(1), (2,)), gd.time_grid(process, 10)
    model = mixture_for(process).model(process)
    terms, solver = (
        gd.reverse_sde(gd.ProbabilityFlow(process, model), 0.6, _unsafe_path(u)),
        gd.GDDIM(3),
    )
    whole = _solve_once(terms, solver, ts, u)
    first = dfx.diffeqsolve(
        terms,
        solver,
        ts[0],
        ts[5],
        None,
        u,
        stepsize_controller=dfx.StepTo(ts[:6]),
        saveat=dfx.SaveAt(t1=True, solver_state=True),
        adjoint=dfx.DirectAdjoint(),
    )
    half = jtu.tree_map(lambda y: y[-1], first.ys)
    state = dict(solver_state=first.solver_state, adjoint=dfx.DirectAdjoint())
    rest = solve(terms, solver, ts[5:], half, **state)
    assert max_difference(rest, whole) < 1e-5
    # Without its history it is another.
    assert max_difference(_solve_once(terms, solver, ts[5:], half), whole) > 1e-4


@pytest.mark.x64
@pytest.mark.slow
def test_saved_states_are_those_of_the_steps():
    process = gd.VP((3,))
    u, ts = process.prior(jax.random.key(1), (2,)), gd.time_grid(process, 6)

    model = mixture_for(process).model(process)

    def run(**saveat):
        return dfx.diffeqsolve(
            gd.reverse_sde(gd.ProbabilityFlow(process, model), 1.0, _unsafe_path(u)),
            gd.GDDIM(2),
            ts[0],
            ts[-1],
            None,
            u,
            stepsize_controller=dfx.StepTo(ts),
            saveat=dfx.SaveAt(**saveat),
            adjoint=dfx.DirectAdjoint(),
            max_steps=6,
        )

    steps = run(steps=True).ys
    np.testing.assert_allclose(run(ts=ts[1:]).ys, steps, atol=1e-5)
    dense = run(dense=True)
    np.testing.assert_allclose(jax.vmap(dense.evaluate)(ts[1:]), steps, atol=1e-5)
    # Between steps there is a straight line, as for every stochastic solver of Diffrax.
    middle = dense.evaluate(0.5 * (ts[2] + ts[3]))
    np.testing.assert_allclose(middle, 0.5 * (steps[1] + steps[2]), atol=1e-5)


@pytest.mark.x64
@pytest.mark.parametrize("name, dtype", [("vp", jnp.bfloat16), ("cld", jnp.float16)])
def test_half_precision(name, dtype):
    process = processes[name]()
    u = process.prior(jax.random.key(1), (3,), dtype)
    terms = _terms(process, 1.0, (3,))
    solver = gd.GDDIM(2)
    s, t = jnp.asarray(0.5, jnp.float32), jnp.asarray(0.4, jnp.float32)
    state = solver.init(terms, s, t, u, None)
    step = eqx.filter_jit(solver.step)
    y, error, _, state, _ = step(terms, s, t, u, None, state, False)
    y, error, _, state, _ = step(terms, t, t - 0.1, y, None, state, False)
    for leaf in jtu.tree_leaves((y, error, state.last.base)):
        assert leaf.dtype == dtype and jnp.isfinite(leaf).all()


@pytest.mark.x64
def test_forward_in_time_is_refused():
    process = gd.VP((2,))
    u = process.prior(jax.random.key(1))
    ts = gd.time_grid(process, 3, t0=0.1, t1=0.5)
    with pytest.raises(Exception, match="must be solved backward in time"):
        solve(_terms(process, 1.0), gd.GDDIM(), ts, u)


@pytest.mark.x64
def test_the_cholesky_frame_is_refused():
    process = gd.CLD((2,))
    u, ts = process.prior(jax.random.key(1)), gd.time_grid(process, 3)
    solver = gd.GDDIM(1, "noise", frame="cholesky")
    with pytest.raises(ValueError, match="for the probability flow only"):
        solve(_terms(process, 1.0), solver, ts, u)
