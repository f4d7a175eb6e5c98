"""What functions return."""

from ._sampling import (
    FittedSolver as FittedSolver,
    Inversion as Inversion,
    Likelihood as Likelihood,
    ModelConventions as ModelConventions,
    Samples as Samples,
)
