from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.linear import Linear
from herd.model.byte_tokenizer import byte_tokenizer
from herd.model.checkpoint import DummySource, SafetensorsSource
from herd.model.checkpoint_error import CheckpointError
from herd.model.checkpoint_writer import SafetensorsWriter
from herd.model.config import Llama4Config
from herd.model.decoder import Decoder
from herd.model.experts import LocalExperts
from herd.model.loading import Loader
from herd.model.served_model import ServedModel
from herd.model.source import ModelSource
from herd.model.tensor_names import is_vision_tensor, text_tensors

from ..tiny_models import random_ids, sequence_logits, tiny_config

IDS = random_ids(30, vocab_size=61, seed=0)
MIXED = tiny_config(moe_layers=frozenset({1, 3}))


def dummy(config: Llama4Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> DummySource:
    return DummySource(text_tensors(config), seed, dtype)


def write(directory: Path, config: Llama4Config, dtype: torch.dtype, seed: int = 0) -> SafetensorsSource:
    source, shapes = dummy(config, seed, dtype), text_tensors(config)
    with SafetensorsWriter(directory / "model.safetensors", shapes, dtype) as writer:
        for name in shapes:
            writer.write(name, source.tensor(name))
    return SafetensorsSource(directory)


def logits_of(decoder: Decoder) -> Tensor:
    return sequence_logits(decoder, IDS, 7, 20)


class Spy(DummySource):
    """Notes what is read, and how."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(text_tensors(config), 0, torch.float32)
        self.tensors: list[str] = []
        self.experts: list[tuple[str, int]] = []

    def tensor(self, name: str) -> Tensor:
        self.tensors.append(name)
        return super().tensor(name)

    def expert(self, name: str, index: int) -> Tensor:
        self.experts.append((name, index))
        return super().expert(name, index)


@pytest.mark.parametrize("multimodal", [False, True])
def test_one_error_names_all_that_does_not_fit(multimodal: bool) -> None:
    config = tiny_config(multimodal=multimodal)
    prefix, shapes = config.tensor_prefix, text_tensors(config)
    del shapes[f"{prefix}model.layers.2.self_attn.k_proj.weight"]
    del shapes[f"{prefix}model.norm.weight"]
    shapes[f"{prefix}model.layers.4.input_layernorm.weight"] = (32,)
    shapes[f"{prefix}model.layers.1.feed_forward.experts.down_proj"] = (4, 32, 24)
    shapes["vision_model.class_embedding"] = (8,)
    shapes["multi_modal_projector.linear_1.weight"] = (32, 8)
    with pytest.raises(CheckpointError) as caught:
        Loader(DummySource(shapes, 0, torch.float32), config, dtype=torch.float32)
    message = str(caught.value)
    assert f"2 missing: {prefix}model.norm.weight, {prefix}model.layers.2.self_attn.k_proj.weight" in message
    assert f"1 surplus: {prefix}model.layers.4.input_layernorm.weight" in message
    assert f"1 misshapen: {prefix}model.layers.1.feed_forward.experts.down_proj is [4, 32, 24]" in message
    assert "[4, 24, 32]" in message
    assert "vision" not in message
    assert "projector" not in message


def test_a_tied_model_takes_no_head() -> None:
    config = tiny_config(tie_word_embeddings=True)
    shapes = text_tensors(config)
    assert "lm_head.weight" not in shapes
    with pytest.raises(CheckpointError, match=r"surplus: lm_head\.weight"):
        Loader(DummySource(shapes | {"lm_head.weight": (61, 32)}, 0, torch.float32), config, dtype=torch.float32)


def test_vision_tensors_are_those_of_tower_and_projector() -> None:
    assert is_vision_tensor("vision_model.model.layers.0.mlp.fc1.weight")
    assert is_vision_tensor("multi_modal_projector.linear_1.weight")
    assert not any(map(is_vision_tensor, text_tensors(tiny_config(multimodal=True))))


def test_dummy_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (
        logits_of(Loader(dummy(MIXED, seed), MIXED, dtype=torch.float32).decoder()) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_files_and_their_source_give_the_same_model(tmp_path: Path) -> None:
    """Of a model with dense and expert layers, through the file format."""
    source = write(tmp_path, MIXED, torch.float32)
    from_file = logits_of(Loader(source, MIXED, dtype=torch.float32).decoder())
    assert torch.equal(from_file, logits_of(Loader(dummy(MIXED), MIXED, dtype=torch.float32).decoder()))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_wanted_dtype_is_what_the_model_gets(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    decoder = Loader(write(tmp_path, MIXED, stored), MIXED, dtype=wanted).decoder()
    logits = logits_of(decoder)
    assert decoder.dtype is logits.dtype is wanted
    exact = Loader(dummy(MIXED, dtype=stored), MIXED, dtype=torch.float32).decoder()
    if wanted is torch.float32:
        assert torch.equal(logits, logits_of(exact)), "widening loses nothing"


def test_routed_experts_are_read_one_by_one() -> None:
    """Never a whole stack of them, so that any process can hold any share."""
    spy = Spy(MIXED)
    loader = Loader(spy, MIXED, dtype=torch.float32)
    loader.decoder()
    assert not [name for name in spy.tensors if ".experts." in name]
    kinds = ("gate_up_proj", "down_proj")
    stacks = [f"model.layers.{layer}.feed_forward.experts.{kind}" for layer in (1, 3) for kind in kinds]
    assert sorted(spy.experts) == sorted((name, index) for name in stacks for index in range(4))
    assert sorted(spy.tensors) == sorted(name for name in text_tensors(MIXED) if name not in stacks)


def test_one_expert_alone() -> None:
    spy = Spy(MIXED)
    expert = Loader(spy, MIXED, dtype=torch.float32).expert(3, 2)
    assert spy.tensors == []
    assert {index for _, index in spy.experts} == {2}
    rows = torch.randn(3, 32)
    gate_up = dummy(MIXED).tensor("model.layers.3.feed_forward.experts.gate_up_proj")[2]
    down = dummy(MIXED).tensor("model.layers.3.feed_forward.experts.down_proj")[2]
    gate, up = (rows @ gate_up).chunk(2, dim=-1)
    torch.testing.assert_close(expert(rows), (torch.nn.functional.silu(gate) * up) @ down)


def test_an_experts_tensors_are_what_it_is_made_of() -> None:
    """Of the wanted dtype, and laid out so that their bytes are the same wherever they are read."""
    loader = Loader(dummy(MIXED), MIXED, dtype=torch.bfloat16)
    gate_up, down = loader.expert_tensors(1, 3)
    stored = [
        dummy(MIXED).tensor(f"model.layers.1.feed_forward.experts.{kind}_proj")[3] for kind in ("gate_up", "down")
    ]
    for tensor, expected in zip((gate_up, down), stored, strict=True):
        assert isinstance(tensor, Tensor)
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected.t().bfloat16())
    rows = torch.randn(3, 32, dtype=torch.bfloat16)
    made = ExpertWeights(Linear(gate_up), Linear(down))
    assert torch.equal(loader.expert(1, 3)(rows), made(rows))


class Nowhere:
    """An expert backend that must not be asked."""

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> None:
        raise AssertionError("not to be called")

    def collect(self, pending: None) -> Tensor:
        raise AssertionError("not to be called")

    def refresh(self) -> None:
        raise AssertionError("not to be called")

    def abandon(self) -> None:
        raise AssertionError("not to be called")


def test_experts_that_live_elsewhere_are_not_read() -> None:
    spy = Spy(MIXED)
    decoder = Loader(spy, MIXED, dtype=torch.float32).decoder(experts=Nowhere())
    assert spy.experts == []
    assert isinstance(decoder.experts, Nowhere)


@pytest.mark.parametrize("experts", [None, Nowhere()], ids=["whole", "without experts"])
def test_progress_counts_every_byte_that_is_loaded(experts: Nowhere | None) -> None:
    seen: list[tuple[str, int, int]] = []
    loader = Loader(dummy(MIXED), MIXED, dtype=torch.bfloat16, progress=lambda *step: seen.append(step))
    loader.decoder(experts)
    names = [name for name in text_tensors(MIXED) if experts is None or ".experts." not in name]
    total = 2 * sum(dummy(MIXED).tensor(name).numel() for name in names)
    assert {(stage, of) for stage, _, of in seen} == {("weights", total)}
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_a_served_model_gives_its_experts_away_and_reads_them_one_by_one(tmp_path: Path) -> None:
    """What an engine and a shard load are together the whole model."""
    write(tmp_path, MIXED, torch.float32)
    source = ModelSource("tiny", tmp_path, {}, {}, "safetensors", False)
    served = ServedModel(source, MIXED, byte_tokenizer(4096), frozenset(), frozenset())
    whole = logits_of(served.decoder(dtype=torch.float32))
    with served.loader(dtype=torch.float32) as loader:
        experts = LocalExperts({layer: [loader.expert(layer, e) for e in range(4)] for layer in (1, 3)})
    with pytest.raises(CheckpointError):
        loader.expert(1, 0)
    decoder = served.decoder(dtype=torch.float32, experts=experts)
    assert decoder.experts is experts
    assert torch.equal(logits_of(decoder), whole)


_MEASURE = """
import sys, torch
torch.set_num_threads(1)
from herd.model.config import Llama4Config
from herd.model.checkpoint import SafetensorsSource
from herd.model.loading import Loader
from herd.kernels.linear import Linear

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

# The libraries that the first products load are not the weights'.
dtype = getattr(torch, sys.argv[3])
Linear(torch.zeros(64, 64, dtype=dtype))(torch.zeros(2, 64, dtype=dtype))
config = Llama4Config.model_validate_json(sys.argv[2])
source = SafetensorsSource(sys.argv[1])
before = status("VmRSS")
decoder = Loader(source, config, dtype=dtype).decoder()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_loading_takes_little_more_memory_than_the_weights(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """A quarter of a gigabyte, shaped like the releases: mostly experts, embeddings of a few percent. A tied head is
    laid out beside the table that it shares, so it counts."""
    num_layers = 12 // dtype.itemsize
    config = tiny_config(
        vocab_size=8000,
        hidden_size=768,
        num_layers=num_layers,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        expert_width=1024,
        dense_width=2048,
        num_experts=8,
        moe_layers=frozenset(range(num_layers)),
        tie_word_embeddings=tied,
    )
    write(tmp_path, config, dtype)
    weights = dtype.itemsize * (config.num_parameters + tied * config.vocab_size * config.hidden_size)
    assert weights > 240e6
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), config.model_dump_json(), str(dtype).removeprefix("torch.")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    peak, kept = map(int, run.stdout.split())
    print(f"weights {weights / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, kept {kept / 1e6:.1f} MB")
    assert kept > 0.95 * weights, "the measurement would prove nothing"
    assert peak < 1.1 * weights
