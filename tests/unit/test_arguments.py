"""Arguments are checked where they enter: the message names the argument."""

import dataclasses
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.solvers import FreeCorrector, NoiseSplitting, Time

from ..helpers import prior_state, processes


pytestmark = pytest.mark.usefixtures("without_type_checks")

_process = gd.VP((2,))
_data = gd.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.3)
_model = _data.model(_process)
_flow = gd.ProbabilityFlow(_process, _model)
_key = jax.random.key(0)
_x = np.zeros((3, 2))


def _sample(**kwargs):
    return gd.sample(**(dict(flow=_flow, key=_key, number=4) | kwargs))


_refused = {
    "`ts` must be an array|`ts` must be real": [
        lambda: _sample(ts="abc"),
        lambda: _sample(ts=[1.0, None]),
        lambda: _sample(ts=[1.0 + 0j, 0.1]),
    ],
    "`ts` must be strictly decreasing": [
        lambda: _sample(ts=[0.001, 1.0]),
        lambda: _sample(ts=[1.0, np.nan, 0.1]),
        lambda: gd.generate(_flow, _x, ts=[0.1, 1.0]),
    ],
    "`ts` must be strictly increasing": [lambda: gd.invert(_flow, _x, ts=[1.0, 0.1])],
    "`ts` must hold at least two": [lambda: _sample(ts=[[1.0, 0.5]])],
    "`number` must be": [
        lambda: _sample(number=(2, 3)),
        lambda: _sample(number="4"),
        lambda: _sample(number=-1),
        lambda: _sample(number=2.5),
    ],
    "`num_steps` must be": [
        lambda: _sample(num_steps="2"),
        lambda: gd.time_grid(_process, None),
        lambda: gd.invert(_flow, _x, 0),
    ],
    "`model` must be callable": [
        lambda: gd.ProbabilityFlow(_process, None),
        lambda: gd.ProbabilityFlow(_process, 3),
        lambda: gd.ProbabilityFlow(_process, _flow),
    ],
    "`process` must be a forward process": [
        lambda: gd.ProbabilityFlow("vp", _model),
        lambda: _data.model("vp"),
        lambda: gd.reverse_transition(_model, 0.1, 0.5),
    ],
    "`flow` must be": [
        lambda: _sample(flow=_model),
        lambda: gd.reverse_sde(_model, 1.0, _key),
        lambda: gd.data_guidance(_model, gd.Clip()),
        lambda: gd.log_likelihood(_process, _x),
        lambda: gd.log_density(_process, _x),
        lambda: gd.log_likelihood_bound(_model, _x, _key),
        lambda: gd.invert(_process, _x),
        lambda: gd.generate(_model, _x),
        lambda: gd.fit_solver(_process, _x),
    ],
    "`key` must be one random key": [
        lambda: _sample(key=0),
        lambda: _sample(key=jax.random.split(_key)),
        lambda: _process.prior(None),
        lambda: _process.perturb(0, _x, 0.5),
        lambda: _data.sample(0, 3),
        lambda: gd.reverse_sde(_flow, 1.0, 3),
        lambda: gd.log_likelihood(_flow, _x, 3, divergence="rademacher"),
        lambda: gd.dequantise(0, np.zeros((2, 2), np.uint8)),
    ],
    "`solver` must be a solver": [
        lambda: _sample(solver="heun"),
        lambda: _sample(solver=gd.GDDIM),
        lambda: gd.invert(_flow, _x, solver="heun"),
        lambda: gd.fit_solver(_flow, _x, 3, "heun"),
        lambda: gd.log_likelihood(_flow, _x, solver="heun"),
    ],
    "`placement` must be": [lambda: _sample(placement=3)],
    "`progress_meter` must be": [lambda: _sample(progress_meter=True)],
    "`batch` must be": [lambda: _process.prior(_key, "a")],
    "`n` must be": [lambda: _data.sample(_key, -1)],
    "A time must be": [
        lambda: _process.drift(None),
        lambda: _process.drift("0"),
        lambda: _process.drift(1j),
        lambda: _process.perturb(_key, _x, "a"),
        lambda: _flow.noise("a", _x, None),
        lambda: _flow.score(np.ones(3), _x, None),
    ],
    "`t[01]` must be": [
        lambda: gd.time_grid(_process, 3, t0=2.0),
        lambda: gd.time_grid(_process, 3, t1=np.nan),
        lambda: gd.log_likelihood(_flow, _x, t0="a"),
    ],
    "`t0` is traced": [lambda: jax.jit(lambda t: gd.time_grid(_process, 3, t0=t))(1.0)],
    "`grid` must be": [
        lambda: gd.time_grid(_process, 3, None),
        lambda: gd.time_grid(_process, 3, "heun"),
    ],
    "`dtype` must be": [
        lambda: gd.time_grid(_process, 3, dtype=int),
        lambda: gd.time_grid(_process, 3, dtype="abc"),
        lambda: _process.prior(_key, (3,), int),
        lambda: _process.prior(_key, (3,), complex),
    ],
    "`scale` must be": [
        lambda: gd.classifier_free_guidance(_flow, _flow, "a"),
        lambda: gd.classifier_free_guidance(_flow, _flow, None),
        lambda: gd.classifier_free_guidance(_flow, _flow, jnp.ones(3)).noise(
            0.5, _x[:2], None
        ),
        lambda: gd.GaussianMixture(jnp.zeros((2, 2)), "a"),
        lambda: gd.GaussianMixture(jnp.zeros((2, 2)), np.ones(2)),
    ],
    "`(means|weights)` must be": [
        lambda: gd.GaussianMixture("abc"),
        lambda: gd.GaussianMixture(jnp.zeros((2, 2), complex)),
        lambda: gd.GaussianMixture(jnp.zeros((2, 2)), 0.1, ["a", "b"]),
    ],
    "`(low|quantile)` must be": [
        lambda: gd.Clip("a", 1),
        lambda: gd.DynamicThreshold((2,), "a"),
    ],
    "`(learning_rate|tol)` must be": [
        lambda: gd.fit_solver(_flow, np.ones((8, 2)), 3, learning_rate="a"),
        lambda: gd.reverse_sde(_flow, 1.0, _key, (4,), tol="a"),
    ],
    "`(order|corrector)` must be": [
        lambda: gd.GDDIM(2.0),
        lambda: gd.GDDIM(True),
        lambda: gd.GDDIM(np.arange(2)),
        lambda: gd.GDDIM(2, corrector="x"),
    ],
    "`(sigma_max|beta_min|offset|mass_inverse)` must be": [
        lambda: gd.VE((2,), sigma_max=None),
        lambda: gd.VE((2,), sigma_max=np.ones(2)),
        lambda: gd.VE((2,), sigma_max=np.inf),
        lambda: gd.LinearSchedule("a"),
        lambda: gd.BDM((2, 2, 1), offset="a"),
        lambda: gd.CLD((2,), mass_inverse=np.inf),
    ],
    "`(drift|diffusion|initial_covariance|t_min|basis)` must be": [
        lambda: gd.LinearSDE((2,), 1.0, lambda t: 1.0),
        lambda: gd.LinearSDE((2,), lambda t: None, lambda t: 1.0),
        lambda: gd.LinearSDE((2,), lambda t: -1.0, lambda t: "a"),
        lambda: gd.LinearSDE((2,), lambda t: 1j, lambda t: 1.0),
        lambda: gd.LinearSDE((2,), lambda t: -1.0, lambda t: 1.0, "a"),
        lambda: gd.LinearSDE((2,), lambda t: -1.0, lambda t: 1.0, t_min="a"),
        lambda: gd.LinearSDE((2,), lambda t: -1.0, lambda t: 1.0, basis=3),
    ],
    "`schedule` must be": [lambda: gd.VP((2,), ["linear"])],
    "`frame` must be": [lambda: _flow.noise(0.5, _x, None, "L")],
    "`lam` must be": [lambda: _flow.reverse_drift(0.5, _x, None, "1")],
    "The noise must be": [lambda: _flow.prediction(0.5, _x, None)],
    "must be real floating-point numbers": [
        lambda: _process.perturb(_key, np.zeros((3, 2), np.uint8), 0.5),
        lambda: gd.log_likelihood(_flow, np.zeros((3, 2), int)),
        lambda: gd.generate(_flow, np.zeros((3, 2), int)),
    ],
    "shape of one data sample": [
        lambda: gd.log_likelihood(_flow, 1.0),
        lambda: gd.invert(_flow, 1.0),
        lambda: gd.fit_solver(_flow, 1.0),
    ],
    "`log_likelihood` must be": [lambda: gd.bits_per_dimension("a", (2,))],
}


