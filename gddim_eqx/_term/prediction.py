r"""The predictions that a model can make, one class each.

With data $x_0$ in the basis of states and noise $\epsilon$ in the frame $R_t$, a state is
$u_t = m_t x_0 + R_t \epsilon$, where $m_t$ is the mean coefficient $\Psi(t, 0)$ times
`data_scale`. A prediction is another linear combination of $x_0$ and $\epsilon$, so
together with the state it determines both.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import FrameName, PredictionName, State
from .._linear import add, apply, BlockLinearOperator, subtract
from .._misc import check_choice, error_if_any, show
from .._process import AbstractDiagonalProcess, AbstractProcess


class PerturbationKernel(NamedTuple):
    """The law of the states of a process at one time, given the data."""

    process: AbstractProcess
    t: Array
    known_root: BlockLinearOperator | None = None
    """$R_t$, if already computed."""
    raises: bool = True
    """Whether run-time errors are raised, or give NaN."""

    def root(self, frame: FrameName = "R") -> BlockLinearOperator:
        """The square root of the covariance that defines a frame."""
        if frame == "cholesky":
            return self.process.cholesky(self.t)
        return self.process.factor(self.t) if self.known_root is None else self.known_root

    def mean(self) -> BlockLinearOperator:
        """The map from data to the mean of the state."""
        signal = self.process.transition(self.t, jnp.zeros_like(self.t))
        return signal * self.process.data_scale

    def mean_rate(self) -> BlockLinearOperator:
        """The derivative of `mean` in time."""
        return self.process.signal_rate(self.t) * self.process.data_scale


class AbstractPrediction(eqx.Module):
    """What a model predicts, and how to convert it. States are in the process' basis."""

    def fault(self, process: AbstractProcess) -> str | None:
        """Why this prediction is not defined for a process; `None` if it is."""
        return None

    @abc.abstractmethod
    def target(self, at: PerturbationKernel, data: State, noise: State) -> State:
        """The target of the prediction, given the data and the noise in the frame R."""

    @abc.abstractmethod
    def noise(
        self, at: PerturbationKernel, u: State, value: State, frame: FrameName
    ) -> State:
        """Convert a prediction to noise in the given frame."""

    @abc.abstractmethod
    def denoised(self, at: PerturbationKernel, u: State, value: State) -> State:
        """Convert a prediction to the initial state, `data_scale` times the data."""

    def score(self, at: PerturbationKernel, u: State, value: State) -> State:
        """Convert a prediction to the score."""
        return _to_score(at, self.noise(at, u, value, "R"))

    def flow(self, at: PerturbationKernel, u: State, value: State) -> State:
        """Convert a prediction to the vector field of the probability flow."""
        diffusion = at.process.diffusion(at.t)
        pull = apply(diffusion @ diffusion.T * -0.5, self.score(at, u, value))
        return add(apply(at.process.drift(at.t), u), pull)


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
        return _scaled(value, at.process.data_scale)

    def flow(self, at, u, value):
        if at.process.num_components > 1:
            return super().flow(at, u, value)
        # Valid also where there is no signal and the drift is infinite.
        return _path_rate(at, value, self.noise(at, u, value, "R"))


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


class AbstractCombination(AbstractPrediction):
    """A combination of data and noise. Converted here for processes of one component."""

    @abc.abstractmethod
    def weights(
        self, at: PerturbationKernel
    ) -> tuple[BlockLinearOperator, BlockLinearOperator]:
        """The weights of data and noise."""

    def target(self, at, data, noise):
        of_data, of_noise = self.weights(at)
        return add(apply(of_data, data), apply(of_noise, noise))

    def noise(self, at, u, value, frame):
        return self._data_and_noise(at, u, value)[1]

    def denoised(self, at, u, value):
        return _scaled(self._data_and_noise(at, u, value)[0], at.process.data_scale)

    def flow(self, at, u, value):
        return _path_rate(at, *self._data_and_noise(at, u, value))

    def _data_and_noise(self, at, u, value):
        (of_data, of_noise), mean, std = self.weights(at), at.mean(), at.root()
        over = (mean @ of_noise - std @ of_data).inverse()
        data = subtract(apply(of_noise @ over, u), apply(std @ over, value))
        return data, subtract(apply(mean @ over, value), apply(of_data @ over, u))


