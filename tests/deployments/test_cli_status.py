"""`herd status` and `herd top` against a stand-in for the server; the full screen in a child process on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from herd.deployments import cli, status_client
from herd.deployments.client import ServerError
from herd.deployments.status_client import StatusClient

from .cluster_statuses import local, routerless, sharded

DEADLINE_S = 30.0
TO_ALTERNATE_SCREEN, FROM_ALTERNATE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"


class StatusServer:
    """What it shall say to GET /herd/status, once for each call and then the last for good."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = [(200, json.dumps(sharded()).encode())]
        self.asked = 0
        self.url = ""

    def say(self, *answers: Any, status: int = 200) -> None:
        self.answers = [(status, a if isinstance(a, bytes) else json.dumps(a).encode()) for a in answers]


# Ctrl-C comes from the terminal only for the session whose terminal it is.
_ON_ITS_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from herd.deployments.cli import main
main()
"""


class Terminal:
    """A `herd` on a pseudo terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.output = b""
        self._matched = 0
        self._main, self._end = pty.openpty()
        termios.tcsetwinsize(self._end, (40, 80))
        self.modes_before = self.local_modes()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_ITS_TERMINAL, *arguments],
            stdin=self._end,
            stdout=self._end,
            stderr=self._end,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)
        os.close(self._end)

    def local_modes(self) -> int:
        return termios.tcgetattr(self._end)[3]

    def type(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def read_until(self, text: bytes) -> None:
        """Until `text` comes, after what was waited for last."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.output.find(text, self._matched)) < 0:
            assert time.monotonic() < deadline, self.output
            self._read()
        self._matched = found + len(text)

    def read_to_end(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self._read() or self.process.poll() is None:
            assert time.monotonic() < deadline, self.output

    def _read(self) -> bool:
        readable, _, _ = select.select([self._main], [], [], 0.05)
        if readable:
            self.output += os.read(self._main, 1 << 16)
        return bool(readable)


@pytest.fixture
def server() -> Iterator[StatusServer]:
    stub = StatusServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.asked += 1
            code, body = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
            self.send_response(code if self.path == "/herd/status" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    stub.url = f"http://127.0.0.1:{http.server_port}"
    yield stub
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests' own environment is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def herd(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_status_is_plain_text_of_eighty_columns(server: StatusServer) -> None:
    done = herd("status", "--url", f"{server.url}/v1/")
    assert done.exit_code == 0
    assert "1 missing" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_json_is_what_the_server_says(server: StatusServer) -> None:
    assert json.loads(herd("status", "--url", server.url, "--json").stdout) == sharded()


def test_the_local_server_is_asked(server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_HTTP_PORT", server.url.rpartition(":")[2])
    assert herd("status").exit_code == 0


def test_one_layer(server: StatusServer) -> None:
    done = herd("status", "--url", server.url, "--layer", "3")
    assert "missing: 7" in done.stdout
    done = herd("status", "--url", server.url, "--layer", "2")
    assert (done.exit_code, done.stderr) == (1, "error: no shard holds experts of layer 2\n")


@pytest.mark.parametrize(("answer", "words"), [(local(), "in the engines"), (routerless(), "away (no answer")])
def test_other_kinds_of_status_are_no_errors(server: StatusServer, answer: dict[str, Any], words: str) -> None:
    server.say(answer)
    done = herd("status", "--url", server.url)
    assert done.exit_code == 0
    assert words in done.stdout


@pytest.mark.parametrize("command", ["status", "top"])
@pytest.mark.parametrize(
    ("code", "body", "reason"),
    [
        (404, b'{"detail": "Not Found"}', "has no /herd/status; is it a Herd server of this version?"),
        (500, b"<html>oops\nand more</html>", "answers 500 Internal Server Error"),
        (200, b"<html>", "/herd/status is not JSON"),
        (200, b"\xff\xfe\xfa", "/herd/status is not JSON"),
        (200, b"[1]", "/herd/status does not answer like a Herd server"),
        (200, b'{"status": "ok"}', "/herd/status does not answer like a Herd server"),
    ],
)
def test_a_server_of_another_kind(server: StatusServer, command: str, code: int, body: bytes, reason: str) -> None:
    server.say(body, status=code)
    done = herd(command, "--url", server.url)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {server.url}")
    assert done.stderr.endswith(f"{reason}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "top"])
def test_no_server(command: str, free_port: int) -> None:
    done = herd(command, "--url", f"http://127.0.0.1:{free_port}")
    assert done.exit_code == 1
    assert "nothing answers at" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://x:port", "ftp://x"])
def test_an_address_that_is_none(url: str) -> None:
    done = herd("status", "--url", url)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {url}: ")
    assert done.stderr.count("\n") == 1


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_client, "_ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with StatusClient(url) as client, pytest.raises(ServerError, match="does not answer within"):
            client.read()


def test_top_without_a_terminal_prints_one_text_after_the_other(
    server: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on while the server is away; what ends it is Ctrl-C."""
    read, answers = StatusClient.read, [sharded(), None, sharded() | {"epoch": 13}]

    def scripted(client: StatusClient) -> dict[str, Any]:
        if not answers:
            raise KeyboardInterrupt
        if (answer := answers.pop(0)) is None:
            server.say(b"", status=503)
        else:
            server.say(answer)
        return read(client)

    monkeypatch.setattr(StatusClient, "read", scripted)
    done = herd("top", "--url", server.url, "--interval", "0.1")
    assert done.exit_code == 0
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("map")] == ["12", "13"]
    assert done.stderr == f"error: {server.url} answers 503 Service Unavailable\n"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("ending", ["q", "Ctrl-C", "SIGTERM"])
def test_top_leaves_the_terminal_as_it_was(server: StatusServer, ending: str) -> None:
    server.say(sharded(), sharded() | {"epoch": 77})
    with Terminal("top", "--url", server.url, "--interval", "0.1") as terminal:
        terminal.read_until(b"epoch 77")
        assert TO_ALTERNATE_SCREEN in terminal.output
        assert not terminal.local_modes() & termios.ICANON
        if ending == "SIGTERM":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.type(b"xq" if ending == "q" else b"\x03")
        terminal.read_to_end()
        assert terminal.process.wait(DEADLINE_S) == 0
        assert terminal.local_modes() == terminal.modes_before
    after = terminal.output.rpartition(FROM_ALTERNATE_SCREEN)[2]
    assert FROM_ALTERNATE_SCREEN in terminal.output
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex(HIDE_CURSOR)
    assert b"SLOT" not in after
    assert b"Traceback" not in terminal.output


def test_top_shows_the_last_status_while_the_server_is_away(server: StatusServer) -> None:
    with Terminal("top", "--url", server.url, "--interval", "0.1") as terminal:
        terminal.read_until(b"SLOT")
        server.say(b"", status=503)
        terminal.read_until(b"answers 503")
        terminal.read_until(b"SLOT")
        server.say(sharded() | {"epoch": 78})
        terminal.read_until(b"epoch 78")
        terminal.type(b"q")
        terminal.read_to_end()
        assert terminal.process.wait(DEADLINE_S) == 0