@pytest.mark.parametrize(
    "message, call",
    [
        pytest.param(message, call, id=f"{message.split('` ')[0]} {n}")
        for message, calls in _refused.items()
        for n, call in enumerate(calls)
    ],
)
def test_a_bad_argument_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


_complex = {
    "perturb": lambda p, u: p.perturb(_key, jtu.tree_leaves(u)[0], 0.5),
    "encode": lambda p, u: p.encode(jtu.tree_leaves(u)[0]),
    "decode": lambda p, u: p.decode(u),
    "prior": lambda p, u: p.prior(_key, (), jnp.complex64),
    "prior_log_density": lambda p, u: p.prior_log_density(u),
    "flow": lambda p, u: _zero_flow(p).vf(0.5, u, None),
    "GDDIM": lambda p, u: gd.GDDIM().init(_zero_flow(p), 1.0, 0.5, u, None),
    "generate": lambda p, u: gd.generate(_zero_flow(p), u, 2),
    "invert": lambda p, u: gd.invert(_zero_flow(p), jtu.tree_leaves(u)[0], 2),
    "fit_solver": lambda p, u: gd.fit_solver(_zero_flow(p), u, 2),
    "log_density": lambda p, u: gd.log_density(_zero_flow(p), u),
    "reverse_sde": lambda p, u: (
        gd.reverse_sde(_zero_flow(p), 1.0, _key, ()).terms[0].vf(0.5, u, None)
    ),
    "loss": lambda p, u: gd.training.DenoisingLoss(p).noised(
        _key, jtu.tree_leaves(u)[0][None]
    ),
    "mixture": lambda p, u: gd.GaussianMixture(jnp.ones((1, *p.shape))).model(p)(
        0.5, u, None
    ),
    "network": lambda p, u: gd.nn.NetworkModel(p, lambda t, x: x)(0.5, u),
}


