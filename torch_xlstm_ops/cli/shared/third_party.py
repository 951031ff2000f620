"""Hide messages of other packages that a user of the command line can do nothing about.

Each is named by its text, and hidden only while a command runs a model: the library, and scripts that `run` starts,
see every warning.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Torch advises to round float32 products to TF32 wherever a GPU can; the command's results must not depend on the GPU.
_ADVICE = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled"
# transformers' xLSTM imports the package xlstm where it is installed, which imports torch's builder of CUDA extensions;
# that logs this on a machine without a GPU. Nothing is built.
_BUILDER, _NO_CUDA = "torch.utils.cpp_extension", "No CUDA runtime is found"


@contextmanager
def hidden() -> Iterator[None]:
    """Hide them in a ``with`` block."""
    builder = logging.getLogger(_BUILDER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ADVICE, UserWarning)
        builder.addFilter(_wanted)
        try:
            yield
        finally:
            builder.removeFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_CUDA)
