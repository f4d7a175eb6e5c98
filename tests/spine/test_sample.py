import diffrax as dfx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import gddim_eqx as gd


_data = gd.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.05, [0.3, 0.7])


def _flow(process):
    return gd.ProbabilityFlow(process, _data.model(process))


@pytest.mark.x64
@pytest.mark.parametrize(
    "process, solver, lam",
    [
        (gd.VP((2,)), gd.GDDIM(), 0.0),
        (gd.CLD((2,)), gd.GDDIM(), 0.0),
        (gd.VE((2,)), gd.GDDIM(), 0.0),
        (gd.VP((2,)), gd.GDDIM(2), 1.0),
        (gd.CLD((2,)), gd.GDDIM(1), 0.5),
        (gd.CLD((2,)), gd.SSCS(), 1.0),
    ],
)
def test_samples_have_the_distribution_of_the_data(process, solver, lam):
    steps = 30 if lam == 0 else 100
    x, evaluations = gd.sample(
        _flow(process), jax.random.key(0), 4000, steps, solver, lam=lam
    )
    assert x.shape == (4000, 2) and evaluations == steps
    right = x[:, 0] > 0
    # Four standard errors of a proportion, and of a mean.
    assert abs(float(right.mean()) - 0.7) < 4 * np.sqrt(0.21 / 4000)
    for mode, mean in ((right, _data.means[1]), (~right, _data.means[0])):
        np.testing.assert_allclose(x[mode].mean(0), mean, atol=2e-2)
        np.testing.assert_allclose(x[mode].std(0), 0.05, rtol=0.2)


@pytest.mark.precision
def test_takes_a_grid_and_args_and_shows_progress(capfd):
    process = gd.VP((2,))
    exact = _data.model(process)
    model = lambda t, u, args: args * exact(t, u, None)
    ts = gd.time_grid(process, 5, "log")
    one = jnp.asarray(1.0, ts.dtype)
    meter = dfx.TextProgressMeter(minimum_increase=0.2)
    x, evaluations = gd.sample(
        gd.ProbabilityFlow(process, model),
        jax.random.key(0),
        3,
        ts=ts,
        args=one,
        progress_meter=meter,
    )
    again = gd.sample(gd.ProbabilityFlow(process, exact), jax.random.key(0), 3, ts=ts)
    np.testing.assert_allclose(x, again.x, rtol=1e-5)
    assert evaluations == 5
    assert "100.00%" in capfd.readouterr().out


@pytest.mark.x64
@pytest.mark.parametrize("kind", (gd.VP, gd.CLD))
def test_denoising_to_time_0(kind):
    process, point = kind((2,)), gd.GaussianMixture([[0.7, -0.3]])
    model = point.model(process)

    # Another model for the last evaluation only, where `args` is not 0.
    def changed(t, u, args):
        last = args * (t <= 1.01 * process.t_min).astype(t.dtype)
        return jax.tree_util.tree_map(lambda e: (1 + last) * e, model(t, u, None))

    def draw(denoise, change=0.0):
        return gd.sample(
            gd.ProbabilityFlow(process, changed),
            jax.random.key(0),
            5,
            20,
            gd.GDDIM(1),
            denoise=denoise,
            args=jnp.asarray(change),
        )

    x, evaluations = draw(None)
    assert evaluations == 20 and float(jnp.abs(x - point.means).max()) > 1e-3
    x, evaluations = draw("exact")
    assert evaluations == 21
    np.testing.assert_allclose(x - point.means, 0, atol=1e-5)
    x, evaluations = draw("drift")
    assert evaluations == 21
    difference = float(jnp.abs(draw("drift", 1.0).x - x).max())
    assert (difference < 1e-6) == isinstance(process, gd.CLD)


@pytest.mark.precision
def test_denoising_is_a_step_of_the_reverse_drift():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    before = gd.sample(flow, key, 5, 20).x
    t = gd.time_grid(process, 20)[-1]
    beta = process.diffusion(t).blocks[0, 0] ** 2
    score = flow.score(t, before, None)
    expected = before - t * (-0.5 * beta * before - beta * score)
    got = gd.sample(flow, key, 5, 20, denoise="drift").x
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_no_samples():
    process = gd.CLD((2,))
    x, _ = gd.sample(_flow(process), jax.random.key(0), 0, 3)
    assert x.shape == (0, 2)