def _zero_flow(process):
    return gd.ProbabilityFlow(process, lambda t, u, args: jtu.tree_map(jnp.zeros_like, u))


@pytest.mark.parametrize("entry", _complex)
@pytest.mark.parametrize("name", ["vp", "cld"])
def test_complex_states_are_refused_by_every_entry(name, entry):
    process = processes[name]()
    u = jtu.tree_map(lambda x: x.astype(jnp.complex64), prior_state(process))
    with pytest.raises(ValueError, match="real"):
        _complex[entry](process, u)


def test_complex_data_work_as_real_and_imaginary_parts():
    z = jnp.array([1 + 2j, -0.5j])
    x = jnp.stack([z.real, z.imag], -1)
    process = gd.VP(x.shape)
    data = gd.GaussianMixture(x[None])
    flow = gd.ProbabilityFlow(process, data.model(process))
    samples = gd.sample(flow, _key, 3, 10, denoise="exact").x
    np.testing.assert_allclose(samples, jnp.broadcast_to(x, (3, *x.shape)), atol=1e-4)


def test_lists_and_arrays_of_numpy_are_data_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (_x, _x.astype(np.float32), [[0.0, 1.0]], _x.astype(np.float16)):
            u, noise = _process.perturb(_key, x, np.float64(0.5))
            assert u.dtype == noise.dtype == jnp.asarray(x).dtype
            _process.prior_log_density(_process.encode(x))
            _flow.noise(0.5, x, None)
        assert _process.prior(_key, 3, np.float64).shape == (3, 2)
        assert gd.sample(_flow, _key, 2, ts=[1.0, 0.5, 0.001]).x.shape == (2, 2)
        assert gd.log_likelihood(_flow, [[0.0, 1.0]]).value.shape == (1,)


@pytest.mark.parametrize(
    "make, parameter",
    [
        (lambda a: gd.VE((2,), sigma_max=a), "sigma_max"),
        (lambda a: gd.VP((2,), gd.LinearSchedule(beta_max=a)), "beta_max"),
        (lambda a: gd.VP((2,), gd.CosineSchedule(offset=a)), "offset"),
        (lambda a: gd.CLD((2,), beta=a), "beta"),
        (lambda a: gd.BDM((2, 2, 1), sigma_blur_max=a), "sigma_blur_max"),
        (lambda a: gd.GaussianMixture(jnp.zeros((1, 2)), a), "scale"),
        (lambda a: gd.LinearSDE((2,), lambda t: -a, lambda t: 1.0), "drift"),
        (lambda a: gd.LinearSDE((2,), lambda t: -1.0, lambda t: 2 * a), "diffusion"),
        (lambda a: gd.LinearSDE((2,), lambda t: -1.0, jnp.sqrt, t_min=a), "t_min"),
    ],
)
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_a_traced_number_of_a_process_is_named(make, parameter, transform):
    argument = jnp.array([5.0]) if transform is jax.vmap else 5.0
    with pytest.raises(ValueError, match=f"`{parameter}` .*is traced"):
        transform(lambda a: (make(a), a)[1])(argument)


