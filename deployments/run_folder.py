"""The private folder of one run, for Ray's files, HAProxy's files and logs. A run that ends well removes its own; what
failed runs left for reading is removed a day later by whoever starts next."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

BASE = Path("/tmp")
"""Not TMPDIR: Ray and HAProxy put Unix sockets deep inside, and their paths end at 107 bytes."""
_PREFIX = "herd-run-"
_OWNER = "owner"
_KEEP_S = 86_400.0


def new_run_folder(base: Path = BASE) -> Path:
    """A new folder that only this user can enter."""
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    (folder / _OWNER).write_text(str(os.getpid()), "utf-8")
    return folder


def remove_run_folder(folder: Path) -> None:
    """Never raises: what cannot be removed is left to a later run."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            owner = folder / _OWNER
            old = time.time() - owner.stat().st_mtime > _KEEP_S
            abandoned = folder.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner.read_text("utf-8")))
        except (OSError, ValueError):
            continue  # not ours to judge: another user's, or gone meanwhile
        if old and abandoned:
            remove_run_folder(folder)
