"""Drop-ins: run the xLSTM models of other packages on our operators, and undo it.

    handle = patch("transformers")      # or patch(): every supported package that is installed
    print(*handle.report(), sep="\\n")
    ...
    handle.remove()                     # or: with patch("transformers"): ...

    handle = patch(model)               # the layers of this model only

A drop-in replaces attributes of classes, not of instances: models built before and after are patched, pickles and deep
copies contain nothing of this package, and removal restores the originals. For one model, its layers are marked with
the token of the handle, a string that the patched methods look for. A copy of a layer has the mark too, and is patched
as long as the model is; in another process, and after removal, the mark has no effect. Dynamo inlines the old methods
without a guard, so patching and removing reset `torch.compiler`.

Where a package differs from the recurrence, our operators follow the recurrence; `compat=True` repeats the package's
results instead.
`upstream.PACKAGES` is the table of packages; each has one module in `upstream/` with ``replacements(compat)``.
"""

from torch_xlstm_ops.patch.checkpoints import convert_slstm_state_dict
from torch_xlstm_ops.patch.handle import Handle, patch
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import PACKAGES, Upstream

__all__ = ["PACKAGES", "Handle", "Replacement", "Upstream", "convert_slstm_state_dict", "patch"]
