"""A running `herd serve` as a child process, for tests: what it printed, its processes, its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil

START_S = 240.0
STOP_S = 90.0


class Server:
    """A running `herd serve` and everything it printed."""

    def __init__(self, *arguments: str, port: int, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "herd.deployments.cli", "serve", *arguments, "--port", str(port)]
        # Not what the tests set for their own Ray: a user's environment has none of it.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HERD_"))}
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean | dict(env or {}),
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        self.lines.extend(line.rstrip("\n") for line in stream)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + START_S
        while word not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)

    def wait(self) -> int:
        """Exit status."""
        status = self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        return status

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)
        self._reader.join(STOP_S)

    @property
    def folder(self) -> Path | None:
        """The folder of its run, once it has named it."""
        found = re.search(r"/tmp/herd-run-[^/\s]+", self.text)
        return None if found is None else Path(found[0])
