"""The reader against files built here byte by byte, and against a scalar decoder written from the format's text."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.model.checkpoint_error import CheckpointError
from herd.model.gguf import GgufError, GgufFile

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
BLOCK_BYTES = {0: 4, 1: 2, 3: 20, 8: 34}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def gguf_bytes(
    values: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, bytes]], version: int = 3, align: int = 32
) -> bytes:
    """`tensors` are (name, shape in torch's order, type, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(values)
    data = b""
    for name, shape, kind, raw in tensors:
        data += bytes(-len(data) % align)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + bytes(-len(head) % align) + data


def half(raw: bytes) -> np.float32:
    return np.float32(np.frombuffer(raw, np.float16)[0])


def decode(kind: int, raw: bytes) -> list[np.float32]:
    """One block, value by value."""
    if kind == 0:
        return [np.float32(struct.unpack("<f", raw)[0])]
    if kind == 1:
        return [half(raw)]
    if kind == 8:
        return [half(raw[:2]) * np.float32(struct.unpack_from("b", raw, 2 + i)[0]) for i in range(32)]
    scale, minimum = half(raw[:2]), half(raw[2:4])
    codes = [raw[4 + i] % 16 for i in range(16)] + [raw[4 + i] // 16 for i in range(16)]
    return [scale * np.float32(code) + minimum for code in codes]


@given(st.data(), st.sampled_from([0, 1, 3, 8]))
def test_every_type_equals_the_scalar_decoder(tmp_path_factory: Any, data: st.DataObject, kind: int) -> None:
    finite = st.floats(-100, 100, width=16)
    rows = data.draw(st.integers(1, 3))
    blocks = []
    for _ in range(rows * 2):
        body = data.draw(st.binary(min_size=BLOCK_BYTES[kind], max_size=BLOCK_BYTES[kind]))
        if kind == 0:
            body = struct.pack("<f", data.draw(st.floats(-100, 100, width=32)))
        elif kind == 3:
            body = struct.pack("<ee", data.draw(finite), data.draw(finite)) + body[4:]
        else:
            body = struct.pack("<e", data.draw(finite)) + body[2:]
        blocks.append(body)
    wanted = [value for block in blocks for value in decode(kind, block)]
    shape = (rows, len(wanted) // rows)
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    filler = ("other", (3,), 0, bytes(12))
    path.write_bytes(gguf_bytes([], [filler, ("t", shape, kind, b"".join(blocks))]))
    got = GgufFile(path).read("t")
    assert got.dtype == torch.float32
    assert tuple(got.shape) == shape
    assert got.flatten().numpy().tobytes() == np.array(wanted, np.float32).tobytes()


METADATA = [
    entry("a.name", STRING, text("Größe")),
    entry("general.alignment", U32, struct.pack("<I", 64)),
    entry("a.flag", BOOL, b"\x01"),
    entry("a.list", ARRAY, struct.pack("<IQ", F32, 2) + struct.pack("<ff", 1.5, -2)),
    entry("a.words", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("")),
]


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_alignment(tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.gguf"
    one = struct.pack("<f", 4.25)
    path.write_bytes(gguf_bytes(METADATA, [("t", (1,), 0, one), ("u", (1,), 0, one)], version, align=64))
    file = GgufFile(path)
    assert file.metadata == {
        "a.name": "Größe",
        "general.alignment": 64,
        "a.flag": True,
        "a.list": [1.5, -2.0],
        "a.words": ["x", ""],
    }
    assert file.read("u").tolist() == [4.25]


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = gguf_bytes(METADATA, [("t", (2, 32), 8, bytes(68))], align=64)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"a\.gguf"):
            GgufFile(path).read("t")
    path.write_bytes(whole)
    assert GgufFile(path).read("t").shape == (2, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "letters GGUF"),
        (gguf_bytes([], [], version=1), "version 1 is not supported"),
        (gguf_bytes([entry("a", 77, b"")], []), "unknown type 77"),
        (gguf_bytes([entry("general.alignment", U32, bytes(4))], []), "general.alignment is 0"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        GgufFile(path)


def test_unknown_tensors_and_types(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([], [("t", (256,), 12, bytes(144)), ("odd", (33,), 8, bytes(68))]))
    with pytest.raises(GgufError, match="tensor t has type 12"):
        GgufFile(path).read("t")
    with pytest.raises(GgufError, match="tensor odd is incomplete"):
        GgufFile(path).read("odd")
    with pytest.raises(GgufError, match="no tensor x"):
        GgufFile(path).read("x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "absent.gguf")
