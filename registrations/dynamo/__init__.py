"""The `torch.compile` backend ``xlstm``: `rules` recognises peers' functions, `splice` puts operators in a graph."""

from . import backend as backend
from . import rules as rules
from . import splice as splice
from .backend import xlstm as xlstm
