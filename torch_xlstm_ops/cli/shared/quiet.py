"""Hide messages of other packages that a user of the command line cannot act on.

Each is identified by its text, and hidden only while a command runs a model: the library, and scripts that `run`
starts, show every warning.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torch advises TF32 products on GPUs that have them; the command's results must not depend on the GPU.
_ADVICE = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled"
# transformers' xLSTM imports the package xlstm if it is installed, and that imports torch's builder of CUDA extensions,
# which logs this on a machine without a GPU. Nothing is built.
_BUILDER, _NO_CUDA = "torch.utils.cpp_extension", "No CUDA runtime is found"


@contextmanager
def third_party_messages_hidden() -> Iterator[None]:
    """Hide the messages inside a ``with`` block."""
    builder = logging.getLogger(_BUILDER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ADVICE, UserWarning)
        builder.addFilter(_is_shown)
        try:
            yield
        finally:
            builder.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_CUDA)