@pytest.mark.parametrize("solver", [gd.GDDIM(), dfx.Heun(), dfx.ReversibleHeun()])
def test_what_is_not_finite_is_never_returned(solver):
    process = gd.VP((2,))
    draw = lambda model, predicts="noise", **options: gd.sample(
        gd.ProbabilityFlow(process, model, predicts),
        jax.random.key(0),
        6,
        3,
        solver,
        **options,
    )
    message = "6 of 6 samples are not finite.* t = 1 the predictions"
    with pytest.raises(FloatingPointError, match=message):
        draw(lambda t, u, args: u / 0)
    # The last sample, which is in the second batch. Those that fill it up do not count.
    model = lambda t, u, args: jnp.where(args[:, None] == 5, jnp.nan, jnp.zeros_like(u))
    options = dict(args=jnp.arange(6), batch_size=4)
    with pytest.raises(FloatingPointError, match="1 of 2 samples, from index 4, are not"):
        draw(model, "data", **options)
    # Also where it is the last of all that there are.
    with pytest.raises(FloatingPointError, match="1 of 2 samples, from index 4294967294"):
        draw(model, "data", first=2**32 - 6, **options)


def test_bad_arguments_are_refused():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    with pytest.raises(ValueError, match="`number` must be a non-negative integer"):
        gd.sample(flow, key, -1, 3)
    with pytest.raises(ValueError, match="`num_steps` or `ts`, not both"):
        gd.sample(flow, key, 1, 3, ts=gd.time_grid(process, 3))
    with pytest.raises(ValueError, match="strictly decreasing"):
        gd.sample(flow, key, 1, ts=jnp.array([1.0, 0.5, 0.6]))
    with pytest.raises(ValueError, match=r"start at 1.0, which is `process.t_max`"):
        gd.sample(flow, key, 1, ts=jnp.array([0.9, 0.5]))
    with pytest.raises(ValueError, match="at least two times"):
        gd.sample(flow, key, 1, ts=jnp.array([1.0]))
    with pytest.raises(ValueError, match="nothing is left to denoise"):
        gd.sample(flow, key, 1, ts=jnp.array([1.0, 0.5, 0.0]), denoise="exact")
    with pytest.raises(ValueError, match="`lam` must be finite and not negative.*-1"):
        gd.sample(flow, key, 1, 3, lam=-1.0)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda k: gd.sample(flow, k, 1, 3).x)(key)


def test_an_unknown_way_of_denoising_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    process = gd.VP((2,))
    with pytest.raises(ValueError, match="`denoise` must be None, 'drift' or 'exact'"):
        gd.sample(_flow(process), jax.random.key(0), 1, 3, denoise="yes")


@pytest.mark.parametrize(
    "flow, solver, message",
    [
        (gd.VP, None, "`flow` must be a `ProbabilityFlow"),
        (_flow(gd.VP((2,))), gd.GDDIM, "`solver` must be a solver.*GDDIM"),
    ],
    ids=["flow", "solver"],
)
def test_classes_in_place_of_instances_are_refused(flow, solver, message, monkeypatch):
    # Without the run-time type checks that only this test-suite has.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        gd.sample(flow, jax.random.key(0), 1, 3, solver)


def test_warns_of_samples_that_are_far_larger_than_data():
    process = gd.CLD((2,))
    wild = lambda t, u, args: gd.Phase(-3 * u.x, -3 * u.v)
    with pytest.warns(UserWarning, match="data_std"):
        gd.sample(gd.ProbabilityFlow(process, wild), jax.random.key(0), 4, 20)
    # Where the scale of the data is known, a hundred times that is too large.
    process, far = gd.VP((2,)), lambda t, x: 1e4 * jnp.ones_like(x)
    model = gd.nn.NetworkModel(process, far, data_std=0.1)
    with pytest.warns(UserWarning, match="1.0e.01 is plausible"):
        gd.sample(gd.ProbabilityFlow(process, model, "data"), jax.random.key(0), 4, 20)


@pytest.mark.parametrize(
    "model, predicts, solver, message",
    [
        # The noise of data that grow with the noise; and data that move with it.
        (
            lambda t, u, args: gd.Phase(-3 * u.x, -3 * u.v),
            "noise",
            gd.GDDIM(),
            "high .* 1 ",
        ),
        (lambda t, u, args: gd.Phase(u.x - u.v, 0 * args * u.v), "data", gd.GDDIM(), "low"),
        (
            _data.model(gd.CLD((2,))),
            "noise",
            gd.GDDIM(4, "noise", frame="cholesky"),
            "the solver diverges",
        ),
    ],
    ids=["high", "low", "solver"],
)
def test_the_warning_names_what_is_off(model, predicts, solver, message):
    flow, key = gd.ProbabilityFlow(gd.CLD((2,)), model, predicts), jax.random.key(0)
    with pytest.warns(UserWarning, match=message):
        gd.sample(flow, key, 8, 20, solver, batch_size=6, args=jnp.ones((8, 1)))


