from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from herd.model.checkpoint_error import CheckpointError
from herd.model.fingerprint import fingerprint
from herd.model.source import ModelSource, resolve_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files that need not be weights: a fingerprint does not look inside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", "hidden_size": 8}))
    (folder / "a.safetensors").write_bytes(bytes(100))
    (folder / "b.safetensors").write_bytes(os.urandom(300_000))
    return folder


def named(folder: Path, dtype: str = "bfloat16", seed: int = 0) -> str:
    return fingerprint(resolve_model(str(folder), cache_dir=None), dtype, seed)


def test_a_copy_has_the_same_name(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, copy)
    os.utime(copy / "a.safetensors", (1, 1))
    assert named(copy) == named(checkpoint)


def edit_shape(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", "hidden_size": 16}))


def edit_file(folder: Path) -> None:
    """Another fine-tune: sizes stay, values change throughout."""
    path = folder / "b.safetensors"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def lengthen(folder: Path) -> None:
    with (folder / "a.safetensors").open("ab") as file:
        file.write(b"\0")


def add_file(folder: Path) -> None:
    (folder / "c.safetensors").touch()


def rename(folder: Path) -> None:
    (folder / "a.safetensors").rename(folder / "z.safetensors")


@pytest.mark.parametrize("change", [edit_shape, edit_file, lengthen, add_file, rename])
def test_other_weights_have_another_name(checkpoint: Path, change: Callable[[Path], None]) -> None:
    before = named(checkpoint)
    change(checkpoint)
    assert named(checkpoint) != before


def test_the_format_counts_and_the_seed_where_it_matters(checkpoint: Path) -> None:
    assert named(checkpoint, "float32") != named(checkpoint)
    assert named(checkpoint, seed=1) == named(checkpoint)
    source = resolve_model(str(checkpoint), cache_dir=None)
    assert len({fingerprint(source, "bfloat16", 0, kind) for kind in ("auto", "int8", "int4", "fp8")}) == 4
    dummy = resolve_model("scout", load_format="dummy", cache_dir=None)
    assert fingerprint(dummy, "bfloat16", 0) != fingerprint(dummy, "bfloat16", 1)
    assert fingerprint(dummy, "bfloat16", 0) != fingerprint(
        resolve_model("maverick", load_format="dummy", cache_dir=None), "bfloat16", 0
    )


def test_a_file_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    source: ModelSource = replace(resolve_model(str(checkpoint), cache_dir=None))
    (checkpoint / "a.safetensors").unlink()
    (checkpoint / "a.safetensors").symlink_to(checkpoint / "gone")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        fingerprint(source, "bfloat16", 0)
