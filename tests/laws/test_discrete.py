"""Discrete-time models: exact at their indices, smooth in between."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import mixture_for, prior_state, solve


_betas = np.linspace(1e-4, 0.02, 1000)


def _zero_terminal(betas):
    """Lin et al. 2024, algorithm 1."""
    roots = np.sqrt(np.cumprod(1 - betas))
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


_schedules = {
    "ddpm": lambda: np.cumprod(1 - _betas),
    "zero_terminal": lambda: _zero_terminal(_betas),
    "cosine": lambda: np.cos((np.arange(1, 101) / 101 + 0.008) / 1.008 * np.pi / 2) ** 2,
    "few": lambda: np.array([0.9, 0.5, 0.1]),
}


@pytest.mark.precision
@pytest.mark.parametrize("name", _schedules)
def test_it_is_exact_at_every_index_and_monotone_between(name):
    alphas = _schedules[name]()
    process = gd.VP.from_alphas_cumprod((2,), alphas)
    times = process.time(jnp.arange(len(alphas)))
    np.testing.assert_allclose(process.index(times), np.arange(len(alphas)), atol=1e-4)

    @jax.jit
    @jax.vmap
    def quantities(t):
        mean = process.transition(t, jnp.zeros_like(t)).blocks
        return mean.squeeze(), process.factor(t).blocks.squeeze()

    single = not jax.config.jax_enable_x64
    mean, std = quantities(times)
    np.testing.assert_allclose(
        mean,
        np.sqrt(alphas),
        rtol=3e-5 if single else 1e-12,
        atol=1e-7 if single else 1e-15,
    )
    np.testing.assert_allclose(std, np.sqrt(1 - alphas), rtol=3e-5 if single else 1e-12)
    mean, std = quantities(jnp.linspace(0, 1, 3001))
    assert mean[0] == 1 and std[0] == 0
    if not single:
        assert (np.diff(mean) < 0).all() and (np.diff(std) > 0).all()


@pytest.mark.parametrize("name", _schedules)
def test_the_time_of_a_noise_level(name):
    alphas = _schedules[name]()
    process = gd.VP.from_alphas_cumprod((2,), alphas)
    with np.errstate(divide="ignore"):
        levels = np.sqrt(1 / alphas - 1)
    times = process.time_of_sigma(levels)
    np.testing.assert_allclose(times, np.arange(1, len(alphas) + 1) / len(alphas), 1e-12)
    assert times[-1] == 1
    # Between indices, and before the first.
    finite = levels[np.isfinite(levels)]
    between = np.geomspace(finite[0] / 10, finite[-1], 30)
    with jax.enable_x64(True):
        log_snr = jax.vmap(process.log_snr)(jnp.asarray(process.time_of_sigma(between)))
    np.testing.assert_allclose(np.exp(-log_snr), between, rtol=1e-9)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["ddpm", "cosine", "zero_terminal"])
def test_it_obeys_the_laws(name):
    gd.check_process(gd.VP.from_alphas_cumprod((2,), _schedules[name]()))


@pytest.mark.x64
@pytest.mark.parametrize(
    "predicts, total, mean",
    [("noise", 172.00652217, 0.22396683), ("v", 52.53012385, 0.06839860)],
)
def test_ddim_of_ten_steps_is_that_of_the_discrete_model(predicts, total, mean):
    process = gd.VP.from_betas((3, 8, 8), _betas)

    def model(t, u, args):
        index = jnp.round(process.index(t))
        return u * index / (index + 1)

    ts = jnp.append(process.time(jnp.arange(900, -1, -100)), 0.0)
    start = np.arange(768).reshape(3, 8, 8, 4) / 768
    flow = gd.ProbabilityFlow(process, model, predicts)
    x = solve(flow, gd.GDDIM(1, "noise"), ts, jnp.asarray(start.transpose(3, 0, 1, 2)))
    assert abs(float(jnp.abs(x).sum()) - total) < 1e-7
    assert abs(float(jnp.abs(x).mean()) - mean) < 1e-8


@pytest.mark.x64
def test_models_of_zero_terminal_snr_are_sampled_from_it():
    process = gd.VP.from_alphas_cumprod((3,), _schedules["zero_terminal"]())
    data, u = mixture_for(process), prior_state(process, (4,))
    samples = []
    for predicts in ("data", "v", "flow"):
        flow = gd.ProbabilityFlow(process, data.model(process, predicts), predicts)
        samples.append(solve(flow, gd.GDDIM(), gd.time_grid(process, 10), u))
        np.testing.assert_allclose(samples[-1], samples[0], rtol=1e-6)


@pytest.mark.precision
def test_no_network_gets_an_index_that_does_not_exist():
    process = gd.VP.from_betas((2,), np.linspace(0.05, 0.6, 10))
    network = lambda index, x, args: jnp.broadcast_to(index, x.shape)
    models = [
        gd.WithTime(process, network, time, per_sample)
        for time in ("index", process.index)
        for per_sample in (False, True)
    ]
    x = jnp.zeros(2)
    for model, t in itertools.product(models, (0.03, 0.0, -1.0, 1.001, 5, jnp.nan)):
        with pytest.raises(ValueError, match="`t` must be from 0.1, the time of index 0"):
            model(t, x, None)
    # Where traced, the nearest that does.
    for model in models[::2]:
        call = jax.jit(jax.vmap(model, (0, None, None)))
        found = call(jnp.array([0.03, 0.0, 0.1, 0.55, 1.0, 1.001]), x, None)
        np.testing.assert_allclose(found[:, 0], [0, 0, 0, 4.5, 9, 9], rtol=1e-6)
    for t in (process.t_min, 0.1, 0.55, 1.0, 1):
        assert float(models[0].convert(t)) == pytest.approx(10 * t - 1, abs=1e-6)
    assert float(jax.grad(process.index)(0.1)) == pytest.approx(10)
    with pytest.raises(ValueError, match="got .0.05 0.5"):
        process.index(jnp.array([0.05, 0.5]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gd.VP.from_betas((2,), [0.1, 1.2]), "one minus `betas`.*index 1"),
        (lambda: gd.VP.from_betas((2,), [1.0, 0.1]), "one minus `betas`.*index 1"),
        (lambda: gd.VP.from_betas((2,), [-0.1, 0.1]), "one minus `betas`.*index 0"),
        (lambda: gd.VP.from_betas((2,), "linear"), "`betas` must be a list"),
        (lambda: gd.VP.from_alphas_cumprod((2,), [0.5, 0.7]), "must decrease.*index 1"),
        (lambda: gd.VP.from_alphas_cumprod((2,), [0.5, 0.0, 0.0]), "index 2"),
        (lambda: gd.VP.from_alphas_cumprod((2,), [1.0, 0.5]), "must decrease.*index 0"),
        (lambda: gd.VP.from_alphas_cumprod((2,), [0.5, -0.5]), "index 1 it is -0.5"),
        (lambda: gd.VP.from_alphas_cumprod((2,), []), "must be a list"),
        (lambda: gd.VP.from_alphas_cumprod((2,), [0.3]), "at least two"),
    ],
)
def test_what_is_no_schedule_is_refused(call, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        call()
