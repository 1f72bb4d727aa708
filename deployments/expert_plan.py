"""Decides where engines and experts run: in one process or in shards, how many, on which device. A pure function of the
settings, the model's shape and what the cluster has; its result is a configuration that leaves nothing open."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..cluster.errors import PlacementError
from ..cluster.experts_config import ExpertsConfig
from ..cluster.placement import place
from ..cluster.router_spec import RouterSpec
from ..cluster.sizes import format_size
from ..model.config import Llama4Config
from ..model.fingerprint import fingerprint
from ..model.quantization import Part, expert_sizes, served_scheme, weight_sizes
from ..model.source import ModelSource
from .config import HerdConfig

logger = logging.getLogger(__name__)

_USABLE = 0.9
"""Share of a GPU's memory that weights may take; buffers and the runtime need the rest."""
_CPU_SHARDS = 2
_ITEM_BYTES = {"float32": 4}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a Ray cluster has."""

    gpus: float = 0.0
    gpu_bytes: int | None = None
    """Memory of the smallest GPU; None: not known."""
    node_bytes: tuple[int, ...] = ()
    """Memory of each node; empty: not known."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of one model, in bytes as served."""

    trunk: int
    """All but the routed experts."""
    routed: int
    """All routed experts."""
    layers: Mapping[int, int]
    """One expert, by layer."""
    units: int
    """Experts of all layers."""

    @property
    def weights(self) -> int:
        return self.trunk + self.routed

    @property
    def expert(self) -> int:
        """Of most layers."""
        return Counter(self.layers.values()).most_common(1)[0][0] if self.layers else 0

    def copies(self, experts: ExpertsConfig) -> int:
        """Experts to hold in all, counting copies."""
        return self.units * experts.replicas + int(self.units * experts.redundancy)

    def copies_bytes(self, experts: ExpertsConfig) -> int:
        """Of those, about: which of them get further copies is not known before they run."""
        return self.routed * self.copies(experts) // max(1, self.units)


def plan_experts(config: HerdConfig, shape: Llama4Config | None, resources: Resources) -> HerdConfig:
    """`config` with engine.device, experts.mode and, for shards, their number, device and GPUs decided.

    `shape` None: the model cannot be looked at here, so that only what the settings say counts. Raises PlacementError
    with numbers when the experts cannot fit, CheckpointError when the weights cannot be quantised as wanted.
    """
    engine = config.engine
    if engine.device == "auto":
        device = "cuda" if resources.gpus >= engine.replicas else "cpu"
        config = _changed(config, "engine", device=device)
    sizes = None if shape is None else _sizes(config, shape)
    mode = config.experts.mode
    if mode == "auto":
        wanted = config.experts.shards is not None or (sizes is not None and not _fits(config, sizes, resources))
        mode = "shards" if wanted else "local"
    if mode == "local":
        return _changed(config, "experts", mode=mode)
    config = _with_devices(_changed(config, "experts", mode=mode))
    shards = config.experts.shards or _shards(config, sizes, resources)
    config = _changed(config, "experts", shards=shards)
    _check_gpus(config, resources)
    if shape is not None and sizes is not None:
        _check_memory(config, shape, sizes, resources)
    logger.info("%s", _summary(config, sizes, resources))
    return config


def engine_gpus(config: HerdConfig) -> float:
    """GPUs that each engine reserves. Shards that share a GPU among themselves share it with engines too."""
    if config.engine.device != "cuda":
        return 0.0
    share = config.experts.gpus_per_shard
    return share if config.experts.mode == "shards" and share is not None and 0 < share < 1 else 1.0


def router_spec(config: HerdConfig, source: ModelSource, shape: Llama4Config) -> RouterSpec:
    """What the router of a planned configuration is there for; equal on every node. Raises CheckpointError."""
    assert config.experts.shards is not None
    sizes = _sizes(config, shape)
    return RouterSpec(
        model=fingerprint(source, dtype_name(config, shape), config.model.seed, config.model.quantize),
        layers=tuple(sorted(shape.moe_layers)),
        num_experts=shape.num_experts,
        expert_bytes=sizes.expert,
        other_bytes=tuple((layer, size) for layer, size in sizes.layers.items() if size != sizes.expert),
        shards=config.experts.shards,
        replicas=config.experts.replicas,
        redundancy=config.experts.redundancy,
    )


def dtype_name(config: HerdConfig, shape: Llama4Config) -> str:
    """The number format in which the model is served."""
    return shape.dtype if config.model.dtype == "auto" else config.model.dtype