class V(AbstractCombination):
    r"""$m_t \epsilon - \sigma_t x_0$ (Salimans & Ho 2022)."""

    def fault(self, process):
        if process.num_components == 1:
            return None
        return "which has more than one component"

    def weights(self, at):
        return -at.root(), at.mean()


class Flow(AbstractCombination):
    r"""$\dot m_t x_0 + \dot \sigma_t \epsilon$, the derivative of the path between data and
    noise, as in flow matching (Lipman et al. 2023). For rectified flow,
    $\epsilon - x_0$: with a shift, the derivative by the noise level."""

    def fault(self, process):
        if process.num_components == 1 or not _has_singular_diffusion(process):
            return None
        return (
            "as its diffusion is singular: the vector field of the probability flow does "
            "not determine the prediction"
        )

    def weights(self, at):
        speed = at.process.flow_speed(at.t)
        return at.mean_rate() / speed, at.process.factor_rate(at.t) / speed

    def noise(self, at, u, value, frame):
        if at.process.num_components == 1:
            return super().noise(at, u, value, frame)
        drift, root = at.process.drift(at.t), at.root()
        pull = (at.process.factor_rate(at.t) - drift @ root).inverse()
        rest = subtract(self.flow(at, u, value), apply(drift, u))
        return _change_frame(at, apply(pull, rest), "R", frame)

    def denoised(self, at, u, value):
        if at.process.num_components == 1:
            return super().denoised(at, u, value)
        return _without_noise(at, u, at.root(), self.noise(at, u, value, "R"))

    def flow(self, at, u, value):
        return _scaled(value, at.process.flow_speed(at.t))


def _scaled(u, factor):
    return jtu.tree_map(lambda x: x * jnp.asarray(factor, x.dtype), u)


def _path_rate(at, data, noise):
    """The derivative in time of the path between data and noise."""
    rate = apply(at.process.factor_rate(at.t), noise)
    return add(apply(at.mean_rate(), data), rate)


_predictions = {"noise": Noise, "data": Data, "score": Score, "v": V, "flow": Flow}


def make_prediction(predicts: PredictionName, frame: FrameName) -> AbstractPrediction:
    return Noise(frame) if predicts == "noise" else _predictions[predicts]()


def check_prediction(process: AbstractProcess, predicts: Any, frame: Any) -> None:
    """**Raises:** `ValueError` unless this prediction and frame of the noise are defined
    for the process."""
    check_choice("predicts", predicts, _predictions)
    check_frame(frame)
    if fault := make_prediction(predicts, frame).fault(process):
        raise ValueError(
            f"`predicts={show(predicts)}` is not defined for {type(process).__name__}, "
            f"{fault}. Use 'noise', 'data' or 'score'."
        )


def check_frame(frame: str) -> None:
    """Raise a `ValueError` unless given the name of a frame of the noise."""
    check_choice("frame", frame, ("R", "cholesky"))


def _has_singular_diffusion(process: AbstractProcess) -> bool:
    with jax.ensure_compile_time_eval():
        blocks = process.diffusion(0.5 * (process.t_min + process.t_max)).blocks
        blocks = jnp.moveaxis(blocks, (0, 1), (-2, -1))
        return bool((jnp.linalg.det(blocks) == 0).any())


def error_without_signal(at: PerturbationKernel, message: str) -> Array:
    """The time, with a run-time error if there is no signal at it."""
    if at.process.t_end < at.process.t_zero_signal:
        return at.t
    return error_if_any(at.t, [(at.t >= at.process.t_zero_signal, message)], at.raises)


def _to_score(at, noise):
    return apply((-at.root().inverse()).transpose(), noise)


def _change_frame(at, noise, frame, other):
    # The positive square root of a scalar is unique.
    if frame == other or isinstance(at.process, AbstractDiagonalProcess):
        return noise
    return apply(at.root(other).inverse() @ at.root(frame), noise)


def _without_noise(at, u, root, noise):
    mean, process = subtract(u, apply(root, noise)), at.process
    t = error_without_signal(
        at,
        f"At t = {process.t_zero_signal} there is no signal, so a noise or score "
        "prediction does not determine the data. Use a model that predicts "
        "'data', 'v' or 'flow', or a process with a smaller `t_end`.",
    )
    return apply(process.transition(jnp.zeros_like(t), t), mean)
