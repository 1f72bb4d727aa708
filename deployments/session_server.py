"""Finds the local server, or runs one as a child process for as long as a session lasts."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from .banner import base_url
from .config import load_config
from .ports import free_ports
from .readiness import is_ready

_STOP_S = 60.0


class SessionServerError(Exception):
    """No server could be had; the message is for the user."""


@contextlib.contextmanager
def session_server(model: str | None) -> Iterator[tuple[str, bool]]:
    """(base URL, whether it was started here) of the configured local server if it is ready, else of a new one for
    `model` on a free port. Raises ConfigError, SessionServerError."""
    url = base_url(load_config().config.http)
    if is_ready(url):
        yield url, False
        return
    (port,) = free_ports(1)
    print(f"no server at {url}: starting one for this session", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "herd.deployments.cli", "serve", "--attached", "--port", str(port)]
    command += ["--host", "127.0.0.1", *([model] if model else [])]
    # Its own session, so that Ctrl-C at our prompt is not meant for it.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_ready(url):
            if child.poll() is not None:
                raise SessionServerError("the server for this session could not start")
            time.sleep(0.2)
        yield url, True
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
