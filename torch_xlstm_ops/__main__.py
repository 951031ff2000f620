"""Run the command line as ``python -m torch_xlstm_ops``."""

import sys

from torch_xlstm_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
