"""A process, a coordinate and a corrector from outside the package, by public names."""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd
from gddim_eqx.solvers import AbstractCoordinate, AbstractCorrector, AdamsBashforth


class OrnsteinUhlenbeck(gd.AbstractScalarProcess):
    """du = -rate u dt + sqrt(2 rate) dw."""

    shape: tuple[int, ...] = eqx.field(static=True)
    rate: float = eqx.field(static=True, default=5.0)

    t_min = 1e-3
    t_end = 1.0
    t_zero_signal = math.inf

    def _drift(self, t):
        return jnp.full_like(t, -self.rate)

    def _diffusion(self, t):
        return jnp.full_like(t, math.sqrt(2 * self.rate))

    def _transition(self, t, s):
        return jnp.exp(-self.rate * (t - s))

    def _std(self, t):
        return jnp.sqrt(-jnp.expm1(-2 * self.rate * t))

    def _prior_factor(self):
        return jnp.ones(())


class LogTime(AbstractCoordinate):
    # Neither is an array, and neither is static.
    log: Callable = jnp.log
    scale: float = 2.0

    is_logarithm: ClassVar[bool] = True

    def __call__(self, process, t, log_snr):
        return self.scale * self.log(jnp.maximum(t, process.t_min))


class PreviousEvaluation(AbstractCorrector):
    """Corrects with the evaluation at the start of the step: the trapezoidal rule."""

    num_older: int = eqx.field(static=True, default=1)
    reevaluates: ClassVar[bool] = False
    closest: ClassVar[float] = 0.4

    def __call__(self, polynomials, rank):
        return polynomials


_process = OrnsteinUhlenbeck((2,))
_data = gd.GaussianMixture([[1.0, -0.5]], 0.3)
_flow = gd.ProbabilityFlow(_process, _data.model(_process))
_solver = gd.GDDIM(2, corrector=PreviousEvaluation(), coordinate=LogTime())


def _exact(u):
    """The endpoint of the flow, which scales deviations from the mean."""
    t0, t1 = jnp.asarray(1.0), jnp.asarray(_process.t_min)
    signal = [_process.transition(t, jnp.zeros_like(t)).blocks[0, 0] for t in (t0, t1)]
    noise = [_process.covariance(t).blocks[0, 0] for t in (t0, t1)]
    std = [jnp.sqrt(v + (0.3 * a) ** 2) for a, v in zip(signal, noise)]
    means = [a * _data.means for a in signal]
    return means[1] + (u - means[0]) * std[1] / std[0]


def test_own_process_obeys_the_laws():
    gd.check_process(_process)


@pytest.mark.x64
def test_own_parts_sample_and_converge():
    errors = []
    for number in (20, 40, 80):
        x, evaluations = gd.sample(_flow, jax.random.key(0), 64, number, _solver)
        assert evaluations == number
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(64))
        u = jax.vmap(lambda key: _process.prior(key, ()))(keys)
        errors.append(float(jnp.abs(x - _exact(u)).max()))
    # The first step is of order 1.
    assert errors[2] < errors[1] / 3 < errors[0] / 9 and errors[2] < 1e-2


def test_own_parts_are_saved(tmp_path):
    gd.checkpoints.save(tmp_path / "sampler.npz", (_flow, _solver))
    like = (gd.ProbabilityFlow(_process, _data.model(_process)), _solver)
    flow, solver = gd.checkpoints.load(tmp_path / "sampler.npz", like=like)
    assert flow.process == _process and solver == _solver
    x, y = (
        gd.sample(f, jax.random.key(1), 4, 5, s).x
        for f, s in ((flow, solver), (_flow, _solver))
    )
    np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="PreviousEvaluation"):
        gd.checkpoints.load(tmp_path / "sampler.npz")
    other = eqx.tree_at(lambda s: s.predictor, solver, AdamsBashforth(3))
    with pytest.raises(ValueError, match="num_nodes"):
        gd.checkpoints.load(tmp_path / "sampler.npz", like=(flow, other))


class NewestOnly(PreviousEvaluation):
    """Corrects with the evaluation at the end of the step alone."""

    def __call__(self, polynomials, rank):
        newest = (rank == 0).astype(polynomials.dtype)
        return jnp.zeros_like(polynomials).at[:, 0].set(newest)


@pytest.mark.x64
def test_learned_corrections_are_added_to_own_parts():
    ts = gd.time_grid(_process, 6)
    u = _process.prior(jax.random.key(0), (4,))
    solvers = [gd.GDDIM(2, corrector=c) for c in (PreviousEvaluation(), NewestOnly())]
    ends = []
    for solver in solvers:
        learned = gd.LearnedGDDIM(solver, _process, ts)
        same = [gd.generate(_flow, u, 6, solver), gd.generate(_flow, u, solver=learned)]
        np.testing.assert_allclose(*same, rtol=0, atol=1e-12)
        ends.append(same[0])
    assert jnp.abs(ends[0] - ends[1]).max() > 1e-3
