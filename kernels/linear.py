"""y = x W^T with the weight laid out once for its device: packed for this package's own products on CPU, where a row's
bits do not depend on the rows beside it; for Triton on CUDA; plain elsewhere. Knows nothing of what the weight is."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from .cpu_gemm import multiply
from .cpu_gemm_pack import CpuWeight
from .precision import widened
from .quantized import QuantizedWeight


def linear_ref(x_TI: Tensor, weight_OI: Tensor | QuantizedWeight) -> Tensor:
    """[T, I] x [O, I] -> [T, O] of x's dtype."""
    if isinstance(weight_OI, QuantizedWeight):
        wide = widened(x_TI)
        return functional.linear(wide, weight_OI.dequantize().to(wide.dtype)).to(x_TI.dtype)
    return functional.linear(x_TI, weight_OI)


class Linear:
    """A bias-free linear map. Build it with the [out, in] weight, call it with [T, in] rows of bfloat16 or float32: of
    the weight's own type if it has one, of either where the weight is quantised."""

    __slots__ = ("_plain_OI", "exact", "in_features", "kind", "on_gpu", "out_features", "packed")

    def __init__(self, weight_OI: Tensor | QuantizedWeight, exact: bool = True) -> None:
        """`exact`: a row's bits do not depend on the rows beside it; always so on CPU."""
        self.out_features, self.in_features = weight_OI.shape
        self.exact = exact
        quantised = isinstance(weight_OI, QuantizedWeight)
        self.kind: str = weight_OI.kind if quantised else str(weight_OI.dtype).removeprefix("torch.")
        """How the weight's numbers are kept, such as int4 or bfloat16."""
        self.packed: CpuWeight | None = None
        """The weight as CPU products read it; None on other devices and for types that they do not know."""
        self.on_gpu: Any = None
        """The `TritonLinear` that computes it on a GPU; None elsewhere."""
        self._plain_OI: Tensor | None = None
        if weight_OI.device.type == "cuda":
            self.on_gpu = importlib.import_module(".triton_linear", __package__).TritonLinear(weight_OI, exact)
        elif weight_OI.device.type == "cpu" and (quantised or weight_OI.dtype in (torch.bfloat16, torch.float32)):
            self.packed = CpuWeight(weight_OI)
        else:
            self._plain_OI = weight_OI.dequantize() if isinstance(weight_OI, QuantizedWeight) else weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, in] -> [T, out] of x's dtype."""
        if self.packed is not None:
            out_TO = x_TI.new_empty((x_TI.shape[0], self.out_features))
            multiply(self.packed.prepared(x_TI.dtype), rows_for(self.packed, x_TI), out_TO)
            return out_TO
        if self.on_gpu is not None:
            return self.on_gpu(x_TI)
        assert self._plain_OI is not None
        return functional.linear(x_TI, self._plain_OI.to(x_TI.dtype))


def rows_for(packed: CpuWeight, x_TI: Tensor) -> Tensor:
    """x, contiguous and as wide as the packed weight wants it."""
    missing = packed.x_stride - x_TI.shape[1]
    return functional.pad(x_TI, (0, missing)) if missing else x_TI.contiguous()
