"""`check_process` accepts what is right, and refuses by name what is not."""

import inspect
import re
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim_eqx as gd

from ..helpers import processes, slow


def _scalar():
    return gd.LinearSDE((2,), lambda t: -5 * t, lambda t: (10 * t) ** 0.5)


def _many_relaxation_times():
    constants = lambda t: -5.0 + 0 * t, lambda t: 10**0.5 + 0 * t
    return gd.LinearSDE((2,), *constants, t_end=200.0)


def _with_velocity():
    process = gd.CLD((2,))
    initial = np.diag([1e-6, 0.01 + 1e-6])
    return gd.LinearSDE((2,), process.drift, process.diffusion, initial)


def _third_order():
    return gd.LinearSDE(
        (2,),
        lambda t: 6 * jnp.array([[0, 1.0, 0], [-1, 0, 1.5], [0, -1.5, -3]], t.dtype),
        lambda t: jnp.diag(jnp.array([0, 0, 6.0], t.dtype)),
    )


_linear_sdes = [_scalar, _many_relaxation_times, _with_velocity, _third_order]


# Those that test_process.py always checks by other means, only in part.
_checked_elsewhere = ("vp_cosine", "sub_vp", "ve", "cld_sloped")


@pytest.mark.parametrize(
    "make",
    [
        *(make for name, make in processes.items() if name not in _checked_elsewhere),
        *slow(*(processes[name] for name in _checked_elsewhere)),
        *_linear_sdes,
    ],
)
def test_processes_of_the_library_obey_the_laws(make):
    gd.check_process(make())


def test_short_and_spectral_processes_obey_the_laws():
    gd.check_process(gd.VP((2,), gd.LinearSchedule(t_end=0.1)))
    gd.check_process(gd.CLD((), gamma=0.0, mass_inverse=1e4))


def _changed(process, **methods):
    """A process of a class of its own, with other methods."""
    base = type(process)

    class Changed(base):
        pass

    for name, method in methods.items():
        setattr(Changed, name, method)
    changed = object.__new__(Changed)
    for field, value in vars(process).items():
        object.__setattr__(changed, field, value)
    return changed


def _scaled(name, scale):
    return lambda self, *times: getattr(type(self).__mro__[1], name)(self, *times) * scale


def _dtype_of_its_own(self, t):
    return gd.CLD._drift(self, t).astype(jnp.float64)


wrong = {
    "factor is the Cholesky root": (
        dict(_factor=lambda self, t: self._cholesky(t)),
        r"derivative of `factor\(t\)` .* equation 17.* no other square root will do",
    ),
    "factor is scaled": (
        dict(_factor=_scaled("_factor", 1.001)),
        r"`factor\(t\) @ factor\(t\).T` must equal `covariance\(t\)`.* error is 0.00",
    ),
    "cholesky is scaled": (
        dict(_cholesky=_scaled("_cholesky", 2.0)),
        r"`covariance\(t\)` must equal .* and `cholesky\(t\) @ cholesky\(t\).T`",
    ),
    "cholesky is upper triangular": (
        dict(_cholesky=lambda self, t: gd.CLD._cholesky(self, t).T),
        r"`cholesky\(t\)` must be lower triangular",
    ),
    "covariance": (
        dict(_covariance=_scaled("_covariance", 2.0)),
        r"`covariance\(t\)` must equal `factor.*`covariance` is wrong",
    ),
    "transition does not compose": (
        dict(_transition=_scaled("_transition", 1.001)),
        r"`transition\(t, t\)` must be the identity",
    ),
    "transition of another process": (
        dict(_transition=lambda self, t, s: gd.CLD((2,), 4.01)._transition(t, s)),
        r"derivative of `transition\(t, s\)` in `t` must be `drift",
    ),
    "transition only forward": (
        dict(
            _transition=lambda self, t, s: gd.CLD._transition(self, t, jnp.minimum(s, t)),
        ),
        r"`transition\(t, s\) @ transition\(s, t\)` must be the identity",
    ),
    "drift of the reverse process": (
        dict(_drift=lambda self, t: -gd.CLD._drift(self, t)),
        r"must be `drift\(t\) @ .*mind the sign",
    ),
    "diffusion": (
        dict(_diffusion=_scaled("_diffusion", 2**-0.5)),
        r"derivative of `covariance\(t\)` .*`diffusion` is wrong",
    ),
    "prior": (
        dict(_prior_factor=_scaled("_prior_factor", 3.0)),
        r"`prior_factor\(\)` must be about",
    ),
    "number of components": (
        dict(num_components=property(lambda self: 1)),
        r"`Changed._drift` must return blocks .*`num_components=1`.* 2 component",
    ),
    "dtype": (
        dict(_drift=_dtype_of_its_own),
        r"`Changed._drift` must return blocks .* dtype of .* float32; it returned float64",
    ),
    "an operator": (
        dict(_drift=lambda self, t: gd.CLD.drift(gd.CLD((2,)), t)),
        r"`Changed._drift` must return an array of blocks; .*BlockLinearOperator",
    ),
    "not finite": (
        dict(_diffusion=_scaled("_diffusion", float("nan"))),
        r"`diffusion\(t\)` must be finite",
    ),
    "encode": (
        dict(encode=lambda self, x: gd.Phase(2 * x, 0 * x)),
        "`encode` must be `data_scale` times",
    ),
    "decode": (dict(decode=lambda self, u: u.x + 1), "`decode` must undo"),
}


