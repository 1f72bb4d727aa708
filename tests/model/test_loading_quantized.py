"""Weights that are quantised while they load: which, to what, in how much memory; and the oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.kernels.quantized import QuantizedWeight, quantize
from herd.model.checkpoint import DummySource, SafetensorsSource
from herd.model.checkpoint_error import CheckpointError
from herd.model.checkpoint_writer import SafetensorsWriter
from herd.model.config import parse_config
from herd.model.convert import convert
from herd.model.loading import Loader
from herd.model.quantization import SCHEMES, Part, weight_sizes
from herd.model.source import resolve_model
from herd.model.tensor_names import text_tensors

from ..oracles import FORMS, Form, Oracle, make_oracle
from ..tiny_models import random_ids, sequence_logits, tiny_config

CONFIG = tiny_config(
    hidden_size=64, expert_width=64, dense_width=96, num_layers=6, rope_layers=frozenset(range(5)),
    moe_layers=frozenset({1, 3, 5}),
)  # fmt: skip


def dummy(**changes: Tensor) -> DummySource:
    class Changed(DummySource):
        def tensor(self, name: str) -> Tensor:
            return changes.get(name, super().tensor(name))

    return Changed(text_tensors(CONFIG), 0, torch.float32)


def loader(scheme: str, dtype: torch.dtype = torch.bfloat16, **more: object) -> Loader:
    return Loader(dummy(), CONFIG, dtype=dtype, scheme=SCHEMES[scheme], **more)  # pyright: ignore[reportArgumentType]


def test_an_expert_is_what_quantising_its_tensors_gives() -> None:
    gate_up, down = loader("int4").expert_tensors(3, 2)
    stored = dummy().expert("model.layers.3.feed_forward.experts.gate_up_proj", 2).t()
    expected = quantize(stored, "int4", 32)
    assert isinstance(gate_up, QuantizedWeight)
    assert isinstance(down, QuantizedWeight)
    assert torch.equal(gate_up.q, expected.q)
    assert torch.equal(gate_up.scales_OG, expected.scales_OG)
    ends, _ = loader("int4").expert_tensors(5, 2)
    assert isinstance(ends, QuantizedWeight)
    assert (down.kind, ends.kind, ends.group) == ("int4", "int8", 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_logits_move_a_little(scheme: str, dtype: torch.dtype) -> None:
    ids = random_ids(24, vocab_size=61, seed=0)
    exact = sequence_logits(Loader(dummy(), CONFIG, dtype=torch.float32).decoder(), ids, 7, 16)
    moved = sequence_logits(loader(scheme, dtype).decoder(), ids, 7, 16)
    assert moved.dtype is dtype
    error = (moved.float() - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < {"int8": 0.15, "fp8": 0.25, "int4": 0.6}[scheme]


@pytest.mark.parametrize("scheme", ["none", "int8", "int4", "fp8"])
def test_progress_counts_the_bytes_that_are_kept(scheme: str) -> None:
    seen: list[tuple[int, int]] = []
    loader(scheme, progress=lambda stage, done, total: seen.append((done, total))).decoder()
    total = sum(weight_sizes(CONFIG, SCHEMES[scheme], 2).values())
    assert {of for _, of in seen} == {total}
    assert seen[-1][0] == total


def test_a_tensor_that_cannot_be_quantised_is_named() -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    bad = dummy().tensor(name).clone()
    bad[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.k_proj cannot be quantised: .*NaN"):
        Loader(dummy(**{name: bad}), CONFIG, dtype=torch.bfloat16, scheme=SCHEMES["int8"]).decoder()


ORACLES = {
    "scout": Form(FORMS["scout"].text | {"intermediate_size": 64}),
    "maverick": Form(FORMS["maverick"].text | {"intermediate_size": 64}, old_dialect=True),
    "tied": Form(FORMS["pocket"].text | {"intermediate_size": 64}),
    "multimodal": Form({"intermediate_size": 64}, old_dialect=True, multimodal=True),
}


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    made: dict[str, Oracle] = {}

    def get(form: str) -> Oracle:
        if form not in made:
            made[form] = make_oracle(ORACLES[form], tmp_path_factory.mktemp(form))
        return made[form]

    return get


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("form", ORACLES)
def test_a_copy_computes_what_transformers_computes_with_its_weights(
    form: str, scheme: str, oracle_of: Callable[[str], Oracle], tmp_path: Path
) -> None:
    """The copy's tensors, dequantised here by the format's description, put into the original's model."""
    oracle = oracle_of(form)
    source = resolve_model(str(oracle.directory), cache_dir=None)
    convert(source, tmp_path / "out", scheme, shard_bytes=300_000)
    copy = resolve_model(str(tmp_path / "out"), cache_dir=None)
    files = SafetensorsSource(tmp_path / "out")
    original = {name: tensor.clone() for name, tensor in oracle.model.state_dict().items()}
    try:
        oracle.model.load_state_dict(plain_weights(files, original, oracle))
        ids = random_ids(40, vocab_size=320, seed=2)
        with torch.no_grad():  # a tied head has numbers of its own in the copy
            hidden = oracle.model.model(torch.tensor([ids])).last_hidden_state[0]
        head = f"{oracle.config.tensor_prefix}lm_head"
        table = head if f"{head}.weight" in files.names() else "model.embed_tokens"
        expected = hidden @ plain_weight(files, table).t()
    finally:
        oracle.model.load_state_dict(original)
    config = parse_config(copy.config_json, copy.generation_json)
    ours = sequence_logits(Loader(files, config, dtype=torch.float32).decoder(), ids, 7, 30)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    assert (expected - oracle.logits(ids)).abs().max() > 5e-3, "the test would not see whether anything was quantised"


