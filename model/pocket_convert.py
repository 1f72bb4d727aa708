"""Turns the dense base of `pocket` and our trained update into a Llama 4 text checkpoint, tensor by tensor. Knows the
names on both sides and the arithmetic between; knows nothing of downloads and caches.

In a MoE layer the neurons of the dense MLP are permuted and halved: one half is the shared expert, the other half plus
a low-rank update is each routed expert. Llama 4 multiplies an expert's input by sigmoid(router logit); the constant
`score` stands for its usual value, so gate and up are stored divided by it.

Shapes: D hidden, V vocabulary, M dense width, F expert width, E experts, R rank of the update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint_error import CheckpointError
from .checkpoint_writer import SafetensorsWriter
from .gguf import GgufFile
from .pocket_cache import Progress
from .pocket_fetch import DELTA_PATH
from .pocket_tokenizer import write_tokenizer
from .presets import PRESETS

# GGUF keeps q and k of this architecture with interleaved rotary pairs, which is Llama 4's order too: no permutation.
_PLAIN_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}


class PocketDelta:
    """What was trained on top of the base: per MoE layer a router, an order of the neurons, and low-rank updates."""

    def __init__(self, path: Path = DELTA_PATH) -> None:
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                self.recipe: dict[str, Any] = json.loads(file.metadata()["recipe"])
                self._tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a readable update of pocket: {error}") from error

    def get(self, layer: int, part: str) -> torch.Tensor:
        """Float32, or int64 for the order of neurons. Factors are kept as int8 with one float16 scale per row."""
        name = f"{layer}.{part}"
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} holds no tensor {name}")
        value = self._tensors[name]
        if value.dtype == torch.int8:
            return value.float() * self._tensors[f"{name}.scale"].float()
        return value.float() if value.is_floating_point() else value.long()

    def product(self, layer: int, part: str) -> torch.Tensor:
        """The low-rank update of every expert, [E, out, in]."""
        return self.get(layer, f"{part}_b") @ self.get(layer, f"{part}_a")


def convert_pocket(gguf: GgufFile, delta: PocketDelta, directory: Path, progress: Progress) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer into `directory`. Stage: "convert" (parameters)."""
    preset = PRESETS["pocket"]
    shapes = pocket_shapes(preset.config)
    total = sum(math.prod(shape) for shape in shapes.values())
    done = 0
    with SafetensorsWriter(directory / "model.safetensors", shapes, torch.bfloat16) as writer:
        for name, tensor in pocket_tensors(gguf, delta, preset.config):
            writer.write(name, tensor)
            done += tensor.numel()
            progress("convert", done, total)
    for name, values in (("config.json", preset.config), ("generation_config.json", preset.generation)):
        (directory / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(gguf.metadata, directory)


def pocket_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint in the order of `pocket_tensors`."""
    D, V, M, F = (config[k] for k in ("hidden_size", "vocab_size", "intermediate_size_mlp", "intermediate_size"))
    E = config["num_local_experts"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        plain = ((D,), (q, D), (kv, D), (kv, D), (D, q), (D,))
        shapes |= {f"{at}{name}.weight": s for name, s in zip(_PLAIN_TENSORS.values(), plain, strict=True)}
        at += "feed_forward."
        width = M
        if layer in config["moe_layers"]:
            shapes[f"{at}router.weight"] = (E, D)
            shapes[f"{at}experts.gate_up_proj"] = (E, D, 2 * F)
            shapes[f"{at}experts.down_proj"] = (E, F, D)
            at, width = f"{at}shared_expert.", F
        mlp = {"gate_proj": (width, D), "up_proj": (width, D), "down_proj": (D, width)}
        shapes |= {f"{at}{name}.weight": s for name, s in mlp.items()}
    return shapes | {"model.norm.weight": (D,)}


def pocket_tensors(gguf: GgufFile, delta: PocketDelta, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 value of every tensor, one layer in memory at a time."""
    yield "model.embed_tokens.weight", gguf.read("token_embd.weight")
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for source, name in _PLAIN_TENSORS.items():
            yield f"{at}{name}.weight", gguf.read(f"blk.{layer}.{source}.weight")
        gate, up, down = (gguf.read(f"blk.{layer}.ffn_{part}.weight") for part in ("gate", "up", "down"))
        at += "feed_forward."
        if layer in config["moe_layers"]:
            order = delta.get(layer, "perm")
            shared, routed = order.split(config["intermediate_size"])
            yield f"{at}router.weight", delta.get(layer, "router")
            yield f"{at}experts.gate_up_proj", _gate_up_EDF(gate[routed], up[routed], delta, layer)
            yield f"{at}experts.down_proj", _down_EFD(down[:, routed], delta, layer)
            gate, up, down = gate[shared], up[shared], down[:, shared]
            at += "shared_expert."
        yield f"{at}gate_proj.weight", gate
        yield f"{at}up_proj.weight", up
        yield f"{at}down_proj.weight", down
    yield "model.norm.weight", gguf.read("output_norm.weight")


def _gate_up_EDF(gate_FD: torch.Tensor, up_FD: torch.Tensor, delta: PocketDelta, layer: int) -> torch.Tensor:
    """[E, D, 2F], gate columns first."""
    stacked = delta.product(layer, "gu")
    stacked += torch.cat((gate_FD, up_FD))
    stacked /= delta.get(layer, "score").item()
    return stacked.transpose(1, 2)


def _down_EFD(down_DF: torch.Tensor, delta: PocketDelta, layer: int) -> torch.Tensor:
    stacked = delta.product(layer, "dn")
    stacked += down_DF
    return stacked.transpose(1, 2)
