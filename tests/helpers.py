import functools as ft
import signal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import PyTree

import gddim_eqx as gd


@ft.cache
def third_order():
    """Noise enters the last of three components."""
    drift = lambda t: 6 * jnp.array([[0, 1.0, 0], [-1, 0, 1.5], [0, -1.5, -3]], t.dtype)
    diffusion = lambda t: jnp.diag(jnp.array([0, 0, 6.0], t.dtype))
    initial = np.diag([1e-4, 0.04, 0.04])
    return gd.LinearSDE((3,), drift, diffusion, initial)


@ft.cache
def gaussian_path():
    return gd.GaussianPath((3,), lambda t: jnp.exp(-4 * t), lambda t: t)


# Every law in test_process.py is checked for every process here.
processes = {
    "vp": ft.partial(gd.VP, (3,)),
    "vp_cosine": ft.partial(gd.VP, (3,), "cosine"),
    "sub_vp": ft.partial(gd.SubVP, (3,)),
    "ve": ft.partial(gd.VE, (3,)),
    "cld": ft.partial(gd.CLD, (3,)),
    "cld_sloped": ft.partial(gd.CLD, (3,), beta=1.0, beta_slope=6.0, mass_inverse=2.0),
    "bdm": ft.partial(gd.BDM, (4, 6, 2)),
    "third_order": third_order,
    "edm": ft.partial(gd.EDM, (3,)),
    "discrete": ft.partial(gd.VP.from_betas, (3,), np.linspace(1e-4, 0.02, 1000)),
    "rectified": ft.partial(gd.RectifiedFlow, (3,), 3.0, t_end=0.99),
    "trigonometric": ft.partial(gd.TrigonometricFlow, (3,), t_end=0.99),
    "psld": ft.partial(gd.PSLD, (3,), 0.5),
    "langevin": ft.partial(gd.Langevin, (3,), 0.6),
    "hold": ft.partial(gd.HOLD, (3,)),
    "blurring_cld": ft.partial(gd.BlurringCLD, (4, 6, 2)),
    "gaussian_path": gaussian_path,
}
# These are like others here, so only `make test-slow` checks them.
_similar = (
    *("edm", "discrete", "trigonometric"),
    *("psld", "langevin", "hold", "blurring_cld", "gaussian_path"),
)
solvers = {f"gddim{q}": ft.partial(gd.GDDIM, q) for q in (1, 2, 3, 4)}


# Processes inherit that it is ignored, as in the background of a shell.
if_interrupted = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="SIGINT is ignored here"
)


def slow(*cases):
    """Cases of a parametrised test that only `make test-slow` runs, between or beside
    others that always run."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow
        )
        for case in cases
    ]


def thorough(*cases):
    """As `slow`, for cases that `make test-all` runs."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough
        )
        for case in cases
    ]


every_process = pytest.mark.parametrize(
    "name",
    [name for name in processes if name not in _similar] + slow(*_similar),
)
# For laws of terms and solvers, whose code is the same for all processes of a family.
_of_a_family = (*_similar, "vp_cosine", "sub_vp", "ve", "cld_sloped")
every_family = pytest.mark.parametrize(
    "name",
    [name for name in processes if name not in _of_a_family] + slow(*_of_a_family),
)


def mixture_for(process, *, scale=0.3, components=3, seed=0):
    """Data with a closed-form noise prediction, of the process' shape."""
    rng = np.random.default_rng(seed)
    means = jnp.asarray(rng.normal(size=(components, *process.shape)))
    weights = np.arange(1, components + 1)
    return gd.GaussianMixture(means, scale, weights)


def flow_of(name, **kwargs):
    """The probability flow of a mixture under one of the processes."""
    process = processes[name]()
    return gd.ProbabilityFlow(process, mixture_for(process, **kwargs).model(process))


@eqx.filter_jit
def prior_state(process, batch=(), seed=1):
    return process.prior(jax.random.key(seed), batch)


_most_steps = 512


