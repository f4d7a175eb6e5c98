from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._linear import append_axes, BlockLinearOperator
from .._misc import check_count, check_positive
from .base import AbstractProcess, require_process


_QUANTITIES = ("drift", "diffusion", "covariance", "factor", "cholesky")
_TOLERANCE = 1e-6

# Laws that are checked at some times: each with its error at each of these, or whether it
# is broken there; and what to do about that.
_Laws = Iterator[tuple[str, np.ndarray] | tuple[str, np.ndarray, str]]


def check_process(process: AbstractProcess) -> None:
    r"""Check that a process obeys the laws that training and sampling rely on, as listed
    in [`gddim_eqx.AbstractProcess`][]. A process that breaks one may silently produce
    wrong samples.

    They are checked to about six digits, at a few times in the sampling interval, in
    float64 regardless of JAX's default.

    **Arguments:**

    - `process`: a forward process, usually of a custom class.

    **Raises:** a `ValueError` that names the law, the time, the relative error, and what to
    do about it.
    """
    require_process(process)
    name = type(process).__name__
    with (
        jax.ensure_compile_time_eval(),
        jax.enable_x64(True),
        np.errstate(all="ignore"),
    ):
        check_count(f"{name}.num_components", process.num_components)
        check_positive(**{f"{name}.data_scale": process.data_scale})
        _check_operators(process, name)
        for times, laws in _laws(process):
            for law, errors, *cure in laws:
                errors = np.where(np.isnan(errors), np.inf, np.asarray(errors, float))
                worst = int(np.argmax(errors))
                if errors[worst] > _TOLERANCE:
                    raise ValueError(
                        f"`{name}` breaks a law at t = {times[worst]:.6g}: {law}. The "
                        f"relative error is {errors[worst]:.2g}. {' '.join(cure)}"
                    )


def _check_operators(process: AbstractProcess, name: str) -> None:
    """Check what the methods return, without computing values."""
    for dtype in (jnp.float32, jnp.float64):
        t = jax.ShapeDtypeStruct((), dtype)
        arguments = dict.fromkeys(_QUANTITIES, (t,))
        arguments |= dict(transition=(t, t), prior_factor=())
        for quantity, times in arguments.items():
            method = f"`{name}._{quantity}`"
            blocks = jax.eval_shape(getattr(process, f"_{quantity}"), *times)
            if not isinstance(blocks, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"{method} must return an array of blocks; it returned "
                    f"{type(blocks).__name__}."
                )
            n = jax.eval_shape(getattr(process, quantity), *times).num_components
            if n != process.num_components or (blocks.dtype != dtype and times):
                raise ValueError(
                    f"{method} must return blocks for states of `num_components="
                    f"{process.num_components}`, in the dtype of the time that is passed, "
                    f"{jnp.dtype(dtype)}; it returned {blocks.dtype}, for {n} component(s)."
                    " Build arrays with `jnp.zeros_like(t)` or `jnp.asarray(x, t.dtype)`."
                )


def _laws(process: AbstractProcess) -> Iterator[tuple[np.ndarray, _Laws]]:
    times = _times(process)
    evaluate = lambda t: {
        q: _matrices(process, getattr(process, q)(t)) for q in _QUANTITIES
    }
    values, rates = _with_rates(evaluate, times)
    yield times, _laws_of_values(values)
    later, earlier = np.append(times, times[1:]), np.append(0 * times, times[:-1])
    drift = np.append(values["drift"], values["drift"][1:], axis=0)
    yield later, _laws_of_transition(process, later, earlier, drift)
    yield times, _laws_of_roots(values)
    yield times, _laws_of_rates(times, values, rates)
    yield np.array([process.t_max]), _laws_of_states(process, values["covariance"][-1])


def _times(process: AbstractProcess) -> np.ndarray:
    first, last = process.t_min, process.t_max
    geometric = first * (last / first) ** np.array([0, 0.2, 0.4, 0.6, 0.8, 0.95])
    # Without signal the drift is infinite.
    end = 1 if process.t_zero_signal > process.t_max else 0.99
    linear = first + (last - first) * np.array([0.3, 0.6, 0.85, end])
    return np.unique(np.clip(np.concatenate([geometric, linear]), first, last))


def _with_rates(fn, *times):
    """The matrices that a function of scalar times returns, `(times, *spectrum, n, n)`, and
    their derivatives in the first time."""
    at = lambda t, *s: jax.jvp(lambda t: fn(t, *s), (t,), (jnp.ones_like(t),))
    return jtu.tree_map(np.asarray, jax.jit(jax.vmap(at))(*times))


def _matrices(process: AbstractProcess, operator: BlockLinearOperator):
    blocks = append_axes(operator.blocks, 2 + len(process.shape))
    return jnp.moveaxis(blocks, (0, 1), (-2, -1))


def _laws_of_values(values) -> _Laws:
    for name, value in values.items():
        yield f"`{name}(t)` must be finite", _anywhere(~np.isfinite(value))


