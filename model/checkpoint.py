"""Where weights come from: safetensors files of a checkpoint directory, or seeded noise of the same shapes. Both hand
out owned tensors by name and single experts without their neighbours. Knows nothing of layers, devices or what a tensor
is used for; names are exactly those in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .checkpoint_error import CheckpointError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Pages of a mapping count as resident memory until it is closed, so a tensor is copied in pieces of this size, each
# from a mapping of its own: peak memory is what the caller keeps plus one piece.
_PIECE_BYTES = 16 << 20
_LISTED = 12


class WeightSource(Protocol):
    """Named tensors. Every method raises `CheckpointError` for an unknown name or unreadable data."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, owned by the caller."""
        ...

    def expert(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of dimension 0, owned by the caller, read without its neighbours."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsSource:
    """The safetensors files of `directory`: `model.safetensors`, else the shards that `model.safetensors.index.json`
    names, else every `*.safetensors` there.

    Opening reads the headers only. No file stays mapped between calls, and calls may come from any thread.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        single = self._directory / "model.safetensors"
        index = self._directory / "model.safetensors.index.json"
        if single.is_file():
            self._entries = _scan([single])
        elif index.is_file():
            self._entries = _scan_index(index)
        else:
            files = sorted(self._directory.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{self._directory} holds no *.safetensors file")
            self._entries = _scan(files)

    def __str__(self) -> str:
        return str(self._directory)

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{entry.file}: tensor {name} has dtype {entry.dtype}, which is not supported")
        return _DTYPES[entry.dtype]

    def tensor(self, name: str) -> torch.Tensor:
        return self._read(name, None)

    def expert(self, name: str, index: int) -> torch.Tensor:
        _check_index(name, self.shape(name), index)
        return self._read(name, index)

    def close(self) -> None:
        """Forget the headers; nothing else is held."""
        self._entries = {}

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self._directory} holds no tensor {name}") from None

    def _read(self, name: str, index: int | None) -> torch.Tensor:
        entry = self._entry(name)
        out = torch.empty(entry.shape if index is None else entry.shape[1:], dtype=self.dtype(name))
        try:
            if out.dim() == 0:
                with safe_open(entry.file, "pt") as file:
                    whole = file.get_tensor(name)
                    return out.copy_(whole if index is None else whole[index])
            row_bytes = max(1, out.nbytes // max(1, len(out)))
            rows = max(1, _PIECE_BYTES // row_bytes)
            for start in range(0, len(out), rows):
                piece = slice(start, min(start + rows, len(out)))
                with safe_open(entry.file, "pt") as file:
                    view = file.get_slice(name)
                    out[piece].copy_(view[piece] if index is None else view[index, piece])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: cannot read tensor {name}: {error}") from error
        return out


def _scan(files: Iterable[Path]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for path in files:
        for name, entry in _read_header(path).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} is both in {entries[name].file} and in {path}")
            entries[name] = entry
    return entries


def _scan_index(index: Path) -> dict[str, _Entry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {type(error).__name__}: {error}") from error
    absent = sorted({shard for shard in shards.values() if not (index.parent / shard).is_file()})
    if absent:
        raise CheckpointError(f"{index} names files that are not there: {bounded_list(absent)}")
    headers = {shard: _read_header(index.parent / shard) for shard in sorted(set(shards.values()))}
    lost = [f"{name} ({shard})" for name, shard in shards.items() if name not in headers[shard]]
    if lost:
        raise CheckpointError(f"{index} names tensors that their files do not hold: {bounded_list(lost)}")
    return {name: headers[shard][name] for name, shard in shards.items()}


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: _Entry(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


class DummySource:
    """Seeded random weights in place of a checkpoint, for sizing and load tests.

    A value depends on (seed, name, expert index) and its place alone: not on reading order, machine or library version.
    Matrices [out, in] and stacked experts [E, in, out] have standard deviation in ** -0.5, embeddings 0.02; norm
    weights are one, biases zero. The untied `lm_head` is doubled, so that logits are not flat.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._dtype = dtype

    def __str__(self) -> str:
        return f"dummy weights of seed {self._seed}"

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"{self} hold no tensor {name}") from None

    def dtype(self, name: str) -> torch.dtype:
        self.shape(name)
        return self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        out = torch.empty(shape, dtype=self._dtype)
        std = _standard_deviation(name, shape)
        if std is None:
            return out.fill_(0.0 if name.endswith("bias") else 1.0)
        if len(shape) == 3:
            for index, part in enumerate(out):
                self._fill_(part, f"{name}[{index}]", std)
        else:
            self._fill_(out, name, std)
        return out

    def expert(self, name: str, index: int) -> torch.Tensor:
        shape = self.shape(name)
        _check_index(name, shape, index)
        std = _standard_deviation(name, shape)
        if len(shape) != 3 or std is None:
            return self.tensor(name)[index].clone()
        out = torch.empty(shape[1:], dtype=self._dtype)
        self._fill_(out, f"{name}[{index}]", std)
        return out

    def close(self) -> None:
        """Nothing is held."""

    def _fill_(self, out: torch.Tensor, key: str, std: float) -> None:
        """Fill contiguous `out` with a bell of standard deviation `std`: each value is the sum of four random bytes.

        Only integer sums and one product, over a raw bit stream that numpy promises to keep: equal bits everywhere.
        """
        digest = hashlib.blake2b(f"{self._seed}:{key}".encode(), digest_size=16).digest()
        stream = np.random.SFC64(int.from_bytes(digest, "little"))
        scale = np.float32(std / math.sqrt(4 * (256**2 - 1) / 12))
        flat = out.view(-1)
        for start in range(0, flat.numel(), 1 << 18):
            part = flat[start : start + (1 << 18)]
            words = stream.random_raw((part.numel() + 1) // 2).view(np.uint32)[: part.numel()]
            pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
            sums = ((pairs & 0xFFFF) + (pairs >> 16)).view(np.int32) - 510
            part.copy_(torch.from_numpy(sums.astype(np.float32) * scale))


def _standard_deviation(name: str, shape: tuple[int, ...]) -> float | None:
    """None stands for a constant: a norm's weight or a bias."""
    if re.search(r"(embed_tokens\.weight|class_embedding|positional_embedding_vlm)$", name):
        return 0.02
    if len(shape) < 2:
        return None
    std = max(1, shape[1]) ** -0.5
    return 2 * std if name.endswith("lm_head.weight") else std


def _check_index(name: str, shape: tuple[int, ...], index: int) -> None:
    if not shape or not 0 <= index < shape[0]:
        raise CheckpointError(f"tensor {name} of shape {list(shape)} has no slice {index}")


def check_tensors(
    source: WeightSource,
    expected: Mapping[str, tuple[int, ...]],
    ignore: Callable[[str], bool] = lambda name: False,
    dtypes: Mapping[str, Collection[torch.dtype]] | None = None,
) -> None:
    """Raise one `CheckpointError` that names every missing, surplus, misshapen and mistyped tensor of `source`.

    `expected` maps names to shapes, `dtypes` to what they may be. Surplus tensors for which `ignore(name)` is true are
    no fault. Long lists are cut.
    """
    present = source.names()
    missing = [name for name in expected if name not in present]
    surplus = [name for name in present if name not in expected and not ignore(name)]
    misshapen = [
        f"{name} is {list(source.shape(name))}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in present and source.shape(name) != tuple(shape)
    ]
    mistyped = [
        f"{name} is {_short(source.dtype(name))}, must be {' or '.join(map(_short, allowed))}"
        for name, allowed in (dtypes or {}).items()
        if name in present and source.dtype(name) not in allowed
    ]
    faults = (("missing", missing), ("surplus", surplus), ("misshapen", misshapen), ("of another dtype", mistyped))
    parts = [f"{len(items)} {kind}: {bounded_list(items)}" for kind, items in faults if items]
    if parts:
        raise CheckpointError(f"the tensors of {source} do not fit the model. " + ". ".join(parts))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bounded_list(items: list[str]) -> str:
    """The first dozen of `items`, joined, and how many more there are."""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
