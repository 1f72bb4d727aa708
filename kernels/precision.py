"""How wide the references compute. Knows nothing of operations."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is float64: a reference run in float64 is the truth that tolerances come
    from."""
    return x if x.dtype is torch.float64 else x.float()
