"""Writes one safetensors file tensor by tensor, so that a conversion never holds the whole model. Owns the file layout
(8-byte length, JSON header, data); knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}


class SafetensorsWriter:
    """Context manager over `path`. All shapes are announced first; then each tensor is written once, in that order."""

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | Mapping[str, torch.dtype]
    ) -> None:
        """`dtype`: of all tensors, or of each by name."""
        self._shapes = dict(shapes)
        self._dtypes = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
        self._todo = list(shapes)[::-1]
        self._file = path.open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self._shapes.items():
            start, end = end, end + math.prod(shape) * self._dtypes[name].itemsize
            header[name] = {"dtype": _NAMES[self._dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # The data must start at a multiple of eight; the format allows spaces after the header for that.
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append `tensor`, cast to the announced dtype. Raises ValueError if it is not the next one announced."""
        if not self._todo or self._todo.pop() != name or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"{name} of shape {list(tensor.shape)} is not the next tensor of the file")
        data = tensor.detach().to("cpu", self._dtypes[name]).contiguous().reshape(-1)
        self._file.write(data.view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._todo:
            raise ValueError(f"{len(self._todo)} announced tensors were not written, {self._todo[-1]} the first")
