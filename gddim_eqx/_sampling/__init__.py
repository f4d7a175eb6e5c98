from .fit_solver import fit_solver as fit_solver, FittedSolver as FittedSolver
from .grid import time_grid as time_grid
from .inversion import generate as generate, Inversion as Inversion, invert as invert
from .likelihood import (
    Likelihood as Likelihood,
    log_density as log_density,
    log_likelihood as log_likelihood,
    log_likelihood_bound as log_likelihood_bound,
)
from .process_from_config import (
    ModelConventions as ModelConventions,
    process_from_config as process_from_config,
)
from .sample import sample as sample, Samples as Samples
from .start import GaussianStart as GaussianStart
