"""Where the routed experts live and how long anybody waits for them. Values only; the tree they hang in is
`deployments/config.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .config import Bytes


class ExpertsConfig(BaseModel):
    """Settings of the expert shards and of the engines' way to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["auto", "local", "shards"] = Field(
        default="auto",
        description="experts in the engine's process, or in shards (auto: shards if experts.shards is set or the "
        "model does not fit one device)",
    )
    shards: int | None = Field(default=None, ge=1, description="expert shard processes (default: by the model's size)")
    replicas: int = Field(default=1, ge=1, description="copies of every expert, each on another shard")
    redundancy: float = Field(
        default=0.0, ge=0.0, le=8.0, description="room for further copies of busy experts; 0.25 is 25 % more"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where shards compute")
    gpus_per_shard: float | None = Field(
        default=None, ge=0.0, description="GPUs that each shard reserves in Ray (default: 1 on cuda, else 0)"
    )
    cpus_per_shard: float = Field(
        default=0.1,
        ge=0.0,
        description="CPUs that each shard reserves in Ray; what it computes with is experts.threads",
    )
    memory: Bytes | None = Field(default=None, description="most that one shard's experts may take, such as 40GiB")
    threads: int | None = Field(default=None, ge=1, description="CPU compute threads of a shard (default: by cores)")
    call_timeout_s: float = Field(
        default=1.0, gt=0, description="a shard that takes longer for one call is passed over for a replica"
    )
    recovery_timeout_s: float = Field(
        default=120.0, ge=0, description="how long requests wait for an expert that no shard hosts; then 503"
    )
    hedge_after_s: float | None = Field(
        default=None, gt=0, description="a call that takes longer is sent to a replica as well (default: never)"
    )
    hedge_share: float = Field(default=0.05, ge=0.0, le=1.0, description="most calls that are sent twice, as a share")
    micro_batches: Literal["auto", "on", "off"] = Field(
        default="auto", description="two half batches, one's attention beside the other's experts (auto: when faster)"
    )
