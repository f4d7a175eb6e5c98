from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import Args, RealScalarLike, State
from .._linear import (
    AbstractBasis,
    add,
    apply,
    BlockLinearOperator,
    check_real,
    check_state,
    coefficient_dtype,
    IdentityBasis,
)
from .._misc import as_floats, check_instance
from .ode import AbstractODE, as_state_like


class LinearPart(eqx.Module):
    r"""The operator $A_t$ of a semilinear equation."""

    coefficient: BlockLinearOperator | Callable[[Array], Any]
    """The operator, or a function of time that returns it."""
    shape: tuple[int, ...] = eqx.field(static=True)
    num_components: int = eqx.field(static=True)

    @property
    def t_end(self) -> float:
        """The end of the time axis, as for a process. Here it is unbounded."""
        return float("inf")

    @property
    def is_constant(self) -> bool:
        return isinstance(self.coefficient, BlockLinearOperator)

    @property
    def is_diagonal(self) -> bool:
        """Whether it is constant and diagonal."""
        given = self.coefficient
        return isinstance(given, BlockLinearOperator) and given.num_components == 1

    def __call__(self, t: Array) -> BlockLinearOperator:
        """$A_t$, in the dtype of the time."""
        given = self.coefficient
        given = given if isinstance(given, BlockLinearOperator) else given(t)
        operator = _as_operator(given)
        if self.num_components > operator.num_components == 1:
            spectrum = operator.blocks.ndim - 2
            eye = jnp.eye(self.num_components, dtype=operator.blocks.dtype)
            blocks = operator.blocks * eye.reshape(eye.shape + (1,) * spectrum)
            operator = BlockLinearOperator(blocks, operator.shape)
        return operator.astype(t.dtype)


class Semilinear(AbstractODE):
    r"""A semilinear ordinary differential equation, as a Diffrax term:

    $$\frac{\mathrm{d}u}{\mathrm{d}t} = A_t\,u + N(t, u).$$

    It works with every solver, adjoint and step size controller of Diffrax.
    [`gddim_eqx.ExponentialAdams`][] also exploits the linear part, which may be stiff.

    States are arrays, or a [`gddim_eqx.Phase`][] or tuple of arrays of equal shape, with
    any leading batch axes. They are real; for a complex equation use a `Phase` of real and
    imaginary parts, whose blocks are $2 \times 2$.

    !!! example

        The Allen-Cahn equation on a periodic interval, in a Fourier basis:

        ```python
        import diffrax as dfx
        import gddim_eqx as gd
        import jax.numpy as jnp

        x = 2 * jnp.pi * jnp.arange(128) / 128
        basis = gd.FourierBasis()
        term = gd.Semilinear(
            1 - 0.01 * basis.frequencies(128) ** 2,
            lambda t, u, args: -(u**3),
            basis=basis,
        )
        sol = dfx.diffeqsolve(
            term,
            gd.ExponentialAdams(),
            t0=0.0,
            t1=10.0,
            dt0=0.1,
            y0=basis.forward(0.5 * jnp.sin(x) + 0.1 * jnp.cos(5 * x)),
        )
        u = basis.inverse(sol.ys)
        ```
    """

    linear: BlockLinearOperator | Callable[[Array], Any]
    nonlinear: Callable[[Any, Any, Any], State]
    basis: AbstractBasis
    raises: ClassVar[bool] = True

    def __init__(
        self,
        linear: Any,
        nonlinear: Callable[[Any, Any, Any], State],
        *,
        basis: AbstractBasis | None = None,
    ):
        r"""**Arguments:**

        - `linear`: $A$, in the basis of states: a scalar; an array of the shape of one
            sample, for a diagonal operator; or a [`gddim_eqx.BlockLinearOperator`][]. For
            $A_t$, a function from a scalar time to one of these. Scalar and diagonal
            operators act on every leaf of the state in the same way.
        - `nonlinear`: $N$, called as `nonlinear(t, u, args)`; returns a state with the
            structure and shape of `u`.
        - `basis`: the basis in which states are stored and $A$ is given, for example
            [`gddim_eqx.FourierBasis`][]. `nonlinear` receives and returns states in the
            original coordinates. By default states are stored in those, too.

        **Raises:** `ValueError` for invalid arguments. When evaluated: `ValueError` if the
        state does not match `linear`, or `nonlinear` returns another structure or shape.
        """
        wanted = "callable as `nonlinear(t, u, args)`"
        check_instance("nonlinear", nonlinear, Callable, wanted)
        self.basis = IdentityBasis() if basis is None else basis
        check_instance("basis", self.basis, AbstractBasis, "such as `FourierBasis()`")
        given = isinstance(linear, BlockLinearOperator) or not callable(linear)
        self.linear = _as_operator(linear) if given else linear
        self.nonlinear = nonlinear

    def linear_part(self, y: State) -> LinearPart:
        """The linear part, for states with the structure of `y`."""
        operator = self.linear
        if not isinstance(operator, BlockLinearOperator):
            time, at = jax.ShapeDtypeStruct((), coefficient_dtype(y)), operator
            operator = eqx.filter_eval_shape(lambda t: _as_operator(at(t)), time)
        leaves = jtu.tree_leaves(y)
        n = operator.num_components
        return LinearPart(self.linear, operator.shape, len(leaves) if n == 1 else n)

    def force(self, t: RealScalarLike, y: State, args: Args) -> State:
        """$N(t, u)$ in the basis of states."""
        u = jtu.tree_map(self.basis.inverse, y)
        value = self.nonlinear(t, u, args)
        value = as_state_like(u, value, "`nonlinear`")
        return jtu.tree_map(self.basis.forward, value)

    def vf(self, t: RealScalarLike, y: State, args: Args) -> State:
        part = self.linear_part(y)
        y = check_state(y, part.num_components, part.shape, "The state")
        operator = part(jnp.asarray(t, coefficient_dtype(y)))
        return add(apply(operator, y), self.force(t, y, args))


def _as_operator(linear: Any) -> BlockLinearOperator:
    if not isinstance(linear, BlockLinearOperator):
        values = as_floats("linear", linear)
        linear = BlockLinearOperator(values[None, None], values.shape)
    check_real(linear.blocks.dtype, "`linear`")
    return linear
