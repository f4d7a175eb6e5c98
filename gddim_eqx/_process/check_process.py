from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._linear import BlockLinearOperator
from .._misc import show
from .base import AbstractProcess, require_process


_QUANTITIES = ("drift", "diffusion", "covariance", "factor", "cholesky")
_TOLERANCE = 1e-6

# A law, its error at each time, those times, and what to do about it.
_Law = tuple[str, np.ndarray, np.ndarray, str]


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
        _check_attributes(process, name)
        _check_operators(process, name)
        for law, errors, times, cure in _laws(process):
            errors = np.where(np.isnan(errors), np.inf, errors)
            worst = int(np.argmax(errors))
            if errors[worst] > _TOLERANCE:
                raise ValueError(
                    f"`{name}` breaks a law at t = {times[worst]:.6g}: {law}. The relative "
                    f"error is {errors[worst]:.2g}. {cure}"
                )


def _check_attributes(process: AbstractProcess, name: str) -> None:
    if not (isinstance(process.num_components, int) and process.num_components > 0):
        raise ValueError(
            f"`{name}.num_components` must be a positive integer; got "
            f"{show(process.num_components)}."
        )
    for attribute in ("data_scale", "t_min", "t_max", "t_end", "t_zero_signal"):
        value = getattr(process, attribute)
        if not isinstance(value, float | int) or not value > 0:
            raise ValueError(
                f"`{name}.{attribute}` must be a positive number; got {show(value)}."
            )
    if not process.t_zero_signal >= process.t_max:
        raise ValueError(
            f"`{name}.t_zero_signal` must not be before `t_max`; got "
            f"{process.t_zero_signal} and {process.t_max}."
        )


def _check_operators(process: AbstractProcess, name: str) -> None:
    """Check the types that the methods return, without computing values."""
    for dtype in (jnp.float32, jnp.float64):
        t = jax.ShapeDtypeStruct((), dtype)
        outputs = {q: jax.eval_shape(getattr(process, q), t) for q in _QUANTITIES}
        outputs["transition"] = jax.eval_shape(process.transition, t, t)
        outputs["prior_factor"] = jax.eval_shape(process.prior_factor)
        for method, output in outputs.items():
            if not isinstance(output, BlockLinearOperator):
                raise ValueError(
                    f"`{name}.{method}` must return a `BlockLinearOperator`; it returned "
                    f"{type(output).__name__}."
                )
            got = output.num_components, output.shape
            if got != (process.num_components, process.shape):
                raise ValueError(
                    f"`{name}.{method}` must act on states of `num_components="
                    f"{process.num_components}` and `shape={process.shape}`; it acts on "
                    f"{got[0]} component(s) of shape {got[1]}."
                )
            if output.blocks.dtype != dtype and method != "prior_factor":
                raise ValueError(
                    f"`{name}.{method}` must compute in the dtype of the time that is "
                    f"passed, {jnp.dtype(dtype)}; it returned {output.blocks.dtype}. "
                    "Build arrays with `jnp.zeros_like(t)` or `jnp.asarray(x, t.dtype)`."
                )


def _times(process: AbstractProcess) -> np.ndarray:
    first, last = process.t_min, process.t_max
    geometric = first * (last / first) ** np.array([0, 0.2, 0.4, 0.6, 0.8, 0.95])
    # Without signal the drift is infinite.
    end = 1 if process.t_zero_signal > process.t_max else 0.99
    linear = first + (last - first) * np.array([0.3, 0.6, 0.85, end])
    return np.unique(np.clip(np.concatenate([geometric, linear]), first, last))


def _laws(process: AbstractProcess) -> Iterator[_Law]:
    times = _times(process)
    values, rates = _evaluate(process, times)
    for name, value in values.items():
        bad = ~np.isfinite(value.reshape(len(times), -1)).all(1)
        law = f"`{name}(t)` must be finite"
        yield law, np.where(bad, np.inf, 0.0), times, ""
    yield from _laws_of_transition(process, times, values["drift"])
    yield from _laws_of_roots(times, values)
    yield from _laws_of_rates(times, values, rates)
    yield from _laws_of_states(process, values)


