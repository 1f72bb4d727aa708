"""A folder that appears whole or not at all: it is filled under another name beside the one it will have. Knows nothing
of what it holds, but replaces only what is a checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checkpoint_error import CheckpointError


@contextlib.contextmanager
def replaced_folder(out: Path, *, force: bool, keep: Path | None = None) -> Iterator[Path]:
    """An empty folder that is renamed to `out` when the block ends; if it raises, it is gone and `out` as it was. What
    processes that were killed left beside `out` is removed.

    `force` allows that a checkpoint at `out` is replaced, but never `keep` or what holds it. Raises CheckpointError,
    and OSError when the disk does.
    """
    out = out.absolute()
    if keep is not None and keep.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out} holds the checkpoint that is to be read; choose another directory")
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; choose another directory, or replace it with --force")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise CheckpointError(f"{out} is no checkpoint and is not replaced; choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.unfinished-"
    _remove_leftovers(out.parent, prefix)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    with _locked(staging):
        try:
            fresh = staging / "fresh"
            fresh.mkdir()
            yield fresh
            for path in fresh.iterdir():
                _flush(path)
            if out.exists():
                out.rename(staging / "replaced")
            fresh.rename(out)
            _flush(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(BlockingIOError), _locked(path):  # whoever fills it holds its lock
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The kernel drops the lock when the process dies. Raises BlockingIOError when another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """To the disk, so that what has its name after a power failure is whole."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
