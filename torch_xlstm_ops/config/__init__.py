"""The configuration: a frozen `Config`, where each of its values came from, and the table of settings.

Precedence, highest first:

    call argument > `config.use` > command-line flag > environment > TOML file > tuned > default

The environment, and the TOML file that ``XLSTM_OPS_CONFIG`` names, are read once, at the first use; `reload` reads
them again. An unknown name or a value that cannot be used is an error that says where it was given.
"""

from torch_xlstm_ops.config.active import cuda_graphs, current, for_call, on_load, reload, slstm_schedule, sources, use
from torch_xlstm_ops.config.layers import FILE_VARIABLE, PATCH_VARIABLE, Source
from torch_xlstm_ops.config.settings import (
    FRACTION,
    PREFIX,
    SETTINGS,
    WHOLE,
    Config,
    Kind,
    Schedule,
    Setting,
    SLSTMSchedule,
    Tune,
    add_flags,
    check,
    given_flags,
    markdown,
)

__all__ = [
    "FILE_VARIABLE",
    "FRACTION",
    "PATCH_VARIABLE",
    "PREFIX",
    "SETTINGS",
    "WHOLE",
    "Config",
    "Kind",
    "SLSTMSchedule",
    "Schedule",
    "Setting",
    "Source",
    "Tune",
    "add_flags",
    "check",
    "cuda_graphs",
    "current",
    "for_call",
    "given_flags",
    "markdown",
    "on_load",
    "reload",
    "slstm_schedule",
    "sources",
    "use",
]
