from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from herd.deployments.banner import base_url, curl_line, format_count, ready_banner
from herd.deployments.config import HttpConfig, load_config

INFO: dict[str, object] = {
    "model": "pocket",
    "parameters": 273_900_000,
    "weights_bytes": 547_800_000,
    "kv_bytes": 1 << 30,
    "kv_tokens": 23301,
    "max_model_len": 8192,
    "dtype": "bfloat16",
    "device": "cpu",
}


def banner(*sets: str, info: dict[str, object] | None = None) -> list[str]:
    effective = load_config(sets=sets, env={})
    url = base_url(effective.config.http)
    return ready_banner(effective, url, INFO if info is None else info, "haproxy", Path("logs")).splitlines()


def test_the_banner_is_short_and_says_what_matters() -> None:
    lines = banner("engine.replicas=2")
    assert len(lines) <= 10
    text = "\n".join(lines)
    for part in (
        "http://127.0.0.1:8000/v1",
        "pocket",
        "274M parameters",
        "bfloat16 on cpu",
        "8192 tokens",
        "weights 522 MiB",
        "KV cache 1.0 GiB (23301 tokens)",
        "engine.replicas=2 (--set)",
        "2 engines",
        "1 gateway,",
        "logs",
    ):
        assert part in text
    assert "Warning" not in text


def test_expert_shards_are_counted_where_there_are_some() -> None:
    assert "expert shard" not in banner()[0]
    assert banner(info=INFO | {"expert_shards": 3, "expert_copies": 2})[0].endswith(
        "1 gateway, 1 engine, 3 expert shards (2 copies))"
    )
    assert banner(info=INFO | {"expert_shards": 1, "expert_copies": 1})[0].endswith("1 engine, 1 expert shard)")


def test_it_says_what_equal_requests_can_count_on() -> None:
    exact = banner(info=INFO | {"numerics": "exact", "numeric_class": "cpu-x/bfloat16"})
    assert "Bits    exact: equal for equal requests; class cpu-x/bfloat16" in exact
    assert "Bits    fast: equal requests may differ" in banner(info=INFO | {"numerics": "fast"})


def test_it_says_what_the_weights_are_quantised_to() -> None:
    assert "int4 weights, bfloat16 on cpu" in "\n".join(banner(info=INFO | {"quantize": "int4"}))
    assert "weights," not in "\n".join(banner(info=INFO | {"quantize": "none"}))


def test_facts_that_are_not_known_are_left_out() -> None:
    assert not [line for line in banner(info={}) if "None" in line or line.startswith("Memory")]


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("::1", False)])
def test_an_open_address_is_pointed_out(host: str, warned: bool) -> None:
    assert any(line.startswith("Warning") for line in banner(f"http.host={host}")) == warned


def test_the_name_is_what_requests_use() -> None:
    assert "Model   pocket ·" in "\n".join(banner())
    assert '"model": "mine"' in "\n".join(banner("model.served_names=mine,other"))


def test_the_curl_line_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://h:1", "it's"))
    assert words[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"
    assert any(line.startswith("Try     curl ") for line in banner())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
        ("gpu-box", "http://gpu-box:8000"),
    ],
)
def test_where_to_connect(host: str, url: str) -> None:
    assert base_url(HttpConfig(host=host)) == url


@pytest.mark.parametrize(
    ("count", "text"), [(850, "850"), (1500, "1.5K"), (134_500_000, "134M"), (1.09e11, "109B"), (1.98e12, "1.98T")]
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text
