"""Models in the conventions of other projects: predictions and times."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, strategies as st

import gddim_eqx as gd
from gddim_eqx._term import make_prediction, PerturbationKernel

from ..helpers import diffrax_solve, max_difference, processes, solve


_every = ("noise", "data", "score", "v", "flow")


def _defined(process, predicts):
    try:
        gd.ProbabilityFlow(process, lambda t, u, args: u, predicts)
    except ValueError:
        return False
    return True


@pytest.mark.x64
@pytest.mark.parametrize("name", ["vp", "rectified", "bdm", "cld", "psld", "third_order"])
def test_all_predictions_convert_into_each_other(name):
    process = processes[name]()
    kinds = [x for x in _every if _defined(process, x)]
    assert set(kinds) == {
        "cld": {"noise", "data", "score"},
        "third_order": {"noise", "data", "score"},
        "psld": {"noise", "data", "score", "flow"},
    }.get(name, set(_every))

    @jax.jit
    def quantities(t, data, noise):
        at = PerturbationKernel(process, t)
        u = jtu.tree_map(lambda a, b: a + b, at.mean().mv(data), at.root().mv(noise))
        found = []
        for kind in kinds:
            p = make_prediction(kind, "R")
            value = p.target(at, data, noise)
            found.append(
                (p.noise(at, u, value, "R"), p.denoised(at, u, value), p.flow(at, u, value))
            )
        return found

    shape = process.shape

    @given(st.floats(0.01, 1), st.integers(0, 2**32 - 1))
    def check(fraction, seed):
        rng = np.random.default_rng(seed)
        t = process.t_min + fraction * (process.t_max - process.t_min)
        data = process.encode(jnp.asarray(rng.normal(size=shape)))
        data = jtu.tree_map(lambda x: x / process.data_scale, data)
        noise = jtu.tree_map(lambda x: jnp.asarray(rng.normal(size=shape)), data)
        found = quantities(jnp.asarray(t), data, noise)
        scaled = jtu.tree_map(lambda x: x * process.data_scale, data)
        # A little signal in much noise, or the reverse, costs digits.
        snr = abs(float(process.log_snr(t)))
        tolerance = 1e-10 * np.exp(2 * min(snr, 10))
        for one_noise, one_data, one_flow in found:
            assert max_difference(one_noise, noise) < tolerance
            assert max_difference(one_data, scaled) < tolerance
            size = 1 + max(float(jnp.abs(x).max()) for x in jtu.tree_leaves(one_flow))
            assert max_difference(one_flow, found[0][2]) < tolerance * size

    check()


@pytest.mark.x64
def test_edm():
    """Heun's method of Karras et al. in NumPy, with 500 steps, against `GDDIM()` in 30."""
    angles = 2 * np.pi * np.arange(8) / 8
    centres, width = np.stack([np.cos(angles), np.sin(angles)], -1), 0.05

    def denoise(x, sigma):
        variance = width**2 + sigma**2
        rest = x[:, None] - centres
        logits = -0.5 * (rest**2).sum(-1) / variance
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * (centres + width**2 / variance * rest)).sum(1)

    def heun(x, number):
        powers = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), number + 1)
        times = powers**7
        for t, end in zip(times[:-1], times[1:]):
            slope = (x - denoise(x, t)) / t
            predicted = x + (end - t) * slope
            x = x + (end - t) * 0.5 * (slope + (predicted - denoise(predicted, end)) / end)
        return x

    process = gd.EDM((2,))
    mixture = gd.GaussianMixture(centres, width)
    flow = gd.ProbabilityFlow(process, mixture.model(process, "data"), "data")
    u = process.prior(jax.random.key(0), (256,))
    for grid in ("clock", "karras"):
        found = solve(flow, gd.GDDIM(), gd.time_grid(process, 30, grid), u)
        error = np.linalg.norm(found - heun(np.asarray(u), 500), axis=-1)
        assert np.median(error) < 1e-3, (grid, np.median(error))


@pytest.mark.parametrize(
    "name, process, expected",
    [
        ("index", gd.VP.from_betas((2,), np.linspace(1e-4, 0.02, 1000)), 399.0),
        ("1000 t", gd.VP((2,)), 400.0),
        ("sigma", gd.EDM((2,)), 0.4),
        ("sigma", gd.RectifiedFlow((2,)), 0.4 / 0.6),
        ("sigma", gd.GaussianPath((2,), lambda t: 3 * (1 - t), lambda t: t), 0.4 / 1.8),
        ("log(sigma) / 4", gd.EDM((2,)), np.log(0.4) / 4),
        ("1 - t", gd.RectifiedFlow((2,)), 0.6),
        (lambda t: 999 * t, gd.VP((2,)), 399.6),
    ],
)
def test_times(name, process, expected):
    seen = []
    for per_sample in (False, True):
        network = lambda time, u, args: seen.append(time) or u
        model = gd.WithTime(process, network, name, per_sample)
        assert model(0.4, jnp.ones((3, 2)), None).shape == (3, 2)
    assert seen[0].shape == () and seen[1].shape == (3,)
    for time in seen:
        np.testing.assert_allclose(time, expected, rtol=1e-5)


def test_indices_are_whole_where_times_are_theirs():
    process = gd.VP.from_betas((2,), np.linspace(1e-4, 0.02, 1000))
    times = process.time(jnp.arange(1000)).astype(jnp.float32)
    np.testing.assert_array_equal(process.index(times), np.arange(1000))
    np.testing.assert_allclose(process.index(0.25), 249.0)
    np.testing.assert_allclose(process.index(0.2503), 249.3, rtol=1e-5)