def _evaluate(process: AbstractProcess, times: np.ndarray):
    """Every quantity except the transition, and its time derivative, as matrices
    `(times, *spectrum, n, n)`."""

    @jax.jit
    @jax.vmap
    def at(t):
        blocks = lambda t: [_matrices(process, getattr(process, q)(t)) for q in _QUANTITIES]
        return jax.jvp(blocks, (t,), (jnp.ones_like(t),))

    return (dict(zip(_QUANTITIES, map(np.asarray, x))) for x in at(times))


def _matrices(process: AbstractProcess, operator: BlockLinearOperator):
    n, rank = process.num_components, len(process.shape)
    blocks = operator.blocks
    blocks = blocks.reshape(n, n, *(blocks.shape[2:] or (1,) * rank))
    return jnp.moveaxis(blocks, (0, 1), (-2, -1))


def _transitions(process: AbstractProcess, *pairs):
    """The transitions between pairs of times, and their derivatives in the first time."""

    @jax.jit
    @jax.vmap
    def at(t, s):
        moved = lambda t: _matrices(process, process.transition(t, s))
        return jax.jvp(moved, (t,), (jnp.ones_like(t),))

    ends = np.cumsum([len(t) for t, _ in pairs])[:-1]
    both = at(*(np.concatenate(times) for times in zip(*pairs)))
    return (np.split(np.asarray(x), ends) for x in both)


def _laws_of_transition(process, times, drift) -> Iterator[_Law]:
    zero = np.zeros_like(times)
    t = np.concatenate([times[1:], times[1:]])
    s = np.concatenate([times[:-1], zero[1:]])
    r = 0.5 * (t + s)
    pairs = (times, times), (times, zero), (t, s), (t, r), (r, s), (s, t)
    transitions, rates = _transitions(process, *pairs)
    still, from_zero, forward, after, before, back = transitions
    undefined = np.isnan(from_zero).reshape(len(times), -1).any(1)
    yield (
        "`transition(t, 0)` must not be nan, but zero or huge where it under- or overflows",
        np.where(undefined, np.inf, 0.0),
        times,
        "",
    )
    eye = np.eye(process.num_components)
    yield "`transition(t, t)` must be the identity", _error(still, eye, eye), times, ""
    yield (
        "`transition(t, r) @ transition(r, s)` must equal `transition(t, s)`",
        _error(after @ before, forward, abs(after) @ abs(before)),
        t,
        "A transition maps the mean of the state at one time to that at another.",
    )
    yield (
        "`transition(t, s) @ transition(s, t)` must be the identity",
        _error(forward @ back, eye, abs(forward) @ abs(back)),
        t,
        "`transition` must be defined backward in time too.",
    )
    drift = np.concatenate([drift[1:], drift[1:]])
    size = abs(drift) @ abs(forward) + _slow(forward, t)
    yield (
        "the derivative of `transition(t, s)` in `t` must be `drift(t) @ transition(t, s)`",
        _error(rates[2], drift @ forward, size),
        t,
        "Either `drift` or `transition` is wrong; mind the sign of `drift`, which is that "
        "of the forward process.",
    )


def _laws_of_roots(times, values) -> Iterator[_Law]:
    covariance, factor, cholesky = (
        values[name] for name in ("covariance", "factor", "cholesky")
    )
    above = np.abs(np.triu(cholesky, 1)).reshape(len(times), -1).max(1)
    negative = (np.diagonal(cholesky, axis1=-2, axis2=-1) <= 0).reshape(len(times), -1)
    yield (
        "`cholesky(t)` must be lower triangular, with a positive diagonal",
        np.where((above > 0) | negative.any(1), np.inf, 0.0),
        times,
        "`covariance(t).cholesky()` is such a factor.",
    )
    errors = {
        name: _error(root @ _T(root), covariance, abs(root) @ abs(_T(root)))
        for name, root in (("factor", factor), ("cholesky", cholesky))
    }
    yield (
        "`covariance(t)` must equal `factor(t) @ factor(t).T` and `cholesky(t) @ "
        "cholesky(t).T`",
        np.minimum(*errors.values()),
        times,
        "As neither square root agrees with it, `covariance` is wrong.",
    )
    for name, error in errors.items():
        law = f"`{name}(t) @ {name}(t).T` must equal `covariance(t)`"
        yield law, error, times, f"`{name}` is wrong, as the other square root is right."


