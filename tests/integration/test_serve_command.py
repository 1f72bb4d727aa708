"""`herd serve` as a user runs it: a child process, a real Ray, a tiny model with random weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from herd.deployments.haproxy import haproxy_available
from herd.deployments.ports import free_ports

from ..serve_process import START_S, STOP_S, Server
from .live_app import TINY

pytestmark = pytest.mark.slow

AGENTS_S = 180.0
"""Ray's own agents notice within about a minute that their node is gone."""
INGRESSES = ["proxy", pytest.param("haproxy", marks=pytest.mark.skipif(not haproxy_available(), reason="no HAProxy"))]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": 4096}))
    return folder


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def run(*arguments: str, load_format: str = "dummy") -> Server:
        options = ["--load-format", load_format, "--kv-memory", "16MiB", "--threads", "1"]
        servers.append(Server(str(model), *options, *arguments, port=free_ports(1)[0]))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()
        if server.folder is not None:
            shutil.rmtree(server.folder, ignore_errors=True)


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def open_ports(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Listening addresses that other machines can reach."""
    found = set()
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1"):
                found.add((process.name(), connection.laddr.port))
    return found


@pytest.mark.parametrize("ingress", INGRESSES)
def test_start_serve_drain_stop(start: Callable[..., Server], ingress: str) -> None:
    server = start("--ingress", ingress)
    server.wait_for("Ready after")
    assert len(server.lines) <= 12
    port = int(server.url.rpartition(":")[2])

    # The line that the banner offers works as it is.
    curl = next(line.removeprefix("Try").strip() for line in server.lines if line.startswith("Try"))
    asked = subprocess.run(["sh", "-c", f"{curl} -s"], capture_output=True, text=True, check=True)
    assert "choices" in json.loads(asked.stdout) or json.loads(asked.stdout)["error"]["param"] == "messages"

    # Nothing but replicas' gRPC ports, which Ray binds to every interface and which ask for the run's token.
    assert {name for name, _ in open_ports(server.tree())} <= {
        "ray::ServeReplica:herd:Gateway",
        "ray::ServeReplica:herd:Engine",
    }

    second = subprocess.run(
        [sys.executable, "-m", "herd.deployments.cli", "serve", "--port", str(port)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"port {port} is in use" in second.stderr

    processes = server.tree()
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body(1500, stream=True), timeout=60) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 3:
                server.process.send_signal(signal.SIGINT)
    assert "data: [DONE]" in lines, "a running request was cut by draining"
    assert server.wait() == 0, server.text
    assert server.lines[-1] == "stopped"
    assert wait_until(lambda: gone(processes))
    assert server.folder is not None
    assert not server.folder.exists()


@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy")
def test_new_requests_are_told_to_come_back_while_draining(start: Callable[..., Server]) -> None:
    server = start("--set", "http.drain_timeout_s=60")
    server.wait_for("Ready after")
    statuses = []

    def told() -> bool:
        try:
            answer = httpx.get(f"{server.url}/v1/models", timeout=5)
        except httpx.HTTPError:
            return True  # stopped listening
        statuses.append(answer.status_code)
        return answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"

    with httpx.stream("POST", f"{server.url}/v1/completions", json=body(4000, stream=True), timeout=60) as response:
        next(response.iter_lines())
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(told)
        assert set(statuses) <= {200, 503}
    assert server.wait() == 0


def test_a_second_signal_stops_at_once(start: Callable[..., Server]) -> None:
    server = start("--set", "http.drain_timeout_s=600")
    server.wait_for("Ready after")
    processes = server.tree()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body(4000, stream=True), timeout=60) as response:
        next(response.iter_lines())
        server.process.send_signal(signal.SIGINT)
        server.wait_for("draining")
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130
    assert wait_until(lambda: gone(processes))


def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_error(start: Callable[..., Server], model: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(4096, 64)}, str(model / "model.safetensors"))
    server = start(load_format="safetensors")
    assert server.wait() == 1
    assert "error: the server could not start" in server.text
    assert "model.layers.0.self_attn.q_proj.weight" in server.text
    assert "Traceback" not in server.text
    assert len(server.lines) < 40
    assert server.folder is not None
    assert server.folder.is_dir()


def test_an_unknown_model_is_refused_before_ray_starts(tmp_path: Path) -> None:
    server = Server(str(tmp_path / "nothing"), port=free_ports(1)[0])
    assert server.wait() == 1
    assert str(tmp_path / "nothing") in server.text
    assert server.folder is None


def test_a_killed_server_leaves_nothing_behind(start: Callable[..., Server]) -> None:
    server = start()
    server.wait_for("Ready after")
    processes = server.tree()
    server.kill()
    assert wait_until(lambda: gone(processes), AGENTS_S)
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_chat_starts_a_server_and_takes_it_away(model: Path, free_port: int) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HERD_"))}
    env |= {"HERD_HTTP_PORT": str(free_port), "HERD_MODEL_LOAD_FORMAT": "dummy", "HERD_ENGINE_KV_MEMORY": "16MiB"}
    command = [sys.executable, "-m", "herd.deployments.cli", "chat", str(model), "-q", "hi", "--max-tokens", "4"]
    before = set(psutil.pids())
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=START_S + STOP_S)
    assert "starting one for this session" in done.stderr
    assert "tokens" in done.stderr or "chat" in done.stderr  # a model without a chat template says so
    ours = [p for p in psutil.process_iter() if p.pid not in before and any(str(model) in a for a in _cmdline(p))]
    assert not ours


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
