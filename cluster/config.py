"""What one engine may use and how it schedules. Values only; the tree they hang in is `deployments/config.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .sizes import parse_size

Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
"""A size in bytes, also written like 2GiB."""


class EngineConfig(BaseModel):
    """Settings of one engine replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(
        default=1, ge=1, description="engine replicas, each with the whole model and its own KV cache"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    threads: int | None = Field(default=None, ge=1, description="CPU compute threads (default: by the number of cores)")
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="tokens per KV block, lowered to a divisor of the attention chunk (default: 16 on CPU, 64 on GPU)",
    )
    kv_dtype: Literal["auto", "fp8"] = Field(
        default="auto", description="how keys and values are stored: auto as the model computes, fp8 halves them (GPU)"
    )
    numerics: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: equal requests give equal bits, whatever runs beside them; fast promises no such thing",
    )
    cuda_graphs: bool = Field(default=True, description="record decoding steps on a GPU and replay them")
    kv_memory: Bytes | None = Field(default=None, description="KV cache size, such as 2GiB (default: by free memory)")
    max_num_seqs: int = Field(default=64, ge=1, description="requests computed in one step at most")
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="tokens computed in one step at most (default: by the device)"
    )
    max_queued: int = Field(default=256, ge=0, description="requests that may wait; further ones are answered 429")
    prefix_caching: bool = Field(default=True, description="keep finished blocks and reuse them for equal prefixes")

    @model_validator(mode="after")
    def _every_request_can_decode(self) -> EngineConfig:
        step = self.max_num_batched_tokens
        if step is not None and step < self.max_num_seqs:
            raise ValueError(f"max_num_batched_tokens ({step}) must be at least max_num_seqs ({self.max_num_seqs})")
        return self
