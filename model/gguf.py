"""Reads a GGUF file (versions 2 and 3): metadata and tensors, dequantised to float32. Covers the four tensor types that
`pocket`'s base uses. Knows nothing of the model inside.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint_error import CheckpointError

_TYPE_STRING, _TYPE_ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufError(CheckpointError):
    """A GGUF file that is damaged or uses something this reader does not know."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch's order (the file has the fastest dimension first)."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    """Bytes from the start of the file."""


class GgufFile:
    """Header of the file at `path`, read at once; tensors are read on demand."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._size = len(data)
                self.metadata, self.tensors = _read_header(_Cursor(data))
        except (struct.error, ValueError, OverflowError) as error:
            raise GgufError(f"{self.path} is not a readable GGUF file: {error}") from error
        except OSError as error:
            raise GgufError(f"{self.path} cannot be read: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in float32, owned by the caller. Raises `GgufError`."""
        if name not in self.tensors:
            raise GgufError(f"{self.path} holds no tensor {name}")
        tensor = self.tensors[name]
        if tensor.kind not in _CODECS:
            raise GgufError(f"{self.path}: tensor {name} has type {tensor.kind}, which is not supported")
        block_values, block_bytes, decode = _CODECS[tensor.kind]
        blocks, rest = divmod(math.prod(tensor.shape), block_values)
        length = blocks * block_bytes
        if rest or tensor.offset + length > self._size:
            raise GgufError(f"{self.path}: the data of tensor {name} is incomplete")
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = np.frombuffer(file.read(length), np.uint8).reshape(blocks, block_bytes)
        return torch.from_numpy(decode(raw).reshape(tensor.shape))


class _Cursor:
    """Little-endian reads that move forward; running off the end raises ValueError or struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def raw(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise ValueError("it ends in the middle of its header")
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def text(self) -> str:
        return self.raw(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TYPE_STRING:
            return self.text()
        if kind == _TYPE_ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _SCALARS:
                code = "<" + _SCALARS[item]
                return np.frombuffer(self.raw(count * struct.calcsize(code)), np.dtype(code)).tolist()
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        return self.number(_SCALARS[kind])


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if cursor.raw(4) != b"GGUF":
        raise ValueError("it does not start with the letters GGUF")
    version, num_tensors, num_values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not supported")
    metadata = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    relative = {}
    for _ in range(num_tensors):
        name = cursor.text()
        fastest_first = [cursor.number("Q") for _ in range(cursor.number("I"))]
        relative[name] = GgufTensor(tuple(reversed(fastest_first)), cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return metadata, {name: GgufTensor(t.shape, t.kind, start + t.offset) for name, t in relative.items()}


def _decode_f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4").astype(np.float32)


def _decode_f16(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f2").astype(np.float32)


def _decode_q8_0(raw: np.ndarray) -> np.ndarray:
    scale = raw[:, :2].view("<f2").astype(np.float32)
    return raw[:, 2:].view(np.int8) * scale


def _decode_q4_1(raw: np.ndarray) -> np.ndarray:
    """A block is scale, minimum, then 16 bytes: low nibbles are values 0-15, high nibbles values 16-31."""
    scale_and_minimum = raw[:, :4].copy().view("<f2").astype(np.float32)
    nibbles = np.hstack((raw[:, 4:] & 0x0F, raw[:, 4:] >> 4))
    return nibbles * scale_and_minimum[:, :1] + scale_and_minimum[:, 1:]


# type -> values in a block, bytes of a block, decoder of [blocks, bytes]
_CODECS = {
    0: (1, 4, _decode_f32),
    1: (1, 2, _decode_f16),
    3: (32, 20, _decode_q4_1),
    8: (32, 34, _decode_q8_0),
}
