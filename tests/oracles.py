"""The oracle of the model: tiny random checkpoints written by transformers, in every form that Herd must read, and the
logits that transformers computes from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.model.checkpoint import SafetensorsSource, WeightSource
from herd.model.config import Llama4Config, load_config
from herd.model.decoder import Decoder
from herd.model.loading import Loader

TOLERANCE = 1e-4

SCOUT_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
BASE_SCALING = SCOUT_SCALING | {"factor": 8.0, "high_freq_factor": 4.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_SHARED = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 12,
    "floor_scale": 4,
    "max_position_embeddings": 256,
    "rope_parameters": SCOUT_SCALING,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAVERICK = {"use_qk_norm": False, "interleave_moe_layer_step": 2, "rope_parameters": PLAIN_ROPE}


@dataclass(frozen=True)
class Form:
    """One checkpoint: what the model is, and how its files say so."""

    text: dict[str, Any] = field(default_factory=dict)
    """Differences of the transformers config from `_SHARED`."""
    old_dialect: bool = False
    """config.json as transformers 4.51 wrote it."""
    multimodal: bool = False
    """Prefixed names beside a vision tower."""
    sharded: bool = False
    no_rope_layers: str = "listed"
    """Or "empty", or "absent"."""
    unchunked: bool = False
    """attention_chunk_size is null in the file. transformers refuses that, so it computes with one large chunk."""


FORMS: dict[str, Form] = {
    "scout": Form(sharded=True),
    "scout-base-multimodal": Form({"rope_parameters": BASE_SCALING}, old_dialect=True, multimodal=True),
    "maverick": Form(_MAVERICK, old_dialect=True, no_rope_layers="empty"),
    "odd": Form(
        {
            "vocab_size": 331,
            "num_hidden_layers": 7,
            "num_attention_heads": 6,
            "head_dim": 8,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 0, 0, 1, 1, 0, 1],
            "moe_layers": [0, 3, 4],
            "rope_parameters": BASE_SCALING,
        }
    ),
    "tied": Form(
        {"num_hidden_layers": 5, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_chunk_size": 9}
        | {"tie_word_embeddings": True, "num_experts_per_tok": 4},
        no_rope_layers="absent",
    ),
    "pocket": Form(
        {"num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3, "attention_chunk_size": 256}
        | {"no_rope_layers": [1] * 4, "attn_temperature_tuning": False, "tie_word_embeddings": True}
        | _MAVERICK
    ),
    "unchunked": Form({"num_hidden_layers": 4, "attention_chunk_size": 256}, unchunked=True),
    "nope": Form({"num_hidden_layers": 3, "no_rope_layers": [0] * 3, "interleave_moe_layer_step": 3}),
}


@dataclass
class Oracle:
    """A checkpoint on disk, and the transformers model that it came from."""

    form: Form
    directory: Path
    model: Any

    @cached_property
    def config(self) -> Llama4Config:
        return load_config(self.directory / "config.json")

    @cached_property
    def decoder(self) -> Decoder:
        """Herd's model of the same files, float32. Shared: never change it."""
        return self.load()

    def source(self) -> SafetensorsSource:
        return SafetensorsSource(self.directory)

    def load(self, config: Llama4Config | None = None, source: WeightSource | None = None) -> Decoder:
        """Another decoder, with a changed config or changed weights."""
        return Loader(source or self.source(), config or self.config, dtype=torch.float32).decoder()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """[T, V] of one sequence, computed at once without a cache."""
        return self.model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """By name of its form: an oracle, made at first use."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(FORMS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


def make_oracle(form: Form, directory: Path) -> Oracle:
    """Write the form's checkpoint."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = _random_model(transformers, _SHARED | form.text)
    model.save_pretrained(directory, max_shard_size="200KB" if form.sharded else "1GB")
    assert form.sharded == (directory / "model.safetensors.index.json").is_file()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    _restate(config, form)
    if form.multimodal:
        config = _add_vision(config, directory)
    path.write_text(json.dumps(config))
    return Oracle(form, directory, model)


def _random_model(transformers: Any, text: dict[str, Any]) -> Any:
    """Weights that make every part of the model matter: logits of standard deviation about 1.5."""
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text)).eval().float()
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1, 0.2)
            elif "embed" in name:
                weight.normal_(0, 1.5 / math.sqrt(weight.shape[1]) if tied else 1.0)
            else:
                gain = 1.5 if "lm_head" in name else 1.0
                weight.normal_(0, gain / math.sqrt(weight.shape[-1] if weight.dim() == 2 else weight.shape[-2]))
    return model


def _restate(config: dict[str, Any], form: Form) -> None:
    if form.old_dialect:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        config["attn_temperature_tuning"] = 4
        del config["layer_types"]
    if form.no_rope_layers == "absent":
        del config["no_rope_layers"]
    elif form.no_rope_layers == "empty":
        config["no_rope_layers"] = []
    if form.unchunked:
        config["attention_chunk_size"] = None


def _add_vision(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Rewrite the checkpoint as one of a model that also sees; the tower's tensors are noise."""
    file = directory / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    for name in ("vision_model.class_embedding", "vision_model.layernorm_pre.bias"):
        tensors[name] = torch.randn(8)
    tensors["multi_modal_projector.linear_1.weight"] = torch.randn(64, 8)
    save_file(tensors, file, metadata={"format": "pt"})
    return {"model_type": "llama4", "text_config": config, "vision_config": {"hidden_size": 8}}
