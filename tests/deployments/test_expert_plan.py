from __future__ import annotations

import json
from typing import Any

import pytest

from herd.cluster.errors import PlacementError
from herd.cluster.router_spec import RouterSpec
from herd.deployments.config import HerdConfig, load_config
from herd.deployments.expert_plan import Resources, engine_gpus, plan_experts, router_spec
from herd.model.checkpoint_error import CheckpointError
from herd.model.config import Llama4Config, parse_config
from herd.model.presets import PRESETS
from herd.model.quantization import SCHEMES
from herd.model.quantization_config import quantization_config
from herd.model.source import resolve_model

GIB = 1 << 30
SCOUT = parse_config(dict(PRESETS["scout"].config))
"""200 GiB in bfloat16, of which 180 GiB are experts: 48 layers of 16 at 240 MiB each."""


def plan(*sets: str, shape: Llama4Config | None = SCOUT, **resources: Any) -> HerdConfig:
    return plan_experts(load_config(sets=sets, env={}).config, shape, Resources(**resources))


def chosen(config: HerdConfig) -> tuple[Any, ...]:
    experts = config.experts
    return config.engine.device, experts.mode, experts.shards, experts.device, experts.gpus_per_shard


CPU_LARGE: dict[str, Any] = {"node_bytes": (512 * GIB,)}
H100S: dict[str, Any] = {"gpus": 8, "gpu_bytes": 80 * GIB}


def test_what_fits_one_device_stays_there() -> None:
    large_gpu = Resources(gpus=1, gpu_bytes=640 * GIB)
    for resources, device in ((Resources(), "cpu"), (Resources(**CPU_LARGE), "cpu"), (large_gpu, "cuda")):
        config = plan_experts(HerdConfig(), SCOUT, resources)
        assert (config.experts.mode, config.experts.shards) == ("local", None)
        assert config.engine.device == device
        assert config == plan_experts(config, SCOUT, resources)


@pytest.mark.parametrize(
    ("sets", "resources", "expected"),
    [
        (["experts.shards=3"], CPU_LARGE, ("cpu", "shards", 3, "cpu", 0.0)),
        (["experts.mode=shards"], CPU_LARGE, ("cpu", "shards", 2, "cpu", 0.0)),
        (["experts.mode=shards"], {}, ("cpu", "shards", 2, "cpu", 0.0)),
        (["experts.mode=shards", "experts.replicas=2"], CPU_LARGE, ("cpu", "shards", 2, "cpu", 0.0)),
        ([], {"node_bytes": (128 * GIB,) * 4}, ("cpu", "shards", 4, "cpu", 0.0)),
        ([], H100S, ("cuda", "shards", 7, "cuda", 1.0)),
        (["engine.replicas=4"], H100S, ("cuda", "shards", 4, "cuda", 1.0)),
        (["engine.device=cpu"], H100S | CPU_LARGE | {"gpus": 2, "gpu_bytes": 640 * GIB}, None),
        (["experts.shards=4", "engine.device=cpu", "experts.device=cuda"], H100S, ("cpu", "shards", 4, "cuda", 1.0)),
        (["experts.shards=4", "experts.device=cpu"], H100S, ("cuda", "shards", 4, "cpu", 0.0)),
        (
            ["experts.shards=3", "experts.device=cpu", "experts.gpus_per_shard=2"],
            {"gpus": 7},
            ("cuda", "shards", 3, "cpu", 2.0),
        ),
        (
            ["experts.mode=shards", "experts.gpus_per_shard=0.25"],
            {"gpus": 1, "gpu_bytes": 900 * GIB},
            ("cuda", "shards", 3, "cuda", 0.25),
        ),
    ],
)
def test_how_many_shards_and_where(
    sets: list[str], resources: dict[str, Any], expected: tuple[Any, ...] | None
) -> None:
    config = plan(*sets, **resources)
    if expected is None:
        assert config.experts.mode == "local"
    else:
        assert chosen(config) == expected


def test_a_fraction_of_a_gpu_is_shared_with_the_engine() -> None:
    assert engine_gpus(plan("experts.mode=shards", "experts.gpus_per_shard=0.25", gpus=1)) == 0.25
    assert engine_gpus(plan("experts.mode=shards", **H100S)) == 1
    assert engine_gpus(plan(gpus=1)) == 1
    assert engine_gpus(plan(**CPU_LARGE)) == 0


