"""y = x W^T with the weight laid out once for the device: packed by oneDNN on CPU, so that a row's bits do not depend
on how many rows are beside it (and bfloat16 takes half the time of plain `linear` for few rows), plain elsewhere. Knows
nothing of what the weight is."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

_LONG_SUM = 1024
"""oneDNN splits the sums of a single row differently, in bfloat16 only longer ones, which would give it other bits than
the same row has in company; two rows and more agree."""
_EXACT_ROWS = 8
_FINE_ROWS = 64
"""oneDNN compiles its product anew for every number of rows (about 0.5 ms and 0.7 MiB each, for one weight shape of
1,536 x 576) and keeps 1,024 of them; so numbers of rows above `_EXACT_ROWS` are rounded up to multiples of 8, above
`_FINE_ROWS` of 32, and zeros fill the rest."""


def linear_ref(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """[T, I] x [O, I] -> [T, O]."""
    return functional.linear(x_TI, weight_OI)


class Linear:
    """A bias-free linear map. Build it with the [out, in] weight, call it with [T, in] rows."""

    __slots__ = ("_fewest_rows", "_packed", "_weight_OI", "in_features", "out_features")

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._packed = None
        self._weight_OI: Tensor | None = weight_OI
        self._fewest_rows = 1
        if _can_pack(weight_OI):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 1)
            self._weight_OI = None
            alone_differs = weight_OI.dtype is torch.float32 or self.in_features > _LONG_SUM
            self._fewest_rows = 2 if alone_differs else 1

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, in] -> [T, out] of x's dtype."""
        if self._packed is not None:
            rows = x_TI.shape[0]
            padding = max(padded_rows(rows), self._fewest_rows) - rows
            if padding:
                return self(functional.pad(x_TI, (0, 0, 0, padding)))[:rows]
            return torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, None, "none", [], "")
        assert self._weight_OI is not None
        return functional.linear(x_TI, self._weight_OI)


def padded_rows(rows: int) -> int:
    """The number of rows that a packed product of `rows` rows is computed with."""
    if rows <= _EXACT_ROWS:
        return rows
    step = 8 if rows <= _FINE_ROWS else 32
    return -(-rows // step) * step


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32
