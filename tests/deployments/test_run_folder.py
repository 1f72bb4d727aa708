from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from herd.deployments.run_folder import new_run_folder, remove_run_folder


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def age(folder: Path, days: float) -> None:
    then = (folder / "owner").stat().st_mtime - days * 86_400
    os.utime(folder / "owner", (then, then))


def test_it_is_private(tmp_path: Path) -> None:
    assert stat.S_IMODE(new_run_folder(tmp_path).stat().st_mode) == 0o700


def test_only_old_folders_of_dead_runs_are_removed(tmp_path: Path) -> None:
    old_and_dead, new_and_dead, old_and_alive = (new_run_folder(tmp_path) for _ in range(3))
    stranger = tmp_path / "herd-run-without-owner"
    stranger.mkdir()
    for folder in (old_and_dead, new_and_dead):
        (folder / "owner").write_text(str(dead_pid()))
    age(old_and_dead, 2)
    age(old_and_alive, 2)
    fresh = new_run_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {new_and_dead, old_and_alive, stranger, fresh}


def test_removing_twice_is_fine(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path)
    remove_run_folder(folder)
    remove_run_folder(folder)
    assert not folder.exists()
