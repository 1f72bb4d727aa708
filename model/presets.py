"""The models that Herd knows by name, as the `config.json` and `generation_config.json` that their checkpoints carry.
Values only: nothing here reads files or builds layers. Where a number is a guess, the preset is marked as assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """One named model."""

    config: Mapping[str, Any]
    """As in `config.json` of the Hugging Face format. Copy it before changing it."""
    generation: Mapping[str, Any]
    """As in `generation_config.json`."""
    assumed: bool
    """The shape is not published; it was chosen to fit what is."""
    summary: str
    """One line for lists."""


_VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
    "rope_theta": 10000,
    "norm_eps": 1e-5,
    "hidden_act": "gelu",
    "attention_dropout": 0.0,
    "projector_dropout": 0.0,
    "multi_modal_projector_bias": False,
}

_SCOUT_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

_INSTRUCT_EOS = [200001, 200007, 200008]
_INSTRUCT_GENERATION = {
    "bos_token_id": 200000,
    "eos_token_id": _INSTRUCT_EOS,
    "pad_token_id": 200018,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}


def _multimodal(**text: Any) -> dict[str, Any]:
    """A release-shaped config: what all Llama 4 models share, with `text` on top of the text part."""
    shared = {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [],
        "num_experts_per_tok": 1,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 200000,
        "eos_token_id": _INSTRUCT_EOS,
        "pad_token_id": 200018,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "text_config": shared | text,
        "vision_config": dict(_VISION),
    }


def _released(**text: Any) -> dict[str, Any]:
    """config.json of a released model: the shape that Scout and Maverick share, and what tells them apart."""
    shared = {"num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40}
    return _multimodal(**shared, intermediate_size=8192, intermediate_size_mlp=16384, **text)


_POCKET_LAYERS = 30
_POCKET_CONTEXT = 8192
_POCKET_CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 768,
    "intermediate_size_mlp": 1536,
    "num_hidden_layers": _POCKET_LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": _POCKET_CONTEXT,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_experts_per_tok": 1,
    "num_local_experts": 8,
    "moe_layers": list(range(1, _POCKET_LAYERS, 2)),
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "no_rope_layers": [1] * _POCKET_LAYERS,
    "no_rope_layer_interval": _POCKET_LAYERS + 1,
    "layer_types": ["chunked_attention"] * _POCKET_LAYERS,
    "attention_chunk_size": _POCKET_CONTEXT,
    "attn_temperature_tuning": False,
    "floor_scale": _POCKET_CONTEXT,
    "attn_scale": 0.1,
    "for_llm_compressor": False,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}

PRESETS: Mapping[str, Preset] = {
    "pocket": Preset(
        config=_POCKET_CONFIG,
        # The settings that the makers of SmolLM2-135M-Instruct recommend: at temperature 1 so small a model rambles.
        generation={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "do_sample": True,
            "temperature": 0.2,
            "top_p": 0.9,
        },
        assumed=False,
        summary="a real 0.27B chat model in the Llama 4 format, 8 experts, fetched from PyPI at first use",
    ),
    "scout": Preset(
        config=_released(
            num_local_experts=16,
            interleave_moe_layer_step=1,
            use_qk_norm=True,
            rope_scaling=_SCOUT_ROPE_SCALING,
            max_position_embeddings=10485760,
        ),
        generation=_INSTRUCT_GENERATION,
        assumed=False,
        summary="Llama 4 Scout Instruct: 109B parameters, 17B active, 16 experts",
    ),
    "maverick": Preset(
        config=_released(
            num_local_experts=128,
            interleave_moe_layer_step=2,
            use_qk_norm=False,
            rope_scaling=None,
            max_position_embeddings=1048576,
        ),
        generation=_INSTRUCT_GENERATION,
        assumed=False,
        summary="Llama 4 Maverick Instruct: 400B parameters, 17B active, 128 experts",
    ),
    "behemoth": Preset(
        # Public are only 288B active, 16 experts and nearly two trillion in all; this is the roundest shape with those.
        config=_multimodal(
            num_hidden_layers=128,
            hidden_size=14336,
            num_attention_heads=112,
            intermediate_size=20480,
            intermediate_size_mlp=40960,
            num_local_experts=16,
            interleave_moe_layer_step=1,
            use_qk_norm=True,
            rope_scaling=_SCOUT_ROPE_SCALING,
            max_position_embeddings=1048576,
        ),
        generation=_INSTRUCT_GENERATION,
        assumed=True,
        summary="Llama 4 Behemoth (never released, shape assumed): 1.98T parameters, 288B active, 16 experts",
    ),
}
"""By name. Only `pocket` has weights that can be fetched."""
