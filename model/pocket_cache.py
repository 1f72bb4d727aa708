"""A directory that is built once and then only checked: atomic appearance, one builder at a time over all processes,
and a manifest of digests, so that a damaged or half-written directory is built again and never used. Knows nothing of
what the files hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); the unit of `done` depends on the stage, total 0 means unknown."""

_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


def cached_directory(target: Path, recipe: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """`target`, holding what `build(directory)` wrote for `recipe`, each file checked by its SHA-256.

    Builds when it is absent, damaged or of another recipe; waits when another process is building. What `build` raises
    passes through and leaves no trace. Stages: "verify" (bytes) and "wait". Raises OSError when the disk does.
    """
    if _fault(target, recipe, progress) is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.with_name(f".{target.name}.lock"), progress):
        fault = _fault(target, recipe, progress)
        if fault is None:
            return target
        if target.exists():
            _log.warning("%s is built again: %s", target, fault)
        # Whoever left these was killed: this process holds the lock.
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            fresh = staging / "fresh"
            fresh.mkdir()
            build(fresh)
            _write_manifest(fresh, recipe)
            if target.exists():
                target.rename(staging / "damaged")
            fresh.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def sha256_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Hex digest of a file; `progress` is told how many bytes each piece had."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


@contextlib.contextmanager
def _exclusive(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file at `path`. The kernel drops it when the process dies, so a crash leaves no stale lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0, 0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_manifest(directory: Path, recipe: str) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(directory.iterdir())}
    text = json.dumps({"recipe": recipe, "files": files}, indent=1)
    (directory / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def _fault(directory: Path, recipe: str, progress: Progress) -> str | None:
    """What is wrong with `directory`, or None."""
    if not directory.is_dir():
        return "it does not exist"
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != recipe:
            return "it was made by another recipe"
        wanted = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is unreadable ({type(error).__name__}: {error})"
    total = sum(size for size, _ in wanted.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("verify", done, total)

    try:
        for name, (size, _) in wanted.items():
            if (directory / name).stat().st_size != size:
                return f"{name} has another size than it was written with"
        for name, (_, digest) in wanted.items():
            if sha256_of(directory / name, advance) != digest:
                return f"{name} has another digest than it was written with"
    except OSError as error:
        return str(error)
    return None
