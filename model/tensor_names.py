"""Names and shapes of a Llama 4 text checkpoint's tensors (Hugging Face layout, bf16 release)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Llama4Config


def layer_name(config: Llama4Config, layer: int, suffix: str) -> str:
    """Full name of a tensor of one decoder layer."""
    return f"{config.tensor_prefix}model.layers.{layer}.{suffix}"


def top_name(config: Llama4Config, suffix: str) -> str:
    """Full name of a tensor outside the layers."""
    return f"{config.tensor_prefix}{suffix}"


def layer_of(name: str) -> int | None:
    """The decoder layer that a text tensor belongs to; None outside the layers."""
    _, found, rest = name.partition("model.layers.")
    return int(rest.partition(".")[0]) if found else None


def text_tensors(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Every text tensor with its shape. Linear weights are [out, in]; experts are fused [E, in, out], no `.weight`."""
    D, d = config.hidden_size, config.head_dim
    H, K, E, F, M = config.num_heads, config.num_kv_heads, config.num_experts, config.expert_width, config.dense_width
    out: dict[str, tuple[int, ...]] = {
        top_name(config, "model.embed_tokens.weight"): (config.vocab_size, D),
        top_name(config, "model.norm.weight"): (D,),
    }
    if not config.tie_word_embeddings:
        out[top_name(config, "lm_head.weight")] = (config.vocab_size, D)
    for i in range(config.num_layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (H * d, D),
            "self_attn.k_proj.weight": (K * d, D),
            "self_attn.v_proj.weight": (K * d, D),
            "self_attn.o_proj.weight": (D, H * d),
        }
        if config.is_moe(i):
            shapes["feed_forward.router.weight"] = (E, D)
            shapes["feed_forward.experts.gate_up_proj"] = (E, D, 2 * F)
            shapes["feed_forward.experts.down_proj"] = (E, F, D)
            mlp, width = "feed_forward.shared_expert", F
        else:
            mlp, width = "feed_forward", M
        shapes[f"{mlp}.gate_proj.weight"] = (width, D)
        shapes[f"{mlp}.up_proj.weight"] = (width, D)
        shapes[f"{mlp}.down_proj.weight"] = (D, width)
        out |= {layer_name(config, i, suffix): shape for suffix, shape in shapes.items()}
    return out


def is_vision_tensor(name: str) -> bool:
    """Whether a tensor belongs to the vision tower or its projector."""
    return name.startswith(("vision_model.", "multi_modal_projector."))
