"""Takes the integers of a step to the device that computes it. Knows arrays, not what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes at whose multiples each array begins: what vector loads want."""

_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}

Array = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """One tensor for each contiguous array. On the CPU they share the arrays' memory. For another device all of them
    travel in one copy from pinned memory, which nobody waits for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    staging = Staging(arrays, device)
    staging.write(arrays)
    return staging.tensors


class Staging:
    """Room for arrays of the given shapes and types, in one buffer here and in one on the device."""

    def __init__(self, arrays: Sequence[Array], device: torch.device) -> None:
        offsets = [0]
        for array in arrays:
            offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
        self._offsets = offsets[:-1]
        # A pinned buffer that is let go is not handed on before the copies from it have run.
        self._here = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.tensors = [
            self._there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for array, start in zip(arrays, self._offsets, strict=True)
        ]
        """One for each array; they stay where they are."""

    def write(self, arrays: Sequence[Array]) -> None:
        """Fill the tensors, in the order of the device's current stream. Waits only for the copy before this one."""
        if self._copied is not None:
            self._copied.synchronize()
        flat = self._here.numpy()
        for array, start in zip(arrays, self._offsets, strict=True):
            flat[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
