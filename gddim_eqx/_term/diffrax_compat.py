# The only file that uses Diffrax's private names.
import diffrax as dfx
from diffrax._term import WrapTerm

from .._custom_types import RealScalarLike


def unwrap(term: dfx.AbstractTerm) -> tuple[dfx.AbstractTerm, RealScalarLike]:
    """Strip the wrapper that `diffeqsolve` puts around a term to make time increase.

    **Returns:** the user's term, and the direction, 1 or -1, that maps the solver's times
    to the user's when multiplied by it.
    """
    direction = 1
    while isinstance(term, WrapTerm):
        direction = direction * term.direction
        term = term.term
    return term, direction
