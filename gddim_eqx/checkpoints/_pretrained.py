import importlib.resources
from typing import Literal

from .._term import ProbabilityFlow
from ._file import load


def pretrained(
    name: Literal["fashion-mnist-bdm", "fashion-mnist-cld", "fashion-mnist-vp"],
) -> ProbabilityFlow:
    """A pretrained model, included in the library.

    **Arguments:**

    - `name`: the data it was trained on and the process: Fashion-MNIST, greyscale images of
        28x28, under [`gddim_eqx.BDM`][], [`gddim_eqx.CLD`][] or [`gddim_eqx.VP`][]. A small
        network, with 180,000 parameters.

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
