"""The `torch.compile` backend ``xlstm``: `substitution` replaces functions of other packages by our operators."""

from . import backend as backend
from . import rules as rules
from . import splice as splice
from . import substitution as substitution
from .backend import xlstm as xlstm