@eqx.filter_jit
def _step_through(term, solver, ts, number, y0):
    def body(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(term, ts[i], ts[i + 1], y, None, state, False)
        return y, state

    state = solver.init(term, ts[0], ts[1], y0, None)
    return jax.lax.fori_loop(0, number, body, (y0, state))[0]


# Compiles faster than the default; not for derivatives in reverse mode.
forward = dfx.ForwardMode()


def solve(term, solver, ts, y0, **kwargs):
    """Step through the times `ts` and return the state at the last. Without `kwargs` by a
    bare loop, which compiles in half the time, once for grids of all lengths."""
    if not kwargs and not isinstance(ts, jax.core.Tracer):
        number = len(ts) - 1
        most = max(number, _most_steps)
        padded = np.pad(np.asarray(ts), (0, most - number), mode="edge")
        return _step_through(term, solver, jnp.asarray(padded), jnp.asarray(number), y0)
    return diffrax_solve(term, solver, ts, y0, **kwargs)


def diffrax_solve(term, solver, ts, y0, **kwargs):
    """As `solve`, by `diffrax.diffeqsolve`."""
    kwargs = dict(max_steps=len(ts) - 1, adjoint=forward) | kwargs
    controller = dfx.StepTo(ts)
    sol = dfx.diffeqsolve(
        term, solver, ts[0], ts[-1], None, y0, stepsize_controller=controller, **kwargs
    )
    return last(sol.ys)


def adaptive(term, solver, t0, t1, dt0, y0, tol=1e-3, **kwargs):
    """`diffrax.diffeqsolve` with step sizes chosen for a tolerance."""
    controller = dfx.PIDController(rtol=tol, atol=tol)
    kwargs = dict(stepsize_controller=controller, adjoint=forward) | kwargs
    return dfx.diffeqsolve(term, solver, t0, t1, dt0, y0, **kwargs)


def accurate(term, t0, t1, y0, rtol=1e-11):
    """The state at `t1` by another solver, to high accuracy."""
    sol = dfx.diffeqsolve(
        term,
        dfx.Dopri8(),
        t0,
        t1,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol),
        max_steps=100_000,
        adjoint=forward,
    )
    return last(sol.ys)


def last(ys):
    """Drop Diffrax's axis of saved times: the state at the last."""
    return jtu.tree_map(lambda y: y[-1], ys)


def every_kind_of_saving(ts, inner):
    """For states with a position: steps, these times and those between them, the end, and
    every third step; and dense output."""
    return dfx.SaveAt(
        subs=[
            dfx.SubSaveAt(t0=True, steps=True),
            dfx.SubSaveAt(ts=ts),
            dfx.SubSaveAt(ts=inner),
            dfx.SubSaveAt(t1=True, fn=lambda t, y, args: t * y.x),
            dfx.SubSaveAt(steps=3),
        ],
        dense=True,
    )


def max_difference(a, b):
    """The largest absolute difference between two PyTrees of arrays."""
    differences = jtu.tree_map(lambda x, y: jnp.abs(x - y).max(), a, b)
    return float(max(jtu.tree_leaves(differences)))


class CountedModel:
    """A model that counts its evaluations when it runs, not when it is traced."""

    def __init__(self, model):
        self.model = model
        self.count = 0

    def _increment(self):
        self.count += 1

    def __call__(self, t, u, args):
        jax.debug.callback(self._increment)
        return self.model(t, u, args)


class NoNoise(dfx.AbstractBrownianPath):
    """A path that stays where it is, for states like a given one."""

    shape: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    def __init__(self, state):
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.shape = jtu.tree_map(struct, state)
        self.levy_area = dfx.BrownianIncrement

    @property
    def t0(self):
        return 0.0

    @property
    def t1(self):
        return 1.0

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        still = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), self.shape)
        length = jtu.tree_map(lambda x: jnp.asarray(t1 - t0, x.dtype), self.shape)
        return dfx.BrownianIncrement(dt=length, W=still) if use_levy else still


# A model at module level, in which weights are out of reach of `checkpoints.save`.
a_network = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(7))
