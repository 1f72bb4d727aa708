"""The Serve application: which deployments there are and how Serve shall run them. `herd serve`, `serve deploy` and
RayService all come through `build`. Knows nothing of what the deployments do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import ray
from ray.serve import Application

from ..model.checkpoint_error import CheckpointError
from ..model.config import Llama4Config, parse_config
from ..model.presets import PRESETS
from ..model.source import resolve_model
from .config import HerdConfig, ModelConfig, parse_tree
from .engine import Engine
from .engine_router import EngineRouter
from .expert_plan import Resources, engine_gpus, plan_experts
from .expert_shard import ExpertShard
from .gateway import Gateway

_CONTROL_SLOTS = 64
"""Calls beside generation that a replica answers at full load: readiness, statistics, metrics."""
_SHUTDOWN_MARGIN_S = 5.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 10.0
_SHARD_HEALTH_PERIOD_S, _SHARD_HEALTH_TIMEOUT_S = 0.4, 1.2
"""Serve replaces a replica after three checks in a row that failed or got no answer in time, the next one starting when
the one before has timed out: a shard that hangs is found after 3.6 to 4.5 s, one that is merely slow has as long."""
_DRAIN_POLL_S = 0.25


def build(args: Mapping[str, Any] | HerdConfig) -> Application:
    """The application for a configuration tree; a mapping may leave out what shall have its default.

    Only `args`, the model's shape and what the cluster has count: no environment variable is read. Raises ConfigError,
    or PlacementError when the experts do not fit.
    """
    given = args if isinstance(args, HerdConfig) else parse_tree(args)
    config = plan_experts(given, model_shape(given.model), cluster_resources())
    tree = config.model_dump(mode="json")
    shutdown_s = config.http.drain_timeout_s + _SHUTDOWN_MARGIN_S
    engine = Engine.options(
        name="Engine",
        num_replicas=config.engine.replicas,
        # The engine counts and answers 429 itself; Serve must not hold requests back before it.
        max_ongoing_requests=config.engine.max_num_seqs + config.engine.max_queued + _CONTROL_SLOTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": engine_gpus(config)},
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
    shards = _expert_shards(config, shutdown_s).bind(tree) if config.experts.mode == "shards" else None
    return gateway.bind(tree, engine.bind(tree, shards))


def model_shape(config: ModelConfig) -> Llama4Config | None:
    """The model's shape if it can be looked up here without fetching anything; what is wrong with a model that cannot,
    the replicas will say."""
    try:
        if config.path in PRESETS:
            return parse_config(dict(PRESETS[config.path].config))
        return parse_config(resolve_model(config.path, load_format=config.load_format, cache_dir=None).config_json)
    except (CheckpointError, ValueError):
        return None


def cluster_resources() -> Resources:
    """What Ray has; nothing is known before it runs."""
    if not ray.is_initialized():
        return Resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        gpus=sum(node.get("GPU", 0) for node in nodes),
        gpu_bytes=_gpu_bytes(),
        node_bytes=tuple(int(node["memory"]) for node in nodes if "memory" in node),
    )


def _expert_shards(config: HerdConfig, shutdown_s: float) -> Any:
    gpus, cpus = config.experts.gpus_per_shard, config.experts.cpus_per_shard
    if gpus:
        where = {
            "placement_group_bundles": [{"GPU": gpus, "CPU": cpus}],
            "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        }
    else:  # Serve spreads the replicas over the nodes
        where = {"ray_actor_options": {"num_cpus": cpus, "num_gpus": 0}}
    return ExpertShard.options(
        name="ExpertShard",
        num_replicas=config.experts.shards,
        health_check_period_s=_SHARD_HEALTH_PERIOD_S,
        health_check_timeout_s=_SHARD_HEALTH_TIMEOUT_S,
        # Engines that drain need it as long as they do; where nothing needs it, it goes at once.
        graceful_shutdown_timeout_s=shutdown_s,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        **where,
    )


def _gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU, which stands for the cluster's."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    sizes = [int(line) for line in done.stdout.split() if line.isdecimal()]
    return min(sizes) << 20 if done.returncode == 0 and sizes else None
