"""Matrix products within what MPS computes correctly.

On M1 and M2 a product over 32,767 terms or more is silently wrong (pytorch#195163), and on macOS 14 so is one that is
written into a slice or a strided view (pytorch#193385). On MPS long sums are therefore split, and results have memory
of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TERMS = 32766
_MULTIPLE = 64  # a part begins at a multiple of it


def sum_over_terms(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of batches, (N, I, K) and (N, K, J), where K may be long."""
    K = left.shape[-1]
    if left.device.type != "mps" or not isinstance(K, int) or K <= MOST_TERMS:
        return torch.bmm(left, right)
    step = _part(K)
    parts = [torch.bmm(left[..., start:start + step], right[:, start:start + step]) for start in range(0, K, step)]
    wide = torch.float32 if left.dtype in (torch.float16, torch.bfloat16) else left.dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(left.dtype)


def columns(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of batches, computed so that autograd's gradient of `left` is no sum over many terms."""
    J = right.shape[-1]
    if left.device.type != "mps" or not isinstance(J, int) or J <= MOST_TERMS:
        return torch.bmm(left, right)
    return torch.cat([torch.bmm(left, part) for part in torch.split(right, _part(J), -1)], -1)


def accepts_product(out: Tensor) -> bool:
    """Return whether a product may be written into `out`."""
    return out.device.type != "mps" or (out.storage_offset() == 0 and out.is_contiguous())


def _part(length: int) -> int:
    """Return the length of the parts of a long axis: as few as possible, nearly equal."""
    count = -(-length // (MOST_TERMS // _MULTIPLE * _MULTIPLE))
    return -(-length // (count * _MULTIPLE)) * _MULTIPLE
