# The only file that touches Diffrax's private names.
import diffrax as dfx
from diffrax._term import WrapTerm

from .._custom_types import RealScalarLike


def unwrap(term: dfx.AbstractTerm) -> tuple[dfx.AbstractTerm, RealScalarLike]:
    """Strip what `diffeqsolve` wraps around a term to make time increase.

    **Returns:** the term as the user wrote it, and the direction, 1 or -1, by which the
    times that a solver sees must be multiplied to be the user's times.
    """
    direction = 1
    while isinstance(term, WrapTerm):
        direction = direction * term.direction
        term = term.term
    return term, direction
