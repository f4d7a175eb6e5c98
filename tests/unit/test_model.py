"""What models say of themselves, and what is not guessed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx._term import without_errors

from ..helpers import mixture_for, prior_state


_process = gd.VP((2,))
_labels = np.array([0, 1, 2, 1])


def _conditional():
    network = gd.nn.TimeMLP(2, width=8, depth=1, key=jax.random.key(0), num_classes=3)
    return gd.nn.NetworkModel(_process, network, data_std=0.5)


class _Denoiser(eqx.Module):
    """A model of one's own, whose fields mean nothing to the library."""

    flow: gd.ProbabilityFlow
    process: gd.AbstractProcess
    preconditioned_for: str = eqx.field(static=True, default="noise")
    data_std: float = eqx.field(static=True, default=1e9)
    no_condition: int = eqx.field(static=True, default=3)
    rows: int = eqx.field(static=True, default=7)
    check_args: int = eqx.field(static=True, default=7)

    def __call__(self, t, u, args):
        return self.process.decode(self.flow.denoised(t, u, args))


def test_nothing_is_guessed_from_the_names_of_fields():
    noise = gd.ProbabilityFlow(_process, mixture_for(_process).model(_process))
    data = gd.ProbabilityFlow(_process, _Denoiser(noise, _process), "data")
    assert gd.ProbabilityFlow(_process, data.model).predicts == "noise"
    draw = lambda flow, **options: gd.sample(flow, jax.random.key(0), 4, 5, **options).x
    expected = draw(noise)
    np.testing.assert_allclose(draw(data), expected, atol=1e-4)
    np.testing.assert_allclose(draw(data, batch_size=2), expected, atol=1e-4)
    with pytest.raises(ValueError, match="does not say what stands for no condition"):
        gd.classifier_free_guidance(data)


class _Told(gd.AbstractModel):
    """A model that says everything."""

    kind: str = eqx.field(static=True)

    @property
    def predicts(self):
        return self.kind

    @property
    def no_condition(self):
        return 2.0

    def normal_data(self, process):
        return gd.NormalData(jnp.zeros(process.shape), 0.25)

    def check_args(self, args):
        if args is not None and (np.asarray(args) > 2).any():
            raise ValueError("At most 2.")

    def __call__(self, t, u, args):
        return 0.1 * u + args[..., None]


def test_a_model_of_ones_own_says_what_it_is():
    flow = gd.ProbabilityFlow(_process, _Told("data"))
    assert flow.predicts == "data"
    with pytest.raises(ValueError, match="This _Told predicts 'data'; got predicts='v'"):
        gd.ProbabilityFlow(_process, flow.model, "v")
    with pytest.raises(ValueError, match="`predicts` must be"):
        gd.ProbabilityFlow(_process, _Told("nothing"))
    guided = gd.classifier_free_guidance(flow, scale=0.0)
    u = prior_state(_process, (4,))
    got = guided.model(jnp.asarray(0.5), u, jnp.zeros(4))
    np.testing.assert_allclose(got, 0.1 * u + 2, rtol=1e-6)
    with pytest.raises(ValueError, match="At most 2"):
        gd.sample(guided, jax.random.key(0), 4, 5, args=np.full(4, 3.0))
    with pytest.raises(ValueError, match="At most 2"):
        gd.with_args(flow, 3.0)
    # What other models that say nothing predict, is noise.
    assert gd.ProbabilityFlow(_process, lambda t, u, args: u).predicts == "noise"


_wrapped = {
    "itself": lambda flow: flow,
    "classifier_free_guidance": gd.classifier_free_guidance,
    "with_args": lambda flow: gd.with_args(flow, 1),
    "data_guidance": lambda flow: gd.data_guidance(flow, gd.Clip()),
    "WithTime": lambda flow: gd.ProbabilityFlow(
        _process, gd.WithTime(_process, flow.model, lambda t: t)
    ),
}


@pytest.mark.parametrize("wrap", _wrapped.values(), ids=_wrapped)
def test_a_preconditioned_network_is_seen_through_wrappers(wrap):
    flow = wrap(gd.ProbabilityFlow(_process, _conditional()))
    assert flow.predicts == "data"
    with pytest.raises(ValueError, match=" predicts 'data'; got predicts='noise'"):
        gd.ProbabilityFlow(_process, flow.model, "noise")
    # By default, sampling starts from the standard deviation that the network has.
    key, data = jax.random.key(0), gd.NormalData(jnp.zeros(2), 0.25)
    t = gd.GaussianStart(data).time(_process, 6)
    draw = lambda **options: gd.sample(flow, key, 4, 4, args=_labels, **options).x
    np.testing.assert_array_equal(draw(), draw(start=gd.GaussianStart(data, t)))
    assert np.abs(draw() - draw(start=None)).max() > 1e-3


def test_samples_are_too_large_for_the_data_of_a_guided_network():
    network = lambda t, x: jnp.full(2, 1e4, x.dtype)
    flow = gd.ProbabilityFlow(
        _process, gd.nn.NetworkModel(_process, network, data_std=1e-3)
    )
    with pytest.warns(UserWarning, match="at most about 1.0e-01 is plausible"):
        gd.sample(gd.data_guidance(flow, lambda t, x, args: x), jax.random.key(0), 4, 5)


def test_the_unconditional_flow_must_predict_the_same():
    flow = gd.ProbabilityFlow(_process, lambda t, u, args: u)
    for process, predicts, frame in (
        (_process, "data", "R"),
        (_process, "noise", "cholesky"),
        (gd.VE((2,)), "noise", "R"),
    ):
        other = gd.ProbabilityFlow(process, flow.model, predicts, frame)
        with pytest.raises(ValueError, match="`unconditional` must predict the same, und"):
            gd.classifier_free_guidance(flow, other)
    # Also where processes are traced.
    both = lambda flow, other: gd.classifier_free_guidance(flow, other).predicts
    process = gd.VP.from_betas((2,), np.linspace(1e-4, 0.02, 10))
    flows = [gd.ProbabilityFlow(process, mixture_for(process).model(process))] * 2
    assert eqx.filter_jit(both)(*flows) == "noise"


def test_run_time_errors_are_left_out_in_flows_of_models_too():
    process = gd.RectifiedFlow((2,))
    flow = gd.ProbabilityFlow(process, lambda t, u, args: 0.1 * u)
    guided = gd.data_guidance(gd.data_guidance(flow, gd.Clip()), gd.Clip())
    u = jnp.ones((1, 2))
    with pytest.raises(Exception, match="there is no signal"):
        guided.denoised(1.0, u, None)
    assert jnp.isnan(without_errors(guided).denoised(1.0, u, None)).all()
    quiet = gd.ProbabilityFlow(process, flow.model, raises=False)
    assert jnp.isnan(gd.data_guidance(quiet, gd.Clip()).denoised(1.0, u, None)).all()