def _laws_of_transition(process, t, s, drift) -> _Laws:
    r = 0.5 * (t + s)
    transition = lambda t, s: _matrices(process, process.transition(t, s))
    times = np.stack([t, t, t, r, s]), np.stack([t, s, r, s, t])
    moved, rates = _with_rates(transition, *(x.ravel() for x in times))
    still, forward, after, before, back = np.split(moved, 5)
    yield (
        "`transition(t, 0)` must not be nan, but zero or huge where it under- or overflows",
        _anywhere(np.isnan(forward)) & (s == 0),
    )
    eye = np.eye(process.num_components)
    yield "`transition(t, t)` must be the identity", _error(still, eye, eye)
    yield (
        "`transition(t, r) @ transition(r, s)` must equal `transition(t, s)`",
        _error_of_product(after, before, forward),
        "A transition maps the mean of the state at one time to that at another.",
    )
    yield (
        "`transition(t, s) @ transition(s, t)` must be the identity",
        _error_of_product(forward, back, eye),
        "`transition` must be defined backward in time too.",
    )
    size = abs(drift) @ abs(forward) + _slow(forward, t)
    yield (
        "the derivative of `transition(t, s)` in `t` must be `drift(t) @ transition(t, s)`",
        _error(np.split(rates, 5)[1], drift @ forward, size),
        "Either `drift` or `transition` is wrong; mind the sign of `drift`, which is that "
        "of the forward process.",
    )


def _laws_of_roots(values) -> _Laws:
    covariance, cholesky = values["covariance"], values["cholesky"]
    not_positive = np.linalg.diagonal(cholesky) <= 0
    yield (
        "`cholesky(t)` must be lower triangular, with a positive diagonal",
        _anywhere(np.triu(cholesky, 1) != 0) | _anywhere(not_positive),
        "`covariance(t).cholesky()` gives the blocks of such a factor.",
    )
    errors = {
        name: _error_of_product(values[name], values[name].mT, covariance)
        for name in ("factor", "cholesky")
    }
    yield (
        "`covariance(t)` must equal `factor(t) @ factor(t).T` and `cholesky(t) @ "
        "cholesky(t).T`",
        np.minimum(*errors.values()),
        "As neither square root agrees with it, `covariance` is wrong.",
    )
    for name, error in errors.items():
        law = f"`{name}(t) @ {name}(t).T` must equal `covariance(t)`"
        yield law, error, f"`{name}` is wrong, as the other square root is right."


def _laws_of_rates(times, values, rates) -> _Laws:
    drift, diffusion, covariance, factor = (values[name] for name in _QUANTITIES[:4])
    noise, spread = diffusion @ diffusion.mT, drift @ covariance
    size = abs(drift) @ abs(covariance)
    size = size + size.mT + abs(diffusion) @ abs(diffusion.mT) + _slow(covariance, times)
    yield (
        "the derivative of `covariance(t)` must be `drift(t) @ covariance(t) + "
        "covariance(t) @ drift(t).T + diffusion(t) @ diffusion(t).T`",
        _error(rates["covariance"], spread + spread.mT + noise, size),
        "`drift` agrees with `transition`, so either `diffusion` is wrong, or `covariance` "
        "and its square roots are.",
    )
    turned = np.linalg.inv(factor.mT)
    size = abs(drift) @ abs(factor) + abs(noise) @ abs(turned) + _slow(factor, times)
    yield (
        "the derivative of `factor(t)` must be `(F + G @ G.T @ covariance^-1 / 2) @ "
        "factor(t)`, with F and G for `drift(t)` and `diffusion(t)` (gDDIM, equation 17)",
        _error(rates["factor"], drift @ factor + noise @ turned / 2, size),
        "With several components no other square root will do, not even the Cholesky "
        "factor. `LinearSDE` solves this equation for any `drift` and `diffusion`.",
    )


def _laws_of_states(process, covariance) -> _Laws:
    moved = _matrices(process, process.transition(process.t_max, 0.0))
    prior = np.asarray(_matrices(process, process.prior_factor()))
    mean = process.data_scale * np.asarray(moved)[..., :1]
    least, most = (
        np.linalg.eigvals(np.linalg.solve(x, prior @ prior.mT)).real
        for x in (covariance, covariance + mean @ mean.mT)
    )
    yield (
        "`prior_factor()` must be about a square root of the covariance of states at "
        "`t_max`, which is at least `covariance(t_max)`, and not much more for data of "
        "unit variance",
        ~np.array([least.min() > 0.5 and most.max() < 2]),
        "`cholesky(t_max)` is suitable.",
    )
    x = jr.normal(jr.key(0), process.shape, jnp.float64)
    encoded = jax.jit(process.encode)(x)
    length = jnp.linalg.norm(process.data_scale * x)
    change = abs(jnp.linalg.norm(jtu.tree_leaves(encoded)[0]) - length) / length
    yield (
        "`basis` must be orthogonal, and `encode` must be `data_scale` times its `forward`",
        np.array([change]),
    )
    decoded = jax.jit(process.decode)(encoded)
    yield "`decode` must undo `encode`", np.array([abs(decoded - x).max()])


def _anywhere(broken) -> np.ndarray:
    """Whether any entry is, at each time."""
    return broken.reshape(len(broken), -1).any(1)


def _error(actual, expected, size) -> np.ndarray:
    """The largest error at each time, relative to the largest entry of each row; zero
    where float64 cannot represent it."""
    size = size.max(-1, keepdims=True)
    held = (size > 1e-250) & (size < 1e250)
    error = np.where(held, np.abs(actual - expected) / size, 0.0)
    return error.reshape(len(error), -1).max(1)


def _error_of_product(a, b, expected):
    return _error(a @ b, expected, abs(a) @ abs(b))


def _slow(value, times):
    """A slow rate of change: the smallest scale for relative errors of derivatives."""
    times = times.reshape(-1, *(1,) * (value.ndim - 1))
    return 0.01 * np.abs(value) / times
