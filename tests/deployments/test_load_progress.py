"""What engines and shards tell of their loading, and what `herd serve` reads of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from herd.deployments.load_progress import LoadProgress, read_progress


def test_nothing_told_is_nothing_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path / "p.json") is None


def test_the_end_is_always_told(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    progress = LoadProgress(path)
    for done in range(1001):
        progress("weights", done, 1000)
    assert read_progress(path) == ("weights", 1000, 1000)
    assert len(list(tmp_path.iterdir())) == 1


def test_several_processes_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    for pid, done in ((1, 100), (2, 300)):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        LoadProgress(path)("weights", done, 1000)
    assert read_progress(path) == ("weights", 400, 2000)


def test_the_log_hears_of_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    progress = LoadProgress(None)
    with caplog.at_level(logging.INFO, logger="herd.engine"):
        for done in range(1001):
            progress("weights", done << 20, 1000 << 20)
    assert 9 <= len(caplog.messages) <= 11
    assert caplog.messages[-1] == "loading weights: 100 % of 1000 MiB"
