from . import presets as presets
from ._classifier import ImageClassifier as ImageClassifier
from ._dit import DiT as DiT
from ._edm_preconditioned import EDMPreconditioned as EDMPreconditioned
from ._mlp import TimeMLP as TimeMLP
from ._ncsnpp import NCSNpp as NCSNpp
from ._network_model import NetworkModel as NetworkModel