@pytest.mark.precision
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_samples_in_half_precision_are_those_of_single(lam):
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    size = {}
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        ts = gd.time_grid(process, 20, dtype=dtype)
        x = gd.sample(flow, key, 400, solver=gd.GDDIM(1), ts=ts, lam=lam).x
        assert x.dtype == dtype
        size[dtype] = float(jnp.abs(x.astype(jnp.float32)).mean())
    np.testing.assert_allclose(size[jnp.float16], size[jnp.float32], rtol=0.05)
    np.testing.assert_allclose(size[jnp.bfloat16], size[jnp.float32], rtol=0.1)


@pytest.mark.precision
def test_sampling_may_end_at_time_zero():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    for solver in (gd.GDDIM(), gd.GDDIM(2, coordinate="time"), gd.GDDIM(2, "noise")):
        x = gd.sample(flow, key, 4, solver=solver, ts=[1.0, 0.5, 0.0]).x
        assert jnp.isfinite(x).all()


# In batches


def _assert_same(x, other):
    """Up to rounding: XLA may vectorise batches of other sizes in another way."""
    tolerance = 1e-12 if jax.config.jax_enable_x64 else 1e-5
    np.testing.assert_allclose(x, other, rtol=tolerance, atol=tolerance)


@pytest.mark.precision
@pytest.mark.parametrize(
    "kind, lam, sizes", [(gd.VP, 1.0, (7, 100)), (gd.CLD, 0.0, (1, 64))]
)
def test_samples_are_the_same_whatever_the_batch_size(kind, lam, sizes):
    process = kind((2,))
    flow, key = _flow(process), jax.random.key(0)
    draw = lambda number=64, **options: gd.sample(flow, key, number, 5, lam=lam, **options)
    whole = draw()
    assert isinstance(whole.x, jax.Array)
    for size in sizes:
        parts = draw(batch_size=size)
        assert isinstance(parts.x, np.ndarray) and parts.evaluations == 5
        _assert_same(parts.x, whole.x)
    _assert_same(draw(10, first=20, batch_size=sizes[0]).x, whole.x[20:30])
    none = draw(0, batch_size=sizes[0])
    assert isinstance(none.x, np.ndarray) and none.x.shape == (0, 2)


def test_each_sample_has_its_own_start_and_path():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    u = jnp.stack([process.prior(key) for key in keys])
    flow = flow
    expected = gd.generate(flow, u, num_steps=5, solver=gd.GDDIM())
    np.testing.assert_allclose(gd.sample(flow, key, 3, 5).x, expected, atol=1e-5)
    # Zero predictions, so that all that differs is noise.
    zero = lambda t, u, args: jnp.zeros_like(u)
    plain, noisy = (
        gd.sample(gd.ProbabilityFlow(process, zero, "data"), key, 400, 5, lam=lam).x
        for lam in (0.0, 1.0)
    )
    noise = np.concatenate([plain, noisy], 1)
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.2
    assert len(np.unique(noisy)) == noisy.size


def test_conditions_go_with_their_samples():
    process = gd.VP((2,))
    model = lambda t, u, args: args["x"].astype(u.dtype)[:, None] * jnp.ones_like(u)
    args = {"x": np.arange(10.0, dtype=np.float32), "other": jnp.asarray(0.0)}
    draw = lambda **options: gd.sample(
        gd.ProbabilityFlow(process, model, "data"),
        jax.random.key(0),
        10,
        3,
        args=args,
        **options,
    )
    whole = draw().x
    np.testing.assert_allclose(whole[:, 0], args["x"], atol=0.1)
    np.testing.assert_array_equal(draw(batch_size=4).x, whole)
    # A table of another length could not be told from conditions of as many samples.
    args["other"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="every array in `args` must have one entry per"):
        draw(batch_size=4)


def test_other_steps_keys_and_batches_are_not_compiled_again(caplog):
    process = gd.VP((2,))
    model = _data.model(process)
    # A size of batches that no other test compiles.
    draw = lambda seed, number, steps: gd.sample(
        gd.ProbabilityFlow(process, model),
        jax.random.key(seed),
        number,
        steps,
        batch_size=9,
    )
    compiled = lambda: sum("Compiling jit(draw)" in x for x in caplog.messages)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for seed, number, steps in ((0, 18, 5), (1, 18, 7), (0, 30, 100), (2, 9, 1)):
            assert draw(seed, number, steps).evaluations == steps
            assert compiled() == 1
        # More than 127 steps.
        assert draw(0, 9, 200).evaluations == 200 and compiled() == 2


def test_progress_over_batches(capfd):
    process = gd.VP((2,))
    meter = dfx.TextProgressMeter(minimum_increase=0.2)
    gd.sample(
        *(_flow(process), jax.random.key(0), 20, 3),
        batch_size=5,
        progress_meter=meter,
    )
    shown = capfd.readouterr().out.split()
    assert shown == ["0.00%", "25.00%", "50.00%", "75.00%", "100.00%"]


