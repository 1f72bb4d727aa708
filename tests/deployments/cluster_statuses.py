"""Statuses as the gateway answers them, made up."""

from __future__ import annotations

from typing import Any

from herd.cluster.expert_map import Expert, pack_experts

PER_LAYER = 8


def shard(slot: int, experts: list[Expert], **fields: Any) -> dict[str, Any]:
    return {
        "shard_id": f"shard-{slot}",
        "slot": slot,
        "state": "ready",
        "node_id": f"{slot:x}" * 56,
        "host": f"10.0.0.{slot}",
        "experts": len(experts),
        "bytes": len(experts) << 28,
        "epoch": slot + 1,
        "beat_age_s": 0.25,
        "pid": 4000 + slot,
        "device": "cpu",
        "rows_per_s": 1234.5,
        "busy": 0.37,
        "queued_rows": 41,
        "rows": 99_000,
        "hosted": pack_experts(experts),
    } | fields


def engine_figures(engine_id: str = "engine-a") -> dict[str, Any]:
    return {"engine_id": engine_id, "age_s": 0.5, "tokens_per_s": 812.44, "running": 32.0, "waiting": 5.0}


def sharded() -> dict[str, Any]:
    """Layers 1 and 3, two shards with all experts but expert 7 of layer 3."""
    even = [(layer, expert) for layer in (1, 3) for expert in range(0, PER_LAYER, 2)]
    odd = [(layer, expert) for layer in (1, 3) for expert in range(1, PER_LAYER, 2) if (layer, expert) != (3, 7)]
    return {
        "mode": "shards",
        "name": "tiny",
        "model": "0123456789abcdef" * 4,
        "epoch": 12,
        "router": {"restarts": 2, "up_s": 7260.0, "node": "1" * 56},
        "experts": {
            "layers": 2,
            "per_layer": PER_LAYER,
            "units": 2 * PER_LAYER,
            "bytes_each": 1 << 28,
            "copies": len(even) + len(odd),
            "missing": 1,
        },
        "shards": [shard(1, odd), shard(0, even)],
        "imbalance": {"max_over_mean": 1.125, "worst_layer": {"layer": 3, "max_over_mean": 1.4}},
        "engines": [
            {"engine_id": "engine-a", "epoch": 12, "seen_age_s": 3.0},
            {"engine_id": "engine-b", "epoch": 11, "seen_age_s": 9.0},
        ],
        "hot_experts": [{"layer": 3, "expert": 5, "share": 0.25, "copies": 1}],
        "engine_stats": [engine_figures()],
    }


def local() -> dict[str, Any]:
    return {"mode": "local", "name": "tiny", "engine_stats": [engine_figures()]}


def routerless() -> dict[str, Any]:
    return local() | {"mode": "shards", "router": None, "router_error": "no answer within 2 s"}
