r"""The predictions that a model can make, one class each.

With data $x_0$ in the basis of states and noise $\epsilon$ in the frame $R_t$, a state is
$u_t = m_t x_0 + R_t \epsilon$, where $m_t$ is the mean coefficient $\Psi(t, 0)$ times
`data_scale`. A prediction is another combination of $x_0$ and $\epsilon$, so together
with the state it determines both.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import FrameName, PredictionName, State
from .._linear import add, apply, BlockLinearOperator, subtract
from .._process import AbstractDiagonalProcess, AbstractProcess


class Marginal(NamedTuple):
    """A process at one time."""

    process: AbstractProcess
    t: Array
    known_root: BlockLinearOperator | None = None
    """$R_t$, if already computed."""

    def root(self, frame: FrameName = "R") -> BlockLinearOperator:
        """The square root of the covariance that defines a frame."""
        if frame == "cholesky":
            return self.process.cholesky(self.t)
        return self.process.factor(self.t) if self.known_root is None else self.known_root

    def mean(self) -> BlockLinearOperator:
        """The map from data to the mean of the state."""
        signal = self.process.transition(self.t, jnp.zeros_like(self.t))
        return signal * self.process.data_scale


class AbstractPrediction(eqx.Module):
    """A model's prediction, given the state. All states are in the basis of states."""

    @abc.abstractmethod
    def target(self, at: Marginal, data: State, noise: State) -> State:
        """The target of the prediction, given the data and the noise in the frame R."""

    @abc.abstractmethod
    def noise(self, at: Marginal, u: State, value: State, frame: FrameName) -> State:
        """Convert a prediction to noise in the given frame."""

    @abc.abstractmethod
    def denoised(self, at: Marginal, u: State, value: State) -> State:
        """Convert a prediction to the initial state, `data_scale` times the data."""

    def score(self, at: Marginal, u: State, value: State) -> State:
        """Convert a prediction to the score."""
        return _to_score(at, self.noise(at, u, value, "R"))


class Noise(AbstractPrediction):
    r"""$\epsilon = -K_t^\top \nabla \log p_t$, with a square root $K_t$ of $\Sigma_t$."""

    frame: FrameName = eqx.field(static=True)

    def target(self, at, data, noise):
        return _change_frame(at, noise, "R", self.frame)

    def noise(self, at, u, value, frame):
        return _change_frame(at, value, self.frame, frame)

    def denoised(self, at, u, value):
        return _without_noise(at, u, at.root(self.frame), value)


class Data(AbstractPrediction):
    """The data; for a process with a velocity, the initial state, with zero velocity."""

    def target(self, at, data, noise):
        return data

    def noise(self, at, u, value, frame):
        residual = subtract(u, apply(at.mean(), value))
        return apply(at.root(frame).inverse(), residual)

    def denoised(self, at, u, value):
        return jtu.tree_map(lambda x: at.process.data_scale * x, value)


class Score(AbstractPrediction):
    r"""$\nabla \log p_t$."""

    def target(self, at, data, noise):
        return _to_score(at, noise)

    def noise(self, at, u, value, frame):
        return apply((-at.root(frame)).transpose(), value)

    def denoised(self, at, u, value):
        return _without_noise(at, u, -at.process.covariance(at.t), value)

    def score(self, at, u, value):
        return value


class Velocity(AbstractPrediction):
    r"""$m_t \epsilon - \sigma_t x_0$, for processes with one number per coordinate."""

    def target(self, at, data, noise):
        return subtract(apply(at.mean(), noise), apply(at.root(), data))

    def noise(self, at, u, value, frame):
        mean, std, total = self._rotation(at)
        return add(apply(std @ total, u), apply(mean @ total, value))

    def denoised(self, at, u, value):
        mean, std, total = self._rotation(at)
        total = total * at.process.data_scale
        return subtract(apply(mean @ total, u), apply(std @ total, value))

    def _rotation(self, at):
        mean, std = at.mean(), at.root()
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
    """**Raises:** `ValueError` unless this prediction and frame of the noise are defined
    for the process."""
    if predicts not in _predictions:
        raise ValueError(
            f"`predicts` must be one of {', '.join(map(repr, _predictions))}; got "
            f"{predicts!r}."
        )
    check_frame(factor)
    if predicts == "velocity" and process.num_components != 1:
        raise ValueError(
            "`predicts='velocity'` is only defined for processes with one number "
            f"per coordinate, not for {type(process).__name__}. Use 'noise', 'data' "
            "or 'score'."
        )


def check_frame(factor: str) -> None:
    """Raise a `ValueError` unless given the name of a frame of the noise."""
    if factor not in ("R", "cholesky"):
        raise ValueError(f"`factor` must be 'R' or 'cholesky'; got {factor!r}.")


def _to_score(at, noise):
    return apply((-at.root().inverse()).transpose(), noise)


def _change_frame(at, noise, frame, other):
    # The positive square root of a scalar is unique.
    if frame == other or isinstance(at.process, AbstractDiagonalProcess):
        return noise
    return apply(at.root(other).inverse() @ at.root(frame), noise)


def _without_noise(at, u, root, noise):
    mean = subtract(u, apply(root, noise))
    return apply(at.process.transition(jnp.zeros_like(at.t), at.t), mean)
