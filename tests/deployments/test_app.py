"""What Serve is told. Nothing is started."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application

from herd.deployments.app import build, place
from herd.deployments.config import ConfigError, HerdConfig, load_config


def parts(application: Application) -> tuple[Any, Any]:
    """The gateway's and the engine's deployment."""
    gateway: Any = application._bound_deployment
    return gateway, gateway.init_args[1]._bound_deployment


def test_a_mapping_and_a_tree_give_the_same_application() -> None:
    config = load_config(sets=["engine.replicas=2", "gateway.replicas=3"], env={}).config
    for application in (build(config), build({"engine": {"replicas": 2}, "gateway": {"replicas": 3}})):
        gateway, engine = parts(application)
        assert (gateway.name, engine.name) == ("Gateway", "Engine")
        assert (gateway.num_replicas, engine.num_replicas) == (3, 2)
        assert gateway.init_args[0] == engine.init_args[0] == place(config, 0).model_dump(mode="json")


def test_serve_never_holds_back_what_the_limits_admit() -> None:
    config = {"engine": {"max_num_seqs": 10, "max_queued": 20}, "gateway": {"max_inflight": 30}}
    gateway, engine = parts(build(config))
    assert engine.max_ongoing_requests > 30
    assert gateway.max_ongoing_requests > 30


def test_draining_outlasts_the_longest_allowed_request() -> None:
    for part in parts(build({"http": {"drain_timeout_s": 77}})):
        assert part._deployment_config.graceful_shutdown_timeout_s > 77


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean http\.port"):
        build({"http": {"prt": 1}})


@pytest.mark.parametrize(
    ("device", "replicas", "gpus", "chosen"),
    [
        ("auto", 1, 0, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 2, 1, "cpu"),
        ("cpu", 1, 8, "cpu"),
        ("cuda", 1, 0, "cuda"),
    ],
)
def test_where_engines_run(device: str, replicas: int, gpus: float, chosen: str) -> None:
    config = load_config(sets=[f"engine.device={device}", f"engine.replicas={replicas}"], env={}).config
    placed = place(config, gpus)
    assert placed.engine.device == chosen
    assert placed.model_copy(update={"engine": config.engine}) == config


def test_an_engine_on_a_gpu_reserves_it() -> None:
    assert parts(build({"engine": {"device": "cuda"}}))[1].ray_actor_options["num_gpus"] == 1
    assert not parts(build(HerdConfig()))[1].ray_actor_options.get("num_gpus")
