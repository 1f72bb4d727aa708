"""The shape of a Llama 4 text model, read from a Hugging Face `config.json` in either dialect (transformers 4.51 and
5.x). Owns names, defaults and validity; knows nothing of weights, tensors or processes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .quantization import Scheme
from .quantization_config import declared_scheme


class ConfigError(ValueError):
    """A config.json that Herd cannot serve; the message names the key."""


class RopeScaling(BaseModel):
    """Frequency scaling of Llama 3.1 ("llama3" rope type)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)


class Llama4Config(BaseModel):
    """Text model of Llama 4. One letter per dimension elsewhere: D hidden_size, H num_heads, K num_kv_heads,
    E num_experts, F expert_width, L num_layers, V vocab_size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    expert_width: int = Field(gt=0)
    """Width of each routed and shared expert (`intermediate_size`)."""
    dense_width: int = Field(gt=0)
    """Width of the MLP in layers without experts (`intermediate_size_mlp`)."""
    num_experts: int = Field(gt=0)
    experts_per_token: int = Field(gt=0)
    moe_layers: frozenset[int]
    rope_layers: frozenset[int]
    """Layers with rotary positions and chunked attention; the others (NoPE) see the whole context."""
    attention_chunk_size: int | None = Field(None, gt=0)
    """None: RoPE layers see the whole context too."""
    use_qk_norm: bool = True
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(500000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    attn_temperature_tuning: bool = True
    floor_scale: float = Field(8192, gt=0)
    attn_scale: float = 0.1
    tie_word_embeddings: bool = False
    max_position_embeddings: int = Field(gt=0)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    """The checkpoint's own dtype name."""
    multimodal: bool = False
    """The checkpoint also holds a vision tower, and its text tensors are prefixed with `language_model.`"""
    quantization: Scheme | None = None
    """What the checkpoint says of its number formats; None where it is not quantised."""

    @property
    def tensor_prefix(self) -> str:
        """What stands before `model.` in the checkpoint's tensor names."""
        return "language_model." if self.multimodal else ""

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def is_local(self, layer: int) -> bool:
        """Whether the layer looks at its own attention chunk only."""
        return layer in self.rope_layers and self.attention_chunk_size is not None

    @property
    def num_local_layers(self) -> int:
        return sum(self.is_local(i) for i in range(self.num_layers))

    @property
    def num_parameters(self) -> int:
        """Parameters of the text model (facts: two embeddings unless tied, attention, experts, norms)."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        expert = 3 * self.hidden_size * self.expert_width
        moe = len(self.moe_layers) * (self.hidden_size * self.num_experts + (self.num_experts + 1) * expert)
        dense = (self.num_layers - len(self.moe_layers)) * 3 * self.hidden_size * self.dense_width
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        norms = self.hidden_size * (2 * self.num_layers + 1)
        return embeddings + norms + self.num_layers * attention + moe + dense

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token touches."""
        idle = self.num_experts - self.experts_per_token
        return self.num_parameters - len(self.moe_layers) * idle * 3 * self.hidden_size * self.expert_width


