import importlib.resources
from typing import Literal

from .._term import ProbabilityFlow
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
        [`gddim_eqx.ClassifierFreeGuidance`][].

    **Returns:** the probability flow, to pass to [`gddim_eqx.sample`][].

    **Raises:** `ValueError` for an unknown name.
    """
    files = importlib.resources.files("gddim_eqx.checkpoints")
    ending = ".npz"
    found = {path.name for path in files.iterdir() if path.name.endswith(ending)}
    if f"{name}{ending}" not in found:
        names = ", ".join(sorted(x.removesuffix(ending) for x in found))
        raise ValueError(f"There is no model {name!r}, but there are {names}.")
    with importlib.resources.as_file(files / f"{name}{ending}") as path:
        return load(path)
