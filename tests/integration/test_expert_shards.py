"""The whole stack with its experts in processes of their own: the same answers as without, whatever is killed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from herd.deployments.config import parse_tree
from herd.deployments.expert_plan import Resources, plan_experts, router_spec
from herd.deployments.router_client import RouterAway, RouterClient
from herd.model.config import parse_config
from herd.model.source import resolve_model
from herd.model.tokenizer import Tokenizer

from .live_app import CALL_S, LiveApp, deploy_app, write_tiny

PROMPTS = ["The herd moved", "One expert", "Rows of activations travel", "", "x " * 150]


def config_of(folder: Path, **experts: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder), "load_format": "dummy"},
        "engine": {"kv_memory": "16MiB", "threads": 1},
        "experts": {"threads": 1} | experts,
        "gateway": {"max_inflight": 64},
        "http": {"drain_timeout_s": 5},
    }


@dataclass(frozen=True)
class ShardedApp(LiveApp):
    """An application whose experts are in shards, and its router."""

    router: RouterClient

    def status(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What the router says, as soon as it is as wanted."""
        deadline = time.monotonic() + CALL_S
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            with suppress(RouterAway):
                status = self.router.call("status")
                if condition(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(json.dumps(status, indent=1))


def deploy_shards(base_url: str, name: str, folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> ShardedApp:
    app = deploy_app(base_url, name, folder.name, tokenizer, config)
    source = resolve_model(str(folder), load_format="dummy", cache_dir=None)
    shape = parse_config(source.config_json)
    spec = router_spec(plan_experts(parse_tree(config), shape, Resources()), source, shape)
    return ShardedApp(**vars(app), router=RouterClient(name, spec))


@pytest.fixture(scope="module")
def shard_app(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardedApp]:
    """The model of `tiny_app` on three shards with two copies of every expert."""
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    tokenizer = write_tiny(folder)
    yield deploy_shards(ray_session, "shards", folder, tokenizer, config_of(folder, shards=3, replicas=2))
    importlib.import_module("ray.serve").delete("shards")


def completions(app: LiveApp) -> list[str]:
    with app.client() as client:
        made = client.completions.create(model=app.model, prompt=PROMPTS, max_tokens=16, temperature=0.0)
    return [choice.text for choice in made.choices]


def is_whole(status: dict[str, Any]) -> bool:
    states = [shard["state"] for shard in status.get("shards", ())]
    return states == ["ready"] * 3 and all(engine["epoch"] == status["epoch"] for engine in status["engines"])


def test_answers_are_those_of_one_process(shard_app: ShardedApp, tiny_app: LiveApp) -> None:
    assert completions(shard_app) == completions(tiny_app)
    stats = shard_app.wait_for("experts_shards_connected == 3")
    assert stats["experts_missing"] == 0
    shard_app.assert_idle()


def test_the_status_says_where_every_expert_is(shard_app: ShardedApp) -> None:
    completions(shard_app)
    status = shard_app.status(lambda s: is_whole(s) and sum(shard["rows"] for shard in s["shards"]) > 0)
    experts = status["experts"]
    assert (experts["layers"], experts["per_layer"], experts["copies"], experts["missing"]) == (4, 4, 32, 0)
    assert sum(shard["experts"] for shard in status["shards"]) == 32
    assert len({shard["pid"] for shard in status["shards"]}) == 3
    assert len(status["engines"]) == 1


def test_a_killed_shard_is_replaced_without_anybody_noticing(shard_app: ShardedApp) -> None:
    before = completions(shard_app)
    victim = shard_app.status(is_whole)["shards"][0]
    os.kill(victim["pid"], signal.SIGKILL)
    assert completions(shard_app) == before
    after = shard_app.status(
        lambda s: is_whole(s) and victim["shard_id"] not in [shard["shard_id"] for shard in s["shards"]]
    )
    assert {shard["slot"] for shard in after["shards"]} == {0, 1, 2}
    assert completions(shard_app) == before


def test_a_killed_router_comes_back_unnoticed(shard_app: ShardedApp) -> None:
    before = completions(shard_app)
    status = shard_app.status(is_whole)
    os.kill(status["router"]["pid"], signal.SIGKILL)
    assert completions(shard_app) == before

    def is_back(status: dict[str, Any]) -> bool:
        return status["router"]["restarts"] > 0 and is_whole(status)

    after = shard_app.status(is_back)
    assert {shard["shard_id"] for shard in after["shards"]} == {shard["shard_id"] for shard in status["shards"]}
    assert after["epoch"] == status["epoch"]


@pytest.mark.chaos
def test_a_hung_shard_is_replaced(shard_app: ShardedApp) -> None:
    """Stopped, not dead: its sockets stay open. Serve's health check has to find it; requests go to its copies."""
    before = completions(shard_app)
    victim = shard_app.status(is_whole)["shards"][1]
    old = {shard["shard_id"] for shard in shard_app.status(is_whole)["shards"]}
    began = time.monotonic()
    os.kill(victim["pid"], signal.SIGSTOP)
    assert completions(shard_app) == before
    answered_s = time.monotonic() - began
    shard_app.status(lambda s: any(shard["shard_id"] not in old for shard in s["shards"]))
    noticed_s = time.monotonic() - began
    shard_app.status(lambda s: is_whole(s) and victim["shard_id"] not in [x["shard_id"] for x in s["shards"]])
    replaced_s = time.monotonic() - began
    print(
        f"hung shard: answers after {answered_s:.1f} s, next one asks at {noticed_s:.1f} s, serves {replaced_s:.1f} s"
    )
    assert completions(shard_app) == before


@pytest.mark.chaos
def test_a_shard_that_hung_for_a_moment_comes_back(shard_app: ShardedApp) -> None:
    """It was let go of, but no check of Serve has failed three times: it need not load again."""
    before = completions(shard_app)
    victim = shard_app.status(is_whole)["shards"][2]
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        shard_app.status(lambda s: victim["shard_id"] not in [shard["shard_id"] for shard in s["shards"]])
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    status = shard_app.status(is_whole)
    assert victim["pid"] in [shard["pid"] for shard in status["shards"]]
    assert completions(shard_app) == before


@pytest.mark.slow
def test_shards_stay_for_engines_that_drain(ray_session: str, tmp_path: Path) -> None:
    """Without a second copy of anything: all of the application is told to go while an answer is being made."""
    serve = importlib.import_module("ray.serve")
    folder = tmp_path / "draining"
    tokenizer = write_tiny(folder)
    config = config_of(folder, shards=2) | {"http": {"drain_timeout_s": 60}}
    app = deploy_shards(ray_session, "draining", folder, tokenizer, config)
    with app.client() as client:
        stream = client.completions.create(
            model=app.model, prompt="Slowly", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        serve.delete("draining", _blocking=False)
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == "length"
    app.status(lambda status: not status["shards"])


MAVERICK = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "intermediate_size": 32}


@pytest.mark.slow
def test_128_experts_on_seven_shards_with_room_to_spare(ray_session: str, tmp_path: Path) -> None:
    """Like Maverick: experts in every other layer, dense layers between; 25 % of the experts have a second copy."""
    serve = importlib.import_module("ray.serve")
    folder = tmp_path / "maverick-like"
    tokenizer = write_tiny(folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | MAVERICK))
    config = config_of(folder, mode="local")
    alone = deploy_app(ray_session, "alone", folder.name, tokenizer, config)
    expected = completions(alone)
    serve.delete("alone")
    app = deploy_shards(ray_session, "seven", folder, tokenizer, config_of(folder, shards=7, redundancy=0.25))
    try:
        assert completions(app) == expected
        status = app.status(lambda s: len(s["shards"]) == 7)
        experts = status["experts"]
        assert (experts["layers"], experts["units"], experts["copies"], experts["missing"]) == (2, 256, 320, 0)
        assert max(shard["experts"] for shard in status["shards"]) <= 46
    finally:
        serve.delete("seven")
