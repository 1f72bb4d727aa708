"""What Serve is told. Nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application

from herd.cluster.errors import PlacementError
from herd.deployments import app
from herd.deployments.app import build
from herd.deployments.config import ConfigError, ModelConfig, load_config
from herd.deployments.expert_plan import Resources, plan_experts


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
        assert (
            gateway.init_args[0]
            == engine.init_args[0]
            == plan_experts(config, None, Resources()).model_dump(mode="json")
        )


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
def test_where_engines_run(
    device: str, replicas: int, gpus: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "cluster_resources", lambda: Resources(gpus=gpus))
    engine = parts(build({"engine": {"device": device, "replicas": replicas}}))[1]
    assert engine.init_args[0]["engine"]["device"] == chosen
    assert bool(engine.ray_actor_options.get("num_gpus")) == (chosen == "cuda")


def shards_of(config: dict[str, Any]) -> Any:
    application = parts(build(config))[1].init_args[1]
    return None if application is None else application._bound_deployment


def test_without_shards_there_is_no_further_deployment() -> None:
    assert shards_of({}) is None
    assert shards_of({"experts": {"mode": "local", "shards": 3}}) is None


def test_shards_are_a_deployment_of_the_same_tree() -> None:
    config = {"experts": {"shards": 3, "replicas": 2}, "http": {"drain_timeout_s": 77}}
    gateway, engine = parts(build(config))
    shards = shards_of(config)
    assert (shards.name, shards.num_replicas) == ("ExpertShard", 3)
    assert shards.init_args[0] == engine.init_args[0] == gateway.init_args[0]
    assert engine.init_args[0]["experts"]["mode"] == "shards"
    assert not shards.ray_actor_options.get("num_gpus")
    assert shards._replica_config.placement_group_bundles is None
    # They stay as long as engines that drain may need them.
    assert shards._deployment_config.graceful_shutdown_timeout_s > 77


def test_shards_reserve_the_cpus_that_they_are_given() -> None:
    """On a cluster, a way to say which nodes may have them."""
    assert shards_of({"experts": {"shards": 2, "cpus_per_shard": 3}}).ray_actor_options["num_cpus"] == 3


def test_a_hung_shard_is_found_within_five_seconds() -> None:
    """A check that gets no answer counts as failed once it has timed out; Serve believes the third."""
    options = shards_of({"experts": {"shards": 2}})._deployment_config
    jitter, control_loop_s = 1.1, 0.1
    checks_s = 3 * (options.health_check_timeout_s + control_loop_s)
    assert options.health_check_period_s * jitter + control_loop_s + checks_s < 5
    assert checks_s > 3.5  # and a loaded machine gets some time


def test_shards_on_gpus_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "cluster_resources", lambda: Resources(gpus=4))
    shards = shards_of({"experts": {"mode": "shards"}})
    assert shards.num_replicas == 3
    (bundle,) = shards._replica_config.placement_group_bundles
    assert bundle["GPU"] == 1
    assert shards.ray_actor_options["num_gpus"] == 1
    assert shards.ray_actor_options["num_cpus"] <= bundle["CPU"]


def test_experts_that_do_not_fit_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "cluster_resources", lambda: Resources(node_bytes=(1 << 30,)))
    with pytest.raises(PlacementError, match="GiB"):
        build({"model": {"path": "scout", "load_format": "dummy"}})
    assert shards_of({"model": {"path": "scout", "load_format": "dummy"}, "experts": {"mode": "local"}}) is None


def test_a_model_is_looked_at_where_it_can_be(tmp_path: Path) -> None:
    shape = app.model_shape(ModelConfig(path="maverick"))
    assert shape is not None
    assert shape.num_experts == 128
    assert app.model_shape(ModelConfig(path=str(tmp_path / "elsewhere"))) is None
    (tmp_path / "config.json").write_text("{}")
    assert app.model_shape(ModelConfig(path=str(tmp_path), load_format="dummy")) is None
