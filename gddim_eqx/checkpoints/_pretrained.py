import importlib.resources
import re
from typing import Any, Literal

from .._misc import show
from .._model import NormalData
from .._term import ProbabilityFlow
from ..solvers import LearnedGDDIM
from ._file import load


Name = Literal[
    "fashion-mnist-bdm",
    "fashion-mnist-cld",
    "fashion-mnist-cld-classes",
    "fashion-mnist-vp",
    "fashion-mnist-vp-classes",
]


def pretrained(name: Name) -> ProbabilityFlow:
    """A pretrained model, included in the library.

    !!! example

        ```python
        flow = gd.checkpoints.pretrained("fashion-mnist-cld-classes")
        boots = np.full(10, 9)
        x, _ = gd.sample(flow, jax.random.key(0), 10, 20, args=boots)
        images = gd.to_uint8(x)
        PIL.Image.fromarray(np.hstack(images).squeeze()).save("boots.png")
        ```

    **Arguments:**

    - `name`: the data it was trained on and the process: Fashion-MNIST, greyscale images of
        28x28, under [`gddim_eqx.BDM`][], [`gddim_eqx.CLD`][] or [`gddim_eqx.VP`][]. A small
        network, with 180,000 parameters. Models of `classes` take labels as `args`: 0
        T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8
        bag, 9 boot, 10 any of these. To guide them, pass `flow.model` to
        [`gddim_eqx.classifier_free_guidance`][]. All predict data: `predicts="data"`.

    **Returns:** the probability flow, to pass to [`gddim_eqx.sample`][].

    **Raises:** `ValueError` for an unknown name.
    """
    models = [x for x in _names() if not (_solver.fullmatch(x) or x.endswith(_of_data))]
    return _read(name, "model", models)


def pretrained_data(name: Literal["fashion-mnist"]) -> NormalData:
    """The moments of the data of pretrained models, included in the library: for a
    [`gddim_eqx.GaussianStart`][].

    !!! example

        ```python
        flow = gd.checkpoints.pretrained("fashion-mnist-vp")
        data = gd.checkpoints.pretrained_data("fashion-mnist")
        start = gd.GaussianStart(data, None, "sharpest")
        x, evaluations = gd.sample(flow, jax.random.key(0), 64, 4, start=start)
        ```

    **Arguments:**

    - `name`: the data: the 60,000 training images of Fashion-MNIST, scaled to [-1, 1].

    **Returns:** normal data with their mean, and with the variances of their coefficients
    in [`gddim_eqx.CosineBasis`][].

    **Raises:** `ValueError` for an unknown name.
    """
    data = [x for x in _names() if x.endswith(_of_data)]
    return _read(f"{name}{_of_data}", "data", data)


def pretrained_solver(name: Name, num_steps: int) -> LearnedGDDIM:
    """A solver that was learned for a pretrained model, by [`gddim_eqx.fit_solver`][].

    !!! example

        ```python
        flow = gd.checkpoints.pretrained("fashion-mnist-cld")
        solver = gd.checkpoints.pretrained_solver("fashion-mnist-cld", 5)
        x, evaluations = gd.sample(flow, jax.random.key(0), 64, solver=solver)
        ```

    **Arguments:**

    - `name`: the name of the model, as for [`gddim_eqx.checkpoints.pretrained`][], without
        `-classes`.
    - `num_steps`: the number of evaluations: 2, 3, 4, 5, 6, 8 or 10.

    **Returns:** the solver, which has its times and starts in closed form.

    **Raises:** `ValueError` where there is none.
    """
    found = [x for x in _names() if _solver.fullmatch(x)]
    return _read(f"{name}-{num_steps}-steps", "solver", found)


_files = importlib.resources.files("gddim_eqx.checkpoints")
_ending = ".npz"
_of_data = "-data"
_solver = re.compile(r".*-\d+-steps")


def _names() -> list[str]:
    names = (path.name for path in _files.iterdir())
    return sorted(x.removesuffix(_ending) for x in names if x.endswith(_ending))


def _read(name: str, kind: str, names: list[str]) -> Any:
    if name not in names:
        raise ValueError(
            f"There is no {kind} {show(name)}, but there are {', '.join(names)}."
        )
    with importlib.resources.as_file(_files / f"{name}{_ending}") as path:
        return load(path)