def _laws_of_rates(times, values, rates) -> Iterator[_Law]:
    drift, diffusion, covariance, factor, _ = values.values()
    noise = diffusion @ _T(diffusion)
    spread = drift @ covariance
    size = abs(drift) @ abs(covariance)
    size = size + _T(size) + abs(diffusion) @ abs(_T(diffusion))
    yield (
        "the derivative of `covariance(t)` must be `drift(t) @ covariance(t) + "
        "covariance(t) @ drift(t).T + diffusion(t) @ diffusion(t).T`",
        _error(
            rates["covariance"],
            spread + _T(spread) + noise,
            size + _slow(covariance, times),
        ),
        times,
        "`drift` agrees with `transition`, so either `diffusion` is wrong, or `covariance` "
        "and its square roots are.",
    )
    turned = np.linalg.inv(_T(factor))
    size = abs(drift) @ abs(factor) + abs(noise) @ abs(turned)
    yield (
        "the derivative of `factor(t)` must be `(F + G @ G.T @ covariance^-1 / 2) @ "
        "factor(t)`, with F and G for `drift(t)` and `diffusion(t)` (gDDIM, equation 17)",
        _error(
            rates["factor"],
            drift @ factor + noise @ turned / 2,
            size + _slow(factor, times),
        ),
        times,
        "With several components no other square root will do, not even the Cholesky "
        "factor. `LinearSDE` solves this equation for any `drift` and `diffusion`.",
    )


def _laws_of_states(process, values) -> Iterator[_Law]:
    end, start = jnp.asarray(process.t_max), jnp.zeros(())
    prior = np.asarray(_matrices(process, process.prior_factor()))
    moved = jax.jit(process.transition)(end, start)
    mean = process.data_scale * np.asarray(_matrices(process, moved))[..., :1]
    smallest = values["covariance"][-1]
    largest = smallest + mean @ _T(mean)
    prior = prior @ _T(prior)
    ratios = [
        np.linalg.eigvals(np.linalg.solve(x, prior)).real for x in (smallest, largest)
    ]
    wrong = not (ratios[0].min() > 0.5 and ratios[1].max() < 2)
    at_end = np.array([process.t_max])
    yield (
        "`prior_factor()` must be about a square root of the covariance of states at "
        "`t_max`, which is at least `covariance(t_max)`, and not much more for data of "
        "unit variance",
        np.array([np.inf if wrong else 0.0]),
        at_end,
        "`cholesky(t_max)` is suitable.",
    )
    x = jr.normal(jr.key(0), process.shape, jnp.float64)
    encoded = jax.jit(process.encode)(x)
    first = jtu.tree_leaves(encoded)[0]
    lengths = jnp.linalg.norm(process.data_scale * x), jnp.linalg.norm(first)
    yield (
        "`basis` must be orthogonal, and `encode` must be `data_scale` times its `forward`",
        np.array([abs(lengths[0] - lengths[1]) / lengths[0]]),
        at_end,
        "",
    )
    yield (
        "`decode` must undo `encode`",
        np.array([abs(jax.jit(process.decode)(encoded) - x).max()]),
        at_end,
        "",
    )
    u, noise = jax.jit(process.perturb)(jr.key(1), x, end)
    mean, spread = moved.mv(encoded), jax.jit(process.factor)(end).mv(noise)
    errors = jtu.tree_map(lambda u, a, b: abs(u - a - b).max(), u, mean, spread)
    yield (
        "`perturb` must return `transition(t, 0).mv(encode(x)) + factor(t).mv(noise)` and "
        "`noise`",
        np.array([max(map(float, jtu.tree_leaves(errors)))]),
        at_end,
        "",
    )


def _error(actual, expected, size) -> np.ndarray:
    """The largest error at each time, relative to the largest entry of each row; zero
    where float64 cannot represent it."""
    size = size.max(-1, keepdims=True)
    held = (size > 1e-250) & (size < 1e250)
    error = np.where(held, np.abs(actual - expected) / size, 0.0)
    return error.reshape(len(error), -1).max(1)


def _slow(value, times):
    """A slow rate of change: the smallest scale for relative errors of derivatives."""
    times = times.reshape(-1, *(1,) * (value.ndim - 1))
    return 0.01 * np.abs(value) / times


def _T(x):
    return np.swapaxes(x, -1, -2)