@pytest.mark.parametrize(
    ("sets", "resources", "words"),
    [
        (["experts.shards=8"], H100S, ("8 expert shards need 8 GPUs", "beside the 1 of the engines", "has 8")),
        (["experts.shards=2"], {"gpus": 1}, ("need 2 GPUs", "experts.device=cpu", "gpus_per_shard")),
        ([], {"gpus": 1, "gpu_bytes": 80 * GIB}, ("1 expert shards need 1 GPUs",)),
        (["experts.shards=2"], H100S, ("GiB",)),
        (["experts.shards=2", "experts.memory=10GiB"], CPU_LARGE, ("GiB",)),
        (["experts.shards=2", "experts.replicas=3"], CPU_LARGE, ("3", "2")),
        (["experts.shards=4"], {"node_bytes": (50 * GIB, 50 * GIB)}, ("180 GiB", "100 GiB", "768 copies of 240 MiB")),
        (["experts.shards=4", "experts.replicas=2", "engine.replicas=2"], {"node_bytes": (256 * GIB,)}, ("360 GiB",)),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers(
    sets: list[str], resources: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlacementError) as refused:
        plan(*sets, **resources)
    for word in words:
        assert word in refused.value.message


def test_a_model_that_cannot_be_looked_at_is_planned_by_the_settings() -> None:
    assert plan(shape=None, **CPU_LARGE).experts.mode == "local"
    assert chosen(plan("experts.shards=3", shape=None)) == ("cpu", "shards", 3, "cpu", 0.0)
    assert chosen(plan("experts.mode=shards", shape=None)) == ("cpu", "shards", 2, "cpu", 0.0)


def test_a_model_without_experts_has_no_shards() -> None:
    dense = SCOUT.model_copy(update={"moe_layers": frozenset()})
    with pytest.raises(PlacementError, match=r"experts\.mode=local"):
        plan("experts.shards=2", shape=dense)


def test_the_number_format_counts() -> None:
    between: dict[str, Any] = {"node_bytes": (300 * GIB,)}
    assert plan(**between).experts.mode == "local"
    with pytest.raises(PlacementError):
        plan("model.dtype=float32", **between)


def test_quantised_weights_need_less_room() -> None:
    one_gpu: dict[str, Any] = {"gpus": 1, "gpu_bytes": 80 * GIB}
    assert chosen(plan("model.quantize=int4", **one_gpu)) == ("cuda", "local", None, "auto", None)
    with pytest.raises(PlacementError):
        plan(**one_gpu)
    with pytest.raises(PlacementError, match=r"768 copies of 61\.9 MiB"):
        plan("model.quantize=int4", "experts.shards=4", node_bytes=(10 * GIB,) * 4)


def test_a_quantised_checkpoint_is_sized_as_it_says() -> None:
    """And the layers whose experts take more are told apart."""
    source = resolve_model("scout", load_format="dummy", cache_dir=None)
    said = quantization_config(SCHEMES["int4"], SCOUT)
    shape = parse_config(dict(PRESETS["scout"].config) | {"quantization_config": said})
    declared = router_spec(plan("experts.shards=5", shape=shape, **CPU_LARGE), source, shape)
    wanted = router_spec(plan("experts.shards=5", "model.quantize=int4", **CPU_LARGE), source, SCOUT)
    assert declared.sizes == wanted.sizes
    assert declared.model != wanted.model, "quantised here or there: never taken for the same weights"
    assert len(set(wanted.sizes.values())) == 2
    assert [layer for layer, _ in wanted.other_bytes] == [0, 47]
    assert wanted.num_bytes([(0, 1), (1, 1)]) == wanted.sizes[0, 1] + wanted.expert_bytes
    assert RouterSpec.from_wire(json.loads(json.dumps(wanted.to_wire()))) == wanted
    with pytest.raises(CheckpointError, match="quantised already"):
        plan("model.quantize=int8", shape=shape, **CPU_LARGE)


def test_the_router_is_told_what_was_planned() -> None:
    source = resolve_model("scout", load_format="dummy", cache_dir=None)
    spec = router_spec(plan("experts.shards=5", "experts.redundancy=0.25", **CPU_LARGE), source, SCOUT)
    assert (spec.shards, spec.replicas, spec.redundancy) == (5, 1, 0.25)
    assert (spec.layers, spec.num_experts, spec.expert_bytes) == (tuple(range(48)), 16, 3 * 5120 * 8192 * 2)
    other = router_spec(plan("experts.shards=5", "model.dtype=float32", node_bytes=(1 << 50,)), source, SCOUT)
    assert (other.model, other.expert_bytes) != (spec.model, spec.expert_bytes)
    assert other.expert_bytes == 2 * spec.expert_bytes