def plain_weight(files: SafetensorsSource, module: str) -> Tensor:
    """[O, I] in float32, by the description of the format."""
    if f"{module}.weight_packed" in files.names():
        words = files.tensor(f"{module}.weight_packed").long() & 0xFFFFFFFF
        q = torch.stack([((words >> 4 * n) & 15) - 8 for n in range(8)], -1).flatten(-2).float()
    else:
        q = files.tensor(f"{module}.weight").float()
    if f"{module}.weight_scale" not in files.names():
        return q
    scale = files.tensor(f"{module}.weight_scale").float()
    return q * scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)


def plain_weights(files: SafetensorsSource, original: dict[str, Tensor], oracle: Oracle) -> dict[str, Tensor]:
    """Under transformers' names, experts stacked."""
    found: dict[str, Tensor] = {}
    for name, tensor in original.items():
        base = f"{oracle.config.tensor_prefix}{name}"
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            stack = base.rpartition(".")[0]
            experts = [[plain_weight(files, f"{stack}.{e}.{part}") for part in parts] for e in range(len(tensor))]
            found[name] = torch.stack([torch.cat(of_expert).t() for of_expert in experts])
        elif name == "lm_head.weight":
            found[name] = tensor
        else:
            found[name] = plain_weight(files, base.removesuffix(".weight")) if tensor.dim() == 2 else files.tensor(base)
    return found


_MEASURE = """
import sys, torch
torch.set_num_threads(1)
from herd.model.config import Llama4Config
from herd.model.checkpoint import SafetensorsSource
from herd.model.loading import Loader
from herd.model.quantization import SCHEMES
from herd.kernels.linear import Linear
from herd.kernels.quantized import quantize

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

for kind, group in (("int8", 128), ("int4", 64)):  # what the first products load and compile is not the weights'
    Linear(quantize(torch.randn(64, 128), kind, group))(torch.zeros(2, 128, dtype=torch.bfloat16))
config = Llama4Config.model_validate_json(sys.argv[2])
source = SafetensorsSource(sys.argv[1])
before = status("VmRSS")
decoder = Loader(source, config, dtype=torch.bfloat16, scheme=SCHEMES["int4"]).decoder()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_near_the_quantised_size(tmp_path: Path) -> None:
    """Half a gigabyte in the files, a seventh of one served: what is read but not kept must not add up."""
    config = tiny_config(
        vocab_size=4000, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, expert_width=1024,
        num_experts=8, moe_layers=frozenset(range(12)),
    )  # fmt: skip
    shapes = text_tensors(config)
    made = DummySource(shapes, 0, torch.bfloat16)
    with SafetensorsWriter(tmp_path / "model.safetensors", shapes, torch.bfloat16) as writer:
        for name in shapes:
            writer.write(name, made.tensor(name))
    sizes = weight_sizes(config, SCHEMES["int4"], 2)
    weights = sum(sizes.values())
    assert sizes[Part.ROUTED] > weights / 2
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), config.model_dump_json()],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    peak, kept = map(int, run.stdout.split())
    print(f"plain {2 * config.num_parameters / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < 1.25 * weights + 30e6
    assert kept > 0.8 * weights, "the measurement would prove nothing"
