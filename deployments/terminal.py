"""The terminal of a server: keeps the output of libraries and child processes off it, and turns signals into flags."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console


@contextmanager
def quiet_terminal(log: Path) -> Iterator[Console]:
    """A console on the real standard output, while everything else that is written to standard output and error, by
    this process, its libraries and its children, is appended to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    output, errors = os.dup(1), os.dup(2)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # Children shall not keep the terminal open, nor a pipe that waits for our end.
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    with os.fdopen(output, "w", encoding="utf-8") as stream:
        try:
            yield Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            stream.flush()
            os.dup2(stream.fileno(), 1)
            os.dup2(errors, 2)
            os.close(errors)


class StopSignals:
    """Counts SIGINT and SIGTERM from when it is made."""

    def __init__(self) -> None:
        self.count = 0
        self._interrupt = False
        self.install()

    def install(self) -> None:
        """Take the signals over, again if a library took them meanwhile."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt on the main thread."""
        self._interrupt = True
        try:
            yield
        finally:
            self._interrupt = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._interrupt:
            raise KeyboardInterrupt
