"""A cached directory is whole or absent, whatever happens to it, to its builder, or beside it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.model.pocket_cache import cached_directory

CONTENT = {"weights": bytes(range(256)) * 40, "config.json": b"{}"}


def silent(stage: str, done: int, total: int) -> None:
    pass


class Builder:
    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, directory: Path) -> None:
        self.builds += 1
        for name, content in CONTENT.items():
            (directory / name).write_bytes(content)


def assert_whole(directory: Path) -> None:
    assert {p.name for p in directory.iterdir()} == {*CONTENT, "manifest.json"}
    assert all((directory / name).read_bytes() == content for name, content in CONTENT.items())
    assert {p.name for p in directory.parent.iterdir()} == {directory.name, f".{directory.name}.lock"}


def test_built_once_then_verified(tmp_path: Path) -> None:
    build, seen = Builder(), []
    for _ in range(3):
        target = cached_directory(tmp_path / "deep" / "m", "r1", build, lambda *event: seen.append(event))
        assert_whole(target)
    assert build.builds == 1
    total = sum(map(len, CONTENT.values()))
    assert seen == [("verify", len(CONTENT["config.json"]), total), ("verify", total, total)] * 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit flip": lambda d: flip(d / "weights"),
    "truncated": lambda d: (d / "weights").write_bytes(CONTENT["weights"][:-1]),
    "emptied": lambda d: (d / "weights").write_bytes(b""),
    "file gone": lambda d: (d / "config.json").unlink(),
    "manifest gone": lambda d: (d / "manifest.json").unlink(),
    "manifest cut": lambda d: (d / "manifest.json").write_text('{"recipe": "r1", "files"'),
    "manifest foreign": lambda d: (d / "manifest.json").write_text("[1]"),
    "manifest hollow": lambda d: (d / "manifest.json").write_text('{"recipe": "r1", "files": {"weights": 3}}'),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_any_damage_is_repaired(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    target = cached_directory(tmp_path / "m", "r1", build, silent)
    DAMAGES[damage](target)
    assert_whole(cached_directory(target, "r1", build, silent))
    assert build.builds == 2
    assert "is built again" in caplog.text


def test_another_recipe_is_another_directory_content(tmp_path: Path) -> None:
    build = Builder()
    for recipe in ("r1", "r2", "r2"):
        assert_whole(cached_directory(tmp_path / "m", recipe, build, silent))
    assert build.builds == 2


def test_a_failed_build_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "m"

    def fails(directory: Path) -> None:
        (directory / "weights").write_bytes(b"half")
        raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        cached_directory(target, "r1", fails, silent)
    assert not target.exists()
    assert_whole(cached_directory(target, "r1", Builder(), silent))
    with pytest.raises(ValueError, match="no network"):
        cached_directory(target, "r2", fails, silent)
    assert_whole(target)


KILLED = """
import sys, time
from pathlib import Path
from herd.model.pocket_cache import cached_directory

def build(directory):
    (directory / "weights").write_bytes(b"half")
    print("building", flush=True)
    sys.stdin.read()

cached_directory(Path(sys.argv[1]), "r1", build, lambda *event: None)
"""


def test_a_killed_builder_is_cleaned_up_after(tmp_path: Path) -> None:
    target = tmp_path / "m"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.kill()
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name]
    assert not target.exists()
    assert_whole(cached_directory(target, "r1", Builder(), silent))


def test_two_at_once_build_once(tmp_path: Path) -> None:
    """The builder goes on only when the other one has met the lock."""
    target, build = tmp_path / "m", Builder()
    inside, waiting = threading.Event(), threading.Event()

    def slow(directory: Path) -> None:
        inside.set()
        assert waiting.wait(30)
        build(directory)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "wait":
            waiting.set()

    first = threading.Thread(target=cached_directory, args=(target, "r1", slow, silent))
    first.start()
    assert inside.wait(30)
    assert_whole(cached_directory(target, "r1", build, progress))
    first.join(30)
    assert build.builds == 1


def test_a_whole_cache_may_be_read_only(tmp_path: Path) -> None:
    """Nothing is opened for writing when nothing is wrong, so an image can carry the cache."""
    target = cached_directory(tmp_path / "m", "r1", Builder(), silent)
    (tmp_path / ".m.lock").unlink()
    cached_directory(target, "r1", Builder(), silent)
    assert not (tmp_path / ".m.lock").exists()
