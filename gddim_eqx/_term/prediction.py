"""What models predict, one class each.

With data $x_0$ in the basis of states and noise $\\epsilon$ in the frame $R_t$, a state is
$u_t = m_t x_0 + R_t \\epsilon$, where $m_t$ is the mean coefficient $\\Psi(t, 0)$ times
`data_scale`. A prediction is another combination of $x_0$ and $\\epsilon$, so that either
follows from it and the state.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import FrameName, PredictionName, State
from .._linear import apply, BlockLinearOperator
from .._process import AbstractDiagonalProcess, AbstractProcess


class AbstractPrediction(eqx.Module):
    """What a model predicts, given the state. All states are in the basis of states."""

    @abc.abstractmethod
    def target(
        self, process: AbstractProcess, t: Array, data: State, noise: State
    ) -> State:
        """What should be predicted, from the data and the noise in the frame R."""

    @abc.abstractmethod
    def noise(
        self, process: AbstractProcess, t: Array, u: State, value: State, frame: FrameName
    ) -> State:
        """The noise in a frame that a predicted value amounts to."""

    @abc.abstractmethod
    def initial(self, process: AbstractProcess, t: Array, u: State, value: State) -> State:
        """The initial state, `data_scale` times the data, that a predicted value amounts
        to."""

    def score(self, process: AbstractProcess, t: Array, u: State, value: State) -> State:
        """The score that a predicted value amounts to."""
        noise = self.noise(process, t, u, value, "R")
        return apply((-process.factor(t).inverse()).transpose(), noise)


class Noise(AbstractPrediction):
    r"""$\epsilon = -K_t^\top \nabla \log p_t$, with a square root $K_t$ of $\Sigma_t$."""

    frame: FrameName = eqx.field(static=True)

    def target(self, process, t, data, noise):
        return _change_frame(process, t, noise, "R", self.frame)

    def noise(self, process, t, u, value, frame):
        return _change_frame(process, t, value, self.frame, frame)

    def initial(self, process, t, u, value):
        return _without_noise(process, t, u, square_root(process, t, self.frame), value)


class Data(AbstractPrediction):
    """The data; of a process with a velocity, its initial state, in which that is zero."""

    def target(self, process, t, data, noise):
        return data

    def noise(self, process, t, u, value, frame):
        residual = _subtract(u, apply(_mean(process, t), value))
        return apply(square_root(process, t, frame).inverse(), residual)

    def initial(self, process, t, u, value):
        return jtu.tree_map(lambda x: process.data_scale * x, value)


class Score(AbstractPrediction):
    r"""$\nabla \log p_t$."""

    def target(self, process, t, data, noise):
        return apply((-process.factor(t).inverse()).transpose(), noise)

    def noise(self, process, t, u, value, frame):
        return apply((-square_root(process, t, frame)).transpose(), value)

    def initial(self, process, t, u, value):
        return _without_noise(process, t, u, -process.covariance(t), value)

    def score(self, process, t, u, value):
        return value


class Velocity(AbstractPrediction):
    r"""$m_t \epsilon - \sigma_t x_0$, where every coordinate has one number."""

    def target(self, process, t, data, noise):
        mean, std = _mean(process, t), process.factor(t)
        return _subtract(apply(mean, noise), apply(std, data))

    def noise(self, process, t, u, value, frame):
        mean, std, total = self._rotation(process, t)
        return _add(apply(std @ total, u), apply(mean @ total, value))

    def initial(self, process, t, u, value):
        mean, std, total = self._rotation(process, t)
        total = total * process.data_scale
        return _subtract(apply(mean @ total, u), apply(std @ total, value))

    def _rotation(self, process, t):
        mean, std = _mean(process, t), process.factor(t)
        return mean, std, (mean @ mean + std @ std).inverse()


_predictions = {
    "noise": lambda frame: Noise(frame),
    "data": lambda frame: Data(),
    "score": lambda frame: Score(),
    "velocity": lambda frame: Velocity(),
}


def make_prediction(predicts: PredictionName, frame: FrameName) -> AbstractPrediction:
    return _predictions[predicts](frame)


def check_prediction(process: AbstractProcess, predicts: str, factor: str) -> None:
    """**Raises:** `ValueError` unless these are a prediction, and a frame of noise, that
    are defined for the process."""
    if predicts not in _predictions:
        raise ValueError(
            f"`predicts` must be one of {', '.join(map(repr, _predictions))}; got "
            f"{predicts!r}."
        )
    if factor not in ("R", "cholesky"):
        raise ValueError(f"`factor` must be 'R' or 'cholesky'; got {factor!r}.")
    if predicts == "velocity" and process.num_components != 1:
        raise ValueError(
            "`predicts='velocity'` is only defined for processes with one number "
            f"per coordinate, not for {type(process).__name__}. Use 'noise', 'data' "
            "or 'score'."
        )


def square_root(process: AbstractProcess, t: Array, frame: str) -> BlockLinearOperator:
    """The square root of the covariance that a frame is named after."""
    return process.factor(t) if frame == "R" else process.cholesky(t)


def _change_frame(process, t, noise, frame, other):
    # The square roots of one number are the same.
    if frame == other or isinstance(process, AbstractDiagonalProcess):
        return noise
    before, after = square_root(process, t, frame), square_root(process, t, other)
    return apply(after.inverse() @ before, noise)


def _mean(process, t):
    """From data to the mean of the state."""
    return process.transition(t, jnp.zeros_like(t)) * process.data_scale


def _without_noise(process, t, u, root, noise):
    mean = _subtract(u, apply(root, noise))
    return apply(process.transition(jnp.zeros_like(t), t), mean)


def _add(a, b):
    return jtu.tree_map(lambda x, y: x + y, a, b)


def _subtract(a, b):
    return jtu.tree_map(lambda x, y: x - y, a, b)
