"""All calls of ops in the tests of the emulated device."""

from . import mlstm_operations, slstm_operations

OPERATIONS: dict[str, mlstm_operations.MLSTM | slstm_operations.SLSTM] = {
    **mlstm_operations.OPERATIONS, **slstm_operations.OPERATIONS,
}
