"""Checkpoints as compressed-tensors lays them out, written here by NumPy and by the format's own description, and read
by the product; against the same model with plain weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from herd.kernels.linear import Linear
from herd.model.checkpoint import DummySource, SafetensorsSource
from herd.model.checkpoint_error import CheckpointError
from herd.model.config import Llama4Config
from herd.model.loading import Loader
from herd.model.quantization import SCHEMES
from herd.model.tensor_names import text_tensors

from ..tiny_models import random_ids, sequence_logits, tiny_config

CONFIG = tiny_config(
    hidden_size=64, expert_width=64, dense_width=96, moe_layers=frozenset({1, 3}), num_experts=3, vocab_size=61
)
"""A Maverick in small: dense layers between those with experts."""
IDS = random_ids(20, vocab_size=61, seed=0)

Stored = dict[str, Tensor]
Encode = Callable[[str, Tensor], tuple[Stored, Tensor]]
"""(module, weight [O, I]) -> its tensors, and the weight that they mean."""


def fp8_channels(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """As the released Maverick FP8: a scale for each output channel."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    q = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {f"{module}.weight": q, f"{module}.weight_scale": scale}, q.float() * scale.float()


def packed_int4(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """As community w4a16: eight offset nibbles to a word, the lowest first; groups of 32."""
    rows, columns = weight.shape
    groups = weight.view(rows, -1, 32)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    q = (groups / scale.float()[:, :, None]).round().clamp(-8, 7)
    nibbles = (q.view(rows, columns).numpy() + 8).astype(np.uint32).reshape(rows, -1, 8)
    words = sum(nibbles[:, :, n] << np.uint32(4 * n) for n in range(8))
    tensors = {
        f"{module}.weight_packed": torch.from_numpy(np.asarray(words, np.uint32).view(np.int32).copy()),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }
    return tensors, (q * scale.float()[:, :, None]).view(rows, columns)


def int8_channels(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round().to(torch.int8)
    return {f"{module}.weight": q, f"{module}.weight_scale": scale}, q.float() * scale


def plain(module: str, weight: Tensor) -> tuple[Stored, Tensor]:
    return {f"{module}.weight": weight}, weight


def write(folder: Path, experts: Encode, others: Encode = plain, config: Llama4Config = CONFIG) -> dict[str, Tensor]:
    """A checkpoint whose routed experts lie apart, in `experts`' layout, and whose shared experts and attention are in
    `others`'. Returns the plain tensors that it means, in the layout of a plain checkpoint."""
    source = DummySource(text_tensors(config), 0, torch.float32)
    stored: Stored = {}
    meant: dict[str, Tensor] = {}
    for name in text_tensors(config):
        tensor = source.tensor(name).clone()
        meant[name] = tensor
        if ".experts." in name:
            base, _, kind = name.rpartition(".")
            for index in range(config.num_experts):
                weight_OI = tensor[index].t().contiguous()
                halves = weight_OI.chunk(2) if kind == "gate_up_proj" else (weight_OI,)
                parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                back = []
                for part, half in zip(parts, halves, strict=True):
                    tensors, value = experts(f"{base}.{index}.{part}", half.contiguous())
                    stored |= tensors
                    back.append(value)
                tensor[index] = torch.cat(back).t()
        elif ".shared_expert." in name or ".self_attn." in name:
            tensors, meant[name] = others(name.removesuffix(".weight"), tensor)
            stored |= tensors
        else:
            stored[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return meant


class Plain(DummySource):
    """Tensors from a dictionary."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(text_tensors(CONFIG), 0, torch.float32)
        self._values = tensors

    def tensor(self, name: str) -> Tensor:
        return self._values[name]

    def expert(self, name: str, index: int) -> Tensor:
        return self._values[name][index]


@pytest.mark.parametrize("others", [plain, fp8_channels, int8_channels])
@pytest.mark.parametrize("experts", [fp8_channels, packed_int4, int8_channels])
def test_a_quantised_checkpoint_is_the_model_that_it_means(tmp_path: Path, experts: Encode, others: Encode) -> None:
    meant = write(tmp_path, experts, others)
    with torch.inference_mode():
        ours = Loader(SafetensorsSource(tmp_path), CONFIG, dtype=torch.float32).decoder()
        oracle = Loader(Plain(meant), CONFIG, dtype=torch.float32).decoder()
    expected = sequence_logits(oracle, IDS, 7, 12)
    mine = sequence_logits(ours, IDS, 7, 12)
    assert (mine - expected).abs().max() < 2e-4 * expected.abs().max()
    other = sequence_logits(Loader(Plain(dict(meant) | _changed(meant)), CONFIG, dtype=torch.float32).decoder(), IDS, 7)
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


def _changed(meant: dict[str, Tensor]) -> dict[str, Tensor]:
    """One expert less exact, which must show."""
    name = next(name for name in meant if name.endswith("experts.gate_up_proj"))
    return {name: meant[name] * 1.2}


def test_weights_stay_in_few_bits(tmp_path: Path) -> None:
    write(tmp_path, packed_int4)
    expert = Loader(SafetensorsSource(tmp_path), CONFIG, dtype=torch.bfloat16).expert(1, 2)
    assert (expert.gate_up.kind, expert.down.kind) == ("int4", "int4")
    assert isinstance(expert.gate_up, Linear)


def test_one_expert_is_read_without_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, fp8_channels)
    read = []

    class Spy(SafetensorsSource):
        def tensor(self, name: str) -> Tensor:
            read.append(name)
            return super().tensor(name)

    Loader(Spy(tmp_path), CONFIG, dtype=torch.bfloat16).expert_tensors(3, 1)
    assert len(read) == 6
    assert all(".layers.3.feed_forward.experts.1." in name for name in read)


def damaged(folder: Path, change: Callable[[Stored], None]) -> SafetensorsSource:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return SafetensorsSource(folder)


EXPERT = "model.layers.1.feed_forward.experts.0.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{EXPERT}.weight_zero_point": torch.zeros(64, 2)}), "zero points"),
        (lambda t: t.update({f"{EXPERT}.weight_g_idx": torch.zeros(64)}), "actorder"),
        (lambda t: t.update({f"{EXPERT}.input_scale": torch.zeros(1)}), "static scales of activations"),
        (lambda t: t.update({"model.layers.1.self_attn.k_scale": torch.zeros(1)}), "KV cache"),
        (lambda t: t.pop(f"{EXPERT}.weight_scale"), "weight_scale"),
        (lambda t: t.pop(f"{EXPERT}.weight_packed"), f"{EXPERT}"),
        (lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(64, 16)}), "groups of 4"),
        (lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(2, 2)}), "blocks are not supported"),
        (lambda t: t.update({f"{EXPERT}.weight_packed": torch.ones(64, 5, dtype=torch.int32)}), "weight_packed"),
    ],
    ids=["zero points", "order", "activations", "kv", "no scale", "no weight", "small groups", "blocks", "shape"],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, change: Callable[[Stored], None], message: str
) -> None:
    write(tmp_path, packed_int4)
    with pytest.raises(CheckpointError, match=message):
        Loader(damaged(tmp_path, change), CONFIG, dtype=torch.bfloat16)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write(tmp_path, packed_int4)
    source = damaged(tmp_path, lambda t: t.update({f"{EXPERT}.weight_scale": torch.full((64, 2), float("nan"))}))
    with pytest.raises(CheckpointError, match=f"{EXPERT}.weight_scale holds NaN"):
        Loader(source, CONFIG, dtype=torch.bfloat16).expert(1, 0)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    write(tmp_path, packed_int4)
    with pytest.raises(CheckpointError, match="quantised already"):
        Loader(SafetensorsSource(tmp_path), CONFIG, dtype=torch.bfloat16, scheme=SCHEMES["int8"])
