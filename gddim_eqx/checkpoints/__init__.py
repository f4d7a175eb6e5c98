from ._authors import load_authors as load_authors
from ._file import load as load, metadata as metadata, save as save
from ._pretrained import (
    pretrained as pretrained,
    pretrained_data as pretrained_data,
    pretrained_solver as pretrained_solver,
)