def load_config(path: Path, generation: Mapping[str, Any] | None = None) -> Llama4Config:
    """Read a `config.json` file. Raises ConfigError when it is unreadable or not Llama 4."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_config(raw, generation)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Llama4Config:
    """Build the config from a parsed `config.json` (multimodal or text-only) and, for the end-of-sequence ids, a
    parsed `generation_config.json`. Raises ConfigError, and CheckpointError for a kind of quantisation that Herd cannot
    compute with."""
    if not isinstance(raw, Mapping):
        raise ConfigError("config.json holds no object")
    kind = raw.get("model_type")
    if kind not in ("llama4", "llama4_text"):
        raise ConfigError(f"model_type is {kind!r}; Herd serves llama4 and llama4_text")
    text = raw.get("text_config", raw)
    if not isinstance(text, Mapping):
        raise ConfigError("text_config holds no object")
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [key for key in required if text.get(key) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    if text.get("attention_bias"):
        raise ConfigError("attention_bias is true: Llama 4 has no attention bias")
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {text['hidden_act']!r}: Llama 4 uses silu")
    try:
        config = _build(text, raw, generation or {})
    except ConfigError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json: {error}") from error
    _check(config)
    _check_layer_types(config, text.get("layer_types"))
    declared = raw.get("quantization_config", text.get("quantization_config"))
    return config.model_copy(update={"quantization": declared_scheme(declared, config)})


def _build(text: Mapping[str, Any], raw: Mapping[str, Any], generation: Mapping[str, Any]) -> Llama4Config:
    num_layers = int(text["num_hidden_layers"])
    num_heads = int(text["num_attention_heads"])
    theta, scaling = _rope(text)
    return Llama4Config(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads") or num_heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // num_heads,
        expert_width=text["intermediate_size"],
        dense_width=text.get("intermediate_size_mlp") or text["intermediate_size"],
        num_experts=text.get("num_local_experts") or 16,
        experts_per_token=text.get("num_experts_per_tok") or 1,
        moe_layers=_moe_layers(text, num_layers),
        rope_layers=_rope_layers(text, num_layers),
        attention_chunk_size=text.get("attention_chunk_size", 8192),
        use_qk_norm=bool(text.get("use_qk_norm", True)),
        rms_norm_eps=text.get("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        attn_temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
        floor_scale=text.get("floor_scale", 8192),
        attn_scale=text.get("attn_scale", 0.1),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        max_position_embeddings=text.get("max_position_embeddings") or 131072,
        bos_token_id=text.get("bos_token_id", raw.get("bos_token_id")),
        eos_token_ids=_as_ids(generation.get("eos_token_id", text.get("eos_token_id", raw.get("eos_token_id")))),
        dtype=_dtype_name(text, raw),
        multimodal="text_config" in raw,
    )


def _check(config: Llama4Config) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key/value heads")
    if config.experts_per_token > config.num_experts:
        raise ConfigError(f"num_experts_per_tok {config.experts_per_token} exceeds {config.num_experts} experts")
    for name, layers in (("moe_layers", config.moe_layers), ("no_rope_layers", config.rope_layers)):
        if any(not 0 <= i < config.num_layers for i in layers):
            raise ConfigError(f"{name} names a layer outside 0..{config.num_layers - 1}")


def _check_layer_types(config: Llama4Config, types: Any) -> None:
    """`layer_types` may only repeat what RoPE layers and chunk size already say: Herd chunks exactly those layers."""
    if not types or config.attention_chunk_size is None:
        return
    expected = ["chunked_attention" if config.is_local(i) else "full_attention" for i in range(config.num_layers)]
    if list(types) != expected:
        raise ConfigError("layer_types disagrees with no_rope_layers: RoPE layers must be chunked, all others full")


def _rope(text: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    merged: dict[str, Any] = {"rope_theta": text.get("rope_theta") or 500000.0}
    merged.update(text.get("rope_scaling") or {})
    merged.update(text.get("rope_parameters") or {})
    kind = merged.get("rope_type") or merged.get("type") or "default"
    theta = float(merged["rope_theta"])
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"rope type {kind!r} is unknown; Llama 4 uses default or llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if merged.get(key) is None]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}")
    return theta, RopeScaling(**{key: merged[key] for key in keys})


def _rope_layers(text: Mapping[str, Any], num_layers: int) -> frozenset[int]:
    """In `no_rope_layers` 1 means that the layer DOES use RoPE; absent or empty falls back to the interval."""
    flags = text.get("no_rope_layers")
    if flags:
        if len(flags) != num_layers:
            raise ConfigError(f"no_rope_layers has {len(flags)} entries for {num_layers} layers")
        return frozenset(i for i, flag in enumerate(flags) if flag)
    interval = text.get("no_rope_layer_interval") or 4
    return frozenset(i for i in range(num_layers) if (i + 1) % interval)


def _moe_layers(text: Mapping[str, Any], num_layers: int) -> frozenset[int]:
    named = text.get("moe_layers")
    if named is not None:
        return frozenset(named)
    step = text.get("interleave_moe_layer_step") or 1
    return frozenset(range(step - 1, num_layers, step))


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _dtype_name(text: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    for source in (text, raw):
        for key in ("dtype", "torch_dtype"):
            if isinstance(source.get(key), str):
                return source[key]
    return "bfloat16"


def rope_frequencies(config: Llama4Config) -> list[float]:
    """Angular frequency of each of the head_dim / 2 rotary pairs, radians per position, in double precision.

    f_j = theta^(-2j/d), then llama3 scaling: wavelengths above original/low are slowed by `factor`, below
    original/high kept, blended between. With low == high the middle band is empty.
    """
    d = config.head_dim
    plain = [config.rope_theta ** (-2 * j / d) for j in range(d // 2)]
    s = config.rope_scaling
    if s is None:
        return plain
    out = []
    for f in plain:
        wavelength = 2 * math.pi / f
        original = s.original_max_position_embeddings
        if wavelength > original / s.low_freq_factor:
            out.append(f / s.factor)
        elif wavelength < original / s.high_freq_factor or s.low_freq_factor == s.high_freq_factor:
            out.append(f)
        else:
            mix = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            out.append((1 - mix) * f / s.factor + mix * f)
    return out