def test_edm_preconditioning():
    process = gd.EDM((2,))
    seen = []
    network = lambda noise, x, args: seen.append((noise, x)) or jnp.zeros_like(x)
    model = gd.nn.EDMPreconditioned(network, 0.5)
    u = jnp.array([[1.0, -2.0]])
    # With a network that is zero the prediction is that for normal data.
    np.testing.assert_allclose(model(0.5, u, None), 0.5 * u, rtol=1e-6)
    np.testing.assert_allclose(seen[0][0], np.log(0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(seen[0][1], u / 0.5**0.5, rtol=1e-6)
    one = gd.nn.EDMPreconditioned(lambda noise, x, args: jnp.ones_like(x), 0.5)
    added = 1.2 * 0.5 / 1.3
    np.testing.assert_allclose(one(1.2, u, None), 0.25 / 1.69 * u + added, rtol=1e-6)
    flow = gd.ProbabilityFlow(process, model, "data")
    assert gd.sample(flow, jax.random.key(0), 4, num_steps=5)[0].shape == (4, 2)


def test_bad_conventions(without_type_checks):
    network = lambda t, u, args: u
    with pytest.raises(ValueError, match="`time` must be .index"):
        gd.WithTime(gd.VP((2,)), network, "percent")
    with pytest.raises(ValueError, match="Only discrete-time models have an 'index', not"):
        gd.WithTime(gd.VP((2,)), network, "index")
    with pytest.raises(ValueError, match="'sigma' is for processes of one component"):
        gd.WithTime(gd.CLD((2,)), network, "sigma")
    with pytest.raises(ValueError, match="`model` must be callable"):
        gd.WithTime(gd.VP((2,)), 3, "1000 t")
    with pytest.raises(ValueError, match="`sigma_data` must be positive"):
        gd.nn.EDMPreconditioned(network, 0.0)


@pytest.mark.filterwarnings("ignore:The samples have a root mean square")  # Untrained.
def test_networks_of_flax(as_users_have_it):
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    process = gd.RectifiedFlow((3,))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x, t):
            return self.inner(jnp.concatenate([x, t[:, None]], -1))

    net = Net(nnx.Rngs(0))
    new_model = gd.WithTime(process, lambda t, x, args: net(x, t), "1000 t", True)

    class Old(linen.Module):
        @linen.compact
        def __call__(self, x, t):
            return linen.Dense(3)(jnp.concatenate([x, t[:, None]], -1))

    old = Old()
    parameters = old.init(jax.random.key(0), jnp.ones((1, 3)), jnp.ones(1))
    call = lambda t, x, args: old.apply(parameters, x, t)
    for model in (new_model, gd.WithTime(process, call, "1000 t", True)):
        flow = gd.ProbabilityFlow(process, model, "flow")
        assert gd.sample(flow, jax.random.key(0), 4, num_steps=3)[0].shape == (4, 3)


def test_networks_of_keras(monkeypatch, as_users_have_it):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    process = gd.RectifiedFlow((3,))
    x, t = keras.Input((3,)), keras.Input((1,))
    joined = keras.layers.Concatenate()([x, t])
    network = keras.Model([x, t], keras.layers.Dense(3)(joined))
    call = lambda t, x, args: network([x, t[:, None]])
    flow = gd.ProbabilityFlow(process, gd.WithTime(process, call, "1 - t", True), "flow")
    assert gd.sample(flow, jax.random.key(0), 4, num_steps=3)[0].shape == (4, 3)


@pytest.mark.float32
def test_the_example_rows_agree(as_users_have_it):
    path = pathlib.Path(__file__).parents[2] / "examples" / "bring_your_model.py"
    spec = importlib.util.spec_from_file_location("bring_your_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [row[0] for row in module.distances(1000, [8]).values()]
    assert len(rows) == 5 and max(rows) < 0.15 and max(rows) - min(rows) < 0.03


def test_variable_log_snr():
    # Linear extrapolation in the log-SNR, as in DPM-Solver++ (2M).
    process = gd.VP((2,))
    flow = gd.ProbabilityFlow(process, lambda t, u, args: jnp.tanh(3 * u) + t, "data")
    ts = gd.time_grid(process, 6, "log_snr")
    u = process.prior(jax.random.key(0), (4,))
    solver = gd.GDDIM(2, corrector=0, coordinate="log_snr")
    found = diffrax_solve(flow, solver, ts, u)
    x, last = u, None
    logs = [float(process.log_snr(t)) for t in ts]
    for i, t in enumerate(ts[:-1]):
        data = flow.denoised(t, x, None)
        at = lambda t: (
            process.transition(t, 0.0).blocks[0, 0],
            process.factor(t).blocks[0, 0],
        )
        (_, s), (a1, s1) = at(t), at(ts[i + 1])
        # The exact integral of the linear term, where DPM-Solver++ takes its limit.
        h = logs[i + 1] - logs[i]
        slope = 0.0 if last is None else (data - last) / (logs[i] - logs[i - 1])
        exact = a1 * (data * -np.expm1(-h) + slope * (h - 1 + np.exp(-h)))
        x = s1 / s * x + exact
        last = data
    np.testing.assert_allclose(found, x, rtol=2e-5, atol=2e-5)