@pytest.mark.parametrize("name", wrong)
def test_what_breaks_a_law_is_refused_by_name(name, without_type_checks):
    methods, message = wrong[name]
    with pytest.raises(ValueError, match=message):
        gd.check_process(_changed(gd.CLD((2,)), **methods))


@pytest.mark.parametrize(
    "methods, message",
    [
        (dict(_std=lambda self, t: 1.1 * gd.VP._std(self, t)), "derivative of `covar"),
        (dict(_drift=lambda self, t: -gd.VP._drift(self, t)), "mind the sign"),
        (dict(_diffusion=lambda self, t: t), "`diffusion` is wrong"),
        (dict(_transition=lambda self, t, s: 1 / gd.VP._transition(self, t, s)), "sign"),
    ],
)
def test_scalar_processes_are_checked_too(methods, message):
    with pytest.raises(ValueError, match=message):
        gd.check_process(_changed(gd.VP((2,)), **methods))


def test_a_process_with_public_methods_only_is_told_what_to_define():
    class Old(gd.AbstractScalarProcess):
        shape = (2,)
        t_min, t_end, t_zero_signal = 1e-3, 1.0, float("inf")

        def drift(self, t):
            return gd.BlockLinearOperator(jnp.zeros((1, 1)), self.shape)

    with pytest.raises(TypeError, match="abstract .*_diffusion.*_drift.*_prior_factor"):
        Old()  # pyright: ignore[reportAbstractUsage]


def test_only_processes_are_checked(without_type_checks):
    with pytest.raises(ValueError, match="`process` must be a forward process"):
        gd.check_process(lambda t: t)  # pyright: ignore[reportArgumentType]


def test_the_example_of_a_process_runs():
    doc = inspect.getdoc(gd.AbstractProcess)
    assert doc is not None
    (example,) = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(textwrap.dedent(example), names)
    process = names["OrnsteinUhlenbeck"]((2,))
    data = gd.GaussianMixture([[0.3, -0.4]], 0.0)
    x, _ = gd.sample(
        gd.ProbabilityFlow(process, data.model(process)), jax.random.key(0), 8, 1
    )
    np.testing.assert_allclose(x, np.broadcast_to([0.3, -0.4], (8, 2)), atol=0.3)


def test_the_docstring_lists_what_a_subclass_must_give():
    doc = gd.AbstractProcess.__doc__
    assert doc is not None
    needed = gd.AbstractProcess.__abstractmethods__ | set(
        eqx.AbstractVar and gd.AbstractProcess.__abstractvars__
    )
    assert {"shape", "t_zero_signal", "_prior_factor"} < needed
    for name in needed:
        assert f"`{name}`" in doc, name