class _Long:
    """What cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no repr")


_network = gd.nn.presets.small((8, 8, 1), key=_key, features=8)
_big = gd.ProbabilityFlow(gd.VP((8, 8, 1)), gd.nn.NetworkModel(gd.VP((8, 8, 1)), _network))
_long = {
    "flow": _big,
    "list": [[float(i)] * 100 for i in range(10_000)],
    "text": "a" * 100_000,
    "dictionary": {str(i): _network for i in range(100)},
    "array": np.arange(1000.0).reshape(10, 100),
    "no repr": _Long(),
}
_loss = gd.training.DenoisingLoss
_entries = {
    "guidance": lambda x: gd.classifier_free_guidance(x),
    "unconditional": lambda x: gd.classifier_free_guidance(_flow, x),
    "scale": lambda x: gd.classifier_free_guidance(_flow, _flow, {"a": x, "b": None}),
    "likelihood": lambda x: gd.classifier_guidance(_flow, x),
    "function": lambda x: gd.data_guidance(_flow, x),
    "measurement": lambda x: gd.posterior_guidance(_flow, _x, x, 0.1),
    "method": lambda x: gd.posterior_guidance(_flow, _x, lambda x: x, 0.1, x),
    "noise": lambda x: gd.posterior_guidance(_flow, _x, lambda x: x, x),
    "with_args": lambda x: gd.with_args(x, 1),
    "WithTime": lambda x: gd.WithTime(_process, x, "1 - t"),
    "time": lambda x: gd.WithTime(_process, _model, [x]),
    "network": lambda x: gd.nn.NetworkModel(_process, x),
    "flow": lambda x: gd.ProbabilityFlow(_process, x),
    "process": lambda x: gd.ProbabilityFlow(x, _model),
    "weights": lambda x: gd.GaussianMixture(_x, 0.1, x),
    "means": lambda x: gd.GaussianMixture([x, None]),
    "shape": lambda x: gd.VP((x, "a")),
    "schedule": lambda x: gd.VP((2,), x),
    "beta": lambda x: gd.LinearSchedule(x),
    "betas": lambda x: gd.VP.from_betas((2,), [x, None]),
    "path": lambda x: gd.GaussianPath((2,), [x], lambda t: t),
    "drift": lambda x: gd.LinearSDE((2,), [x], lambda t: t),
    "grid": lambda x: gd.time_grid(_process, 5, [x]),
    "num_steps": lambda x: gd.time_grid(_process, x),
    "ts": lambda x: _sample(ts=[x, None]),
    "times": lambda x: _sample(ts=np.linspace(0, 1, 900)),
    "key": lambda x: _sample(key=x),
    "number": lambda x: _sample(number=x),
    "lam": lambda x: _sample(lam=[x]),
    "solver": lambda x: _sample(solver=x),
    "dtype": lambda x: _sample(dtype=x),
    "denoise": lambda x: _sample(denoise=[x]),
    "placement": lambda x: _sample(placement=x),
    "devices": lambda x: gd.Placement([x]),
    "divergence": lambda x: gd.log_likelihood(_flow, _x, divergence=[x]),
    "learn": lambda x: gd.fit_solver(_flow, _x, learn=[x]),
    "learned": lambda x: gd.LearnedGDDIM(x, _process, [1.0, 0.5]),
    "returned": lambda x: gd.ProbabilityFlow(_process, lambda *_: [x]).vf(0.5, _x, None),
    "loss": lambda x: _loss(_process, times=x),
    "weighting": lambda x: _loss(_process, weighting=[x]),
    "predicts": lambda x: _loss(_process, predicts=[x]),
}


@pytest.mark.x64
@pytest.mark.parametrize("entry", _entries)
def test_messages_are_short_whatever_was_passed(entry):
    refused = 0
    for value in _long.values():
        try:
            _entries[entry](value)
        # (JAX may show a dtype, and Python look up what cannot be hashed.)
        except (ValueError, TypeError, RuntimeError) as error:
            assert len(str(error)) < 1000 and str(error).count("\n") <= 1, error
            refused += isinstance(error, ValueError)
    assert refused > 1


def test_guidance_says_what_to_pass():
    with pytest.raises(ValueError, match="`unconditional` must .*, `scale=2.0`"):
        gd.classifier_free_guidance(_flow, 2.0)
    process, model = _process, _model
    calls = {
        "sample(P, key, number)": lambda: gd.sample(
            process, model, _key, 4, predicts="noise"
        ),
        "reverse_sde(P, lam, key)": lambda: gd.reverse_sde(
            process, model, 1.0, _key, (4,), predicts="noise"
        ),
        "classifier_free_guidance(P)": lambda: gd.classifier_free_guidance(process, model),
        "classifier_guidance(P, log_likelihood)": lambda: gd.classifier_guidance(
            process, model, len, factor="R"
        ),
        "data_guidance(P, function)": lambda: gd.data_guidance(
            process=process, model=model, function=len
        ),
        "posterior_guidance(P, y, measurement, noise)": lambda: gd.posterior_guidance(
            process, model, _x, len, 0.1
        ),
        "with_args(P, args)": lambda: gd.with_args(process, 3),
    }
    for call, made in calls.items():
        name = call.split("(")[0]
        call = call.replace("(P", "(ProbabilityFlow(process, model)")
        message = f"`{name}` takes a flow, not a process and a model: `{call}`"
        with pytest.raises(ValueError, match=re.escape(message)):
            made()


@pytest.mark.parametrize("name", ["ClassifierFreeGuidance", "DataGuidance", "WithArgs"])
def test_former_names_say_the_new_ones(name):
    with pytest.raises(AttributeError, match=f"has no '{name}'. Use `[a-z_]+.flow"):
        getattr(gd, name)
    assert not hasattr(gd, "NoName")


def test_a_guidance_scale_can_differ_between_samples():
    zero = gd.ProbabilityFlow(_process, lambda t, u, args: 0 * u)
    guided = lambda scale: gd.classifier_free_guidance(_flow, zero, scale).model
    u = prior_state(_process, (3,))
    got = guided(jnp.array([0.0, 1.0, 2.5]))(0.5, u, None)
    for n, scale in enumerate((0.0, 1.0, 2.5)):
        np.testing.assert_allclose(got[n], guided(scale)(0.5, u, None)[n], rtol=1e-6)


def test_another_guidance_scale_does_not_compile_anew():
    traces = []

    def model(t, u, args):
        traces.append(None)
        return _model(t, u, args)

    number, flow = [], gd.ProbabilityFlow(_process, model)
    for scale in (1.0, 2.0, 3):
        guided = gd.classifier_free_guidance(flow, flow, scale)
        gd.sample(guided, _key, 2, 3)
        number.append(len(traces))
    assert number[0] == number[1] == number[2]


def test_what_a_model_raises_says_how_it_was_called():
    def of_one(t, u, args):
        return jnp.eye(2) @ u

    with pytest.raises(Exception) as caught:
        gd.sample(gd.ProbabilityFlow(_process, of_one), _key, 5, 3)
    notes = " ".join(caught.value.__notes__)
    assert "(5, 2)" in notes and "NetworkModel" in notes


@pytest.mark.parametrize(
    "solver",
    [
        gd.GDDIM(),
        gd.GDDIM(2, corrector=0, coordinate="log_snr"),
        gd.GDDIM(3, "noise", reevaluate=True),
        gd.GDDIM(1, "noise", frame="cholesky"),
    ],
)
def test_a_solver_is_its_parts(solver):
    parts = solver.predictor, solver.splitting, solver.corrector
    assert gd.GDDIM(*parts, coordinate=solver.coordinate) == solver


def test_a_part_of_a_solver_can_be_replaced():
    replace = lambda field, part: eqx.tree_at(
        lambda solver: getattr(solver, field), gd.GDDIM(2), part
    )
    assert replace("corrector", FreeCorrector(2)) == gd.GDDIM(2, corrector=2)
    assert replace("coordinate", Time()) == gd.GDDIM(2, coordinate="time")
    assert replace("splitting", NoiseSplitting()) != gd.GDDIM(2, "noise")
    assert gd.GDDIM(2, corrector=1) == gd.GDDIM(2) != gd.GDDIM(2, corrector=2)


def test_a_field_of_a_guided_model_can_be_replaced():
    replace = dataclasses.replace
    guided = gd.classifier_guidance(_flow, lambda t, u, args: u.sum(-1), 2.0).model
    assert float(replace(guided, scale=3.0).scale) == 3
    assert replace(guided, scale=3.0).flow == _flow