@pytest.mark.float32
def test_dtype_is_that_of_times_and_samples():
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        assert gd.sample(flow, key, 3, 5, dtype=dtype).x.dtype == dtype
    ts = gd.time_grid(process, 5)
    got = gd.sample(flow, key, 3, ts=ts, dtype=jnp.float16)
    assert got.x.dtype == jnp.float16


def test_bad_batches_are_refused(without_type_checks):
    process = gd.VP((2,))
    flow, key = _flow(process), jax.random.key(0)
    draw = lambda **options: gd.sample(flow, key, 8, 3, **options)
    _assert_same(draw(batch_size=2.0).x, draw().x)
    with pytest.raises(ValueError, match="numbered up to 2.*first=4294967289 and number=8"):
        draw(first=2**32 - 7)
    assert draw(first=2**32 - 8).x.shape == (8, 2)
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
            draw(batch_size=size)
    with pytest.raises(ValueError, match="`first` must be a non-negative integer"):
        draw(first=-1)
    with pytest.raises(ValueError, match="`dtype` must be a"):
        draw(dtype="int32")


@pytest.mark.parametrize(
    "solver, lam",
    [
        (gd.GDDIM(), 0.0),
        (gd.GDDIM(2, reevaluate=True), 0.0),
        (gd.GDDIM(1), 1.0),
        (gd.SSCS(), 1.0),
        (dfx.Euler(), 0.0),
        *((kind(), 1.0) for kind in (dfx.Euler, dfx.EulerHeun, dfx.ItoMilstein, dfx.Heun)),
        *((kind(), 0.0) for kind in (dfx.Heun, dfx.Midpoint, dfx.Ralston, dfx.Bosh3)),
        *((kind(), 0.0) for kind in (dfx.Tsit5, dfx.Dopri5, dfx.Dopri8)),
    ],
    ids=str,
)
def test_evaluations_are_those_that_the_model_sees(solver, lam):
    process = gd.CLD((2,)) if isinstance(solver, gd.SSCS) else gd.VP((2,))
    exact, seen = _data.model(process), []

    def model(t, u, args):
        jax.debug.callback(lambda: seen.append(0))
        return exact(t, u, args)

    flow, key = gd.ProbabilityFlow(process, model), jax.random.key(0)
    options = dict(lam=lam, denoise="exact")
    _, evaluations = gd.sample(flow, key, 3, 5, solver, **options)
    jax.effects_barrier()
    assert evaluations == len(seen)


def test_evaluations_of_other_solvers_are_not_known():
    x, evaluations = gd.sample(
        _flow(gd.VP((2,))), jax.random.key(0), 3, 5, dfx.ReversibleHeun()
    )
    assert evaluations is None and jnp.isfinite(x).all()


def test_a_process_and_a_model_are_told_to_be_a_flow():
    process = gd.VP((2,))
    model, call = (
        _data.model(process),
        r"`sample\(ProbabilityFlow\(process, model\), key, num",
    )
    for options in ({}, {"predicts": "data"}):
        with pytest.raises(ValueError, match=call):
            gd.sample(process, model, jax.random.key(0), 1, 3, gd.GDDIM(), **options)


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda p: gd.GDDIM(), {"denoise": "exact"}),
        (lambda p: gd.GDDIM(1), {"lam": 1.0}),
        (lambda p: gd.LearnedGDDIM(gd.GDDIM(2), p, gd.time_grid(p, 5)), {}),
        (lambda p: gd.SSCS(), {"lam": 1.0}),
        (lambda p: dfx.Euler(), {"lam": 1.0, "denoise": "drift"}),
        (lambda p: dfx.Tsit5(), {}),
    ],
)
def test_programs_are_kept_in_the_persistent_cache(tmp_path, make, options):
    process = gd.CLD((3,))
    zero = gd.GaussianMixture(jnp.zeros((1, 3)), 1.0)
    draw = lambda: gd.sample(
        *(gd.ProbabilityFlow(process, zero.model(process)), jax.random.key(0), 3),
        **dict(ts=gd.time_grid(process, 5), solver=make(process), **options),
    )
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        draw()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert list(tmp_path.glob("jit_draw*"))


def test_a_solver_says_why_samples_are_not_finite():
    # In noise space there is no step from pure noise.
    process = gd.RectifiedFlow((2,))
    model = lambda t, u, args: jnp.zeros_like(u)
    with pytest.raises(Exception, match="where there is no signal"):
        solver = gd.GDDIM(2, "noise")
        gd.sample(
            gd.ProbabilityFlow(process, model, "data"), jax.random.key(0), 3, 5, solver
        )
