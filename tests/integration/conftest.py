"""The applications that the tests of this folder talk to, each started once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.model.tokenizer import Tokenizer

from ..model.conftest import pocket_dir, pocket_gguf
from .live_app import LiveApp, deploy_app, write_tiny

__all__ = ["pocket_app", "pocket_dir", "pocket_gguf", "tiny_app"]

MAX_INFLIGHT = 72


@pytest.fixture(scope="session")
def tiny_app(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """Random weights behind the whole stack: Serve's proxy, a gateway, an engine."""
    folder = tmp_path_factory.mktemp("live") / "tiny"
    tokenizer = write_tiny(folder)
    config = {
        "model": {"path": str(folder), "load_format": "dummy"},
        "engine": {"kv_memory": "16MiB", "threads": 1, "max_queued": 48},
        "gateway": {"max_inflight": MAX_INFLIGHT},
        "http": {"drain_timeout_s": 0},
    }
    yield deploy_app(ray_session, "tiny", "tiny", tokenizer, config)
    importlib.import_module("ray.serve").delete("tiny")


@pytest.fixture(scope="module")
def pocket_app(ray_session: str, pocket_dir: Path) -> Iterator[LiveApp]:
    """The default model behind the whole stack."""
    config = {
        "model": {"path": "pocket", "cache_dir": str(pocket_dir.parent)},
        "engine": {"kv_memory": "256MiB", "threads": 1},
        "gateway": {"max_inflight": MAX_INFLIGHT},
        "http": {"drain_timeout_s": 0},
    }
    yield deploy_app(ray_session, "pocket", "pocket", Tokenizer.from_dir(pocket_dir), config)
    importlib.import_module("ray.serve").delete("pocket")
