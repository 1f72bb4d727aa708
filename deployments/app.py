"""The Serve application: which deployments there are and how Serve shall run them. `herd serve`, `serve deploy` and
RayService all come through `build`. Knows nothing of what the deployments do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.serve import Application

from .config import HerdConfig, parse_tree
from .engine import Engine
from .engine_router import EngineRouter
from .gateway import Gateway

_CONTROL_SLOTS = 64
"""Calls beside generation that a replica answers at full load: readiness, statistics, metrics."""
_SHUTDOWN_MARGIN_S = 5.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 10.0
_DRAIN_POLL_S = 0.25


def build(args: Mapping[str, Any] | HerdConfig) -> Application:
    """The application for a configuration tree; a mapping may leave out what shall have its default.

    Only `args` counts: no environment variable is read, so that the same arguments give the same application anywhere.
    Raises ConfigError.
    """
    config = place(args if isinstance(args, HerdConfig) else parse_tree(args), _gpus())
    tree = config.model_dump(mode="json")
    shutdown_s = config.http.drain_timeout_s + _SHUTDOWN_MARGIN_S
    engine = Engine.options(
        name="Engine",
        num_replicas=config.engine.replicas,
        # The engine counts and answers 429 itself; Serve must not hold requests back before it.
        max_ongoing_requests=config.engine.max_num_seqs + config.engine.max_queued + _CONTROL_SLOTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if config.engine.device == "cuda" else 0},
        request_router_config={"request_router_class": EngineRouter},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
    )
    gateway = Gateway.options(
        name="Gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=config.gateway.max_inflight + _CONTROL_SLOTS,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
    )
    return gateway.bind(tree, engine.bind(tree))


def place(config: HerdConfig, gpus: float) -> HerdConfig:
    """`config` with the engine's device decided: every engine on a GPU of its own if there are enough, else the CPU."""
    if config.engine.device != "auto":
        return config
    device = "cuda" if gpus >= config.engine.replicas else "cpu"
    return config.model_copy(update={"engine": config.engine.model_copy(update={"device": device})})


def _gpus() -> float:
    return ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
