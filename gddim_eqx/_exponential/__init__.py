from .coordinate import (
    progress as progress,
    scaled as scaled,
    Variable as Variable,
    VARIABLES as VARIABLES,
)
from .moments import moments as moments
from .quadrature import (
    NODES as NODES,
    step_quadrature as step_quadrature,
    times_at as times_at,
    WEIGHTS as WEIGHTS,
)
from .reverse_transition import (
    contraction as contraction,
    reverse_transition as reverse_transition,
)
from .splitting import Splitting as Splitting
