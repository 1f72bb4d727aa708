"""What `herd serve` says once it is ready. Text only: knows nothing of how the facts were found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cluster.sizes import format_size
from .config import Effective, HttpConfig

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
_QUESTION = "What is the capital of France?"


def base_url(http: HttpConfig) -> str:
    """Where a client on this machine connects."""
    host = _ANYWHERE.get(http.host) or (f"[{http.host}]" if ":" in http.host else http.host)
    return f"http://{host}:{http.port}"


def ready_banner(effective: Effective, url: str, info: Mapping[str, Any], ingress: str, logs: Path) -> str:
    """At most ten lines. `url`: where clients connect. `info`: what `Engine.info` says; missing facts are left out."""
    config = effective.config
    name = config.model.served_names[0] if config.model.served_names else info.get("model", config.model.path)
    rows = [
        ("Ready", f"{url}/v1   ({_processes(ingress, config.gateway.replicas, config.engine.replicas, info)})"),
        ("Model", " · ".join([name, *_model_facts(info)])),
        ("Memory", " · ".join(_memory_facts(info)) or None),
        ("Bits", _numerics(info)),
        ("Set", ", ".join(changed_settings(effective)) or None),
        ("Logs", str(logs)),
        ("Stop", "Ctrl-C: running requests finish first; once more to stop at once"),
        ("Try", curl_line(url, name)),
    ]
    lines = [f"{title:<8}{text}" for title, text in rows if text]
    if config.http.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append("Warning every machine that reaches this address can use the server: it asks for no key")
    return "\n".join(lines)


def curl_line(url: str, name: str) -> str:
    """A command to paste into a shell."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64})
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def changed_settings(effective: Effective) -> list[str]:
    """What is not at its default, with its origin."""
    return [f"{key}={value} ({origin})" for key, value, origin in effective.rows() if origin != "default"]


def format_count(count: float) -> str:
    """`count` with a unit letter: 850, 135M, 1.98T."""
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def _processes(ingress: str, gateways: int, engines: int, info: Mapping[str, Any]) -> str:
    parts = [{"haproxy": "HAProxy", "proxy": "Serve's proxy"}.get(ingress, "the cluster's ingress")]
    parts += [_plural(gateways, "gateway"), _plural(engines, "engine")]
    if shards := info.get("expert_shards"):
        copies = info.get("expert_copies", 1)
        parts.append(_plural(shards, "expert shard") + (f" ({copies} copies)" if copies > 1 else ""))
    return ", ".join(parts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _model_facts(info: Mapping[str, Any]) -> list[str]:
    facts = []
    if params := info.get("parameters"):
        facts.append(f"{format_count(params)} parameters")
    if (dtype := info.get("dtype")) and (device := info.get("device")):
        weights = info.get("quantize", "none")
        kind = "" if weights == "none" else f"{weights} weights, "
        facts.append(f"{kind}{str(dtype).removeprefix('torch.')} on {device}")
    if length := info.get("max_model_len"):
        facts.append(f"context of {length} tokens")
    return facts


def _numerics(info: Mapping[str, Any]) -> str | None:
    """What equal requests can count on, and on which machines."""
    if info.get("numerics") == "exact":
        return f"exact: equal for equal requests; class {info.get('numeric_class')}"
    return "fast: equal requests may differ" if info.get("numerics") else None


def _memory_facts(info: Mapping[str, Any]) -> list[str]:
    facts = []
    if weights := info.get("weights_bytes"):
        facts.append(f"weights {format_size(weights)}")
    if kv_bytes := info.get("kv_bytes"):
        tokens = info.get("kv_tokens")
        facts.append(f"KV cache {format_size(kv_bytes)}" + (f" ({tokens} tokens)" if tokens else ""))
    return facts