def _changed(config: HerdConfig, section: str, **values: Any) -> HerdConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _sizes(config: HerdConfig, shape: Llama4Config) -> _Sizes:
    """Of a checkpoint that is quantised: as its configuration says."""
    scheme = served_scheme(config.model.quantize, shape)
    item_bytes = _ITEM_BYTES.get(dtype_name(config, shape), 2)
    sizes = weight_sizes(shape, scheme, item_bytes)
    routed = sizes.pop(Part.ROUTED, 0)
    layers = expert_sizes(shape, scheme, item_bytes)
    return _Sizes(sum(sizes.values()), routed, layers, len(layers) * shape.num_experts)


def _fits(config: HerdConfig, sizes: _Sizes, resources: Resources) -> bool:
    """Whether one device holds the whole model. What is not known is no obstacle."""
    if config.engine.device == "cuda":
        return resources.gpu_bytes is None or sizes.weights <= resources.gpu_bytes * _USABLE
    nodes = resources.node_bytes
    return not nodes or math.ceil(config.engine.replicas / len(nodes)) * sizes.weights <= max(nodes)


def _with_devices(config: HerdConfig) -> HerdConfig:
    experts = config.experts
    device = config.engine.device if experts.device == "auto" else experts.device
    gpus = experts.gpus_per_shard
    if gpus is None:
        gpus = 1.0 if device == "cuda" else 0.0
    return _changed(config, "experts", device=device, gpus_per_shard=gpus)


def _room(config: HerdConfig, resources: Resources) -> int:
    """Shards for which there are GPUs beside the engines'."""
    free = resources.gpus - engine_gpus(config) * config.engine.replicas
    return max(0, int(free / _gpus_each(config) + 1e-6))


def _gpus_each(config: HerdConfig) -> float:
    assert config.experts.gpus_per_shard is not None
    return config.experts.gpus_per_shard


def _shards(config: HerdConfig, sizes: _Sizes | None, resources: Resources) -> int:
    """As many as there are GPUs; without GPUs, few, but enough to spread over the nodes' memory."""
    least = max(_CPU_SHARDS, config.experts.replicas)
    if _gpus_each(config) > 0:
        return max(1, config.experts.replicas, _room(config, resources))
    if sizes is None or not resources.node_bytes:
        return least
    needed = sizes.copies_bytes(config.experts)
    return least if needed <= min(resources.node_bytes) else max(least, len(resources.node_bytes))


def _check_gpus(config: HerdConfig, resources: Resources) -> None:
    each, shards = _gpus_each(config), config.experts.shards
    assert shards is not None
    if each > 0 and shards > _room(config, resources):
        engines = engine_gpus(config) * config.engine.replicas
        raise PlacementError(
            f"{shards} expert shards need {shards * each:g} GPUs"
            + (f" beside the {engines:g} of the engines" if engines else "")
            + f", and the cluster has {resources.gpus:g}; lower experts.shards, let processes share GPUs with "
            "experts.gpus_per_shard, such as 0.5, or compute the experts with experts.device=cpu"
        )


def _check_memory(config: HerdConfig, shape: Llama4Config, sizes: _Sizes, resources: Resources) -> None:
    experts, engine = config.experts, config.engine
    assert experts.shards is not None
    if not sizes.units:
        raise PlacementError("the model has no routed experts that could be in shards; use experts.mode=local")
    capacity = experts.memory
    if capacity is None and experts.device == "cuda" and resources.gpu_bytes is not None:
        capacity = int(resources.gpu_bytes * min(1.0, _gpus_each(config) or 1.0) * _USABLE)
    place(
        {(layer, expert): size for layer, size in sizes.layers.items() for expert in range(shape.num_experts)},
        [capacity] * experts.shards,
        nodes=[""] * experts.shards,
        replicas=experts.replicas,
        redundancy=experts.redundancy,
    )
    if not resources.node_bytes:
        return
    trunks = engine.replicas * sizes.trunk if engine.device == "cpu" else 0
    copies = sizes.copies_bytes(experts) if experts.device == "cpu" else 0
    if trunks + copies > sum(resources.node_bytes):
        raise PlacementError(
            f"the engines need {format_size(trunks)} of memory and the experts {format_size(copies)} "
            f"({sizes.copies(experts)} copies of {format_size(sizes.expert)}), {format_size(trunks + copies)} in all, "
            f"and the cluster has {format_size(sum(resources.node_bytes))}"
        )


def _summary(config: HerdConfig, sizes: _Sizes | None, resources: Resources) -> str:
    experts = config.experts
    text = f"experts: {experts.shards} shards on {experts.device}"
    if sizes is not None:
        text += f", {sizes.copies(experts)} copies of {sizes.units} experts of {format_size(sizes.expert)}"
    if _gpus_each(config):
        text += f", {_gpus_each(config):g} GPUs each of {resources.gpus:g}"
    return text
