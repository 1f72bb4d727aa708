"""In a child process, because a test's own output is pytest's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from herd.deployments.terminal import StopSignals

CODE = """
import os, subprocess, sys
from pathlib import Path
from herd.deployments.terminal import quiet_terminal
print("before", flush=True)
with quiet_terminal(Path(sys.argv[1])) as console:
    print("python noise")
    os.write(2, b"library noise\\n")
    subprocess.run(["sh", "-c", "echo child noise; echo child error >&2"])
    console.print("said [not markup]")
print("after")
print("error after", file=sys.stderr)
"""


def test_only_the_console_reaches_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", CODE, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nsaid [not markup]\nafter\n"
    assert done.stderr == "error after\n"
    assert sorted(log.read_text().splitlines()) == ["child error", "child noise", "library noise", "python noise"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_counted_or_interrupt(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        signals = StopSignals()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals.count == 2
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals.count == 4
    finally:
        for s, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(s, handler)
