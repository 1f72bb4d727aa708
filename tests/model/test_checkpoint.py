"""Weights come out bit-equal, in bounded memory, and every defect of a checkpoint is one error that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from herd.model.checkpoint import DummySource, SafetensorsSource, check_tensors
from herd.model.checkpoint_error import CheckpointError
from herd.model.checkpoint_writer import SafetensorsWriter


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "norm.weight": torch.randn(7),
        "linear.weight": torch.randn(5, 3).bfloat16(),
        "experts.down_proj": torch.randn(4, 6, 2),
        "scale": torch.tensor(2.5),
        "ids": torch.arange(9),
        "fp8": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
    }


def write_shards(directory: Path, parts: list[dict[str, torch.Tensor]]) -> Path:
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_holds(source: SafetensorsSource, wanted: dict[str, torch.Tensor]) -> None:
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        got = source.tensor(name)
        assert source.shape(name) == tuple(value.shape) == tuple(got.shape)
        assert source.dtype(name) == value.dtype == got.dtype
        assert torch.equal(got.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
        for index in range(len(value) if value.dim() and value.numel() else 0):
            assert torch.equal(source.expert(name, index).float(), value[index].float())


@pytest.mark.parametrize("layout", ["single", "index", "shards without index"])
def test_every_layout_reads_back_bit_equal(tmp_path: Path, layout: str) -> None:
    wanted = tensors()
    if layout == "single":
        save_file(wanted, tmp_path / "model.safetensors")
    else:
        items = list(wanted.items())
        index = write_shards(tmp_path, [dict(items[:3]), dict(items[3:])])
        if layout != "index":
            index.unlink()
    assert_holds(SafetensorsSource(tmp_path), wanted)


def test_tensors_larger_than_one_piece_are_whole(tmp_path: Path) -> None:
    large = torch.arange(9 * 1000 * 1001, dtype=torch.int32).view(9, 1000, 1001)
    save_file({"large": large, "long_row": large.view(1, -1).clone()}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert torch.equal(source.tensor("large"), large)
    assert torch.equal(source.tensor("long_row"), large.view(1, -1))
    assert torch.equal(source.expert("large", 8), large[8])


def test_results_are_owned_and_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    source = SafetensorsSource(tmp_path)
    first, part = source.tensor("w"), source.expert("w", 1)
    first.zero_()
    assert source.tensor("w").sum() == 64 * 64
    path.write_bytes(bytes(path.stat().st_size))
    assert part.sum() == 64


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    whole = path.read_bytes()
    opened = SafetensorsSource(tmp_path)
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            SafetensorsSource(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read tensor w"):
        opened.tensor("w")


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"c \(model-00002-of-00002.safetensors\)"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-00001-of-00002\.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_an_unreadable_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        SafetensorsSource(tmp_path)


def test_other_mistakes_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        SafetensorsSource(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "one.safetensors")
    source = SafetensorsSource(tmp_path)
    for index in (-1, 2):
        with pytest.raises(CheckpointError, match=f"tensor w .* no slice {index}"):
            source.expert("w", index)
    with pytest.raises(CheckpointError, match="no tensor v"):
        source.tensor("v")
    save_file({"w": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="tensor w is both in"):
        SafetensorsSource(tmp_path)


def test_all_misfits_are_one_error() -> None:
    source = DummySource({"a": (2, 3), "b": (4,), "extra": (1,), "vision.x": (1,)}, 0, torch.float32)
    expected: dict[str, tuple[int, ...]] = {"a": (3, 2), "b": (4,)} | {f"gone.{i}": (1,) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(source, expected, ignore=lambda name: name.startswith("vision."))
    message = str(caught.value)
    assert "30 missing: gone.0, " in message
    assert "gone.11 and 18 more" in message
    assert "gone.12," not in message
    assert "1 surplus: extra" in message
    assert "vision" not in message
    assert "1 misshapen: a is [2, 3], must be [3, 2]" in message
    check_tensors(source, {"a": (2, 3), "b": (4,), "extra": (1,), "vision.x": (1,)})


MEASURE = """
import sys, torch
from pathlib import Path
from herd.model.checkpoint import SafetensorsSource

def mib(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024

source = SafetensorsSource(sys.argv[1])
source.tensor("small")
before = mib("VmHWM")
kept = 0
if sys.argv[2] == "stream":
    for name in source.names():
        source.tensor(name)
elif sys.argv[2] == "expert":
    source.expert("experts", 5)
else:
    keep = [source.tensor(name) for name in source.names()]
print(mib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_resident_memory_is_what_the_caller_keeps(tmp_path: Path) -> None:
    """300 MiB in the file: 200 in tensors of 10 MiB, 100 in one of 10 experts."""
    content = {f"w{i}": torch.zeros(1024, 2560) for i in range(20)}
    content |= {"experts": torch.zeros(10, 1024, 2560), "small": torch.zeros(8)}
    save_file(content, tmp_path / "model.safetensors")

    def growth_mib(mode: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), mode]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert growth_mib("expert") < 10 + 20
    assert growth_mib("stream") < 100 + 40
    assert growth_mib("keep") < 300 * 1.1
    (tmp_path / "model.safetensors").unlink()


SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (500, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.q.bias": (64,),
    "model.layers.0.q.weight": (80, 400),
    "model.layers.0.experts.gate_up_proj": (3, 100, 33),
    "model.lm_head.weight": (500, 64),
}


@given(st.permutations(list(SHAPES)), st.integers(0, 2**64 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_dummy_weights_do_not_depend_on_reading_order(order: list[str], seed: int, dtype: torch.dtype) -> None:
    first, second = DummySource(SHAPES, seed, dtype), DummySource(SHAPES, seed, dtype)
    read = {name: first.tensor(name) for name in order}
    for name in SHAPES:
        whole = second.tensor(name)
        assert whole.dtype == first.dtype(name) == dtype
        assert torch.equal(read[name], whole)
        assert torch.equal(first.expert(name, 2), whole[2])


def test_dummy_weights_differ_between_tensors_experts_and_seeds() -> None:
    source = DummySource({"a.weight": (8, 8), "b.weight": (8, 8), "e": (2, 8, 8)}, 1, torch.float32)
    other = DummySource({"a.weight": (8, 8)}, 2, torch.float32)
    blocks = [source.tensor("a.weight"), source.tensor("b.weight"), *source.tensor("e"), other.tensor("a.weight")]
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks)


def test_dummy_weights_have_the_promised_spread() -> None:
    source = DummySource(SHAPES, 0, torch.float32)
    spread = {
        "model.embed_tokens.weight": 0.02,
        "model.layers.0.q.weight": 400**-0.5,
        "model.layers.0.experts.gate_up_proj": 100**-0.5,
        "model.lm_head.weight": 2 * 64**-0.5,
    }
    for name, std in spread.items():
        values = source.tensor(name)
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert abs(values.mean().item()) < 0.03 * std
        # A bell: about 68 % and 95 % within one and two deviations, and no two rows that follow each other.
        assert (values.abs() < std).float().mean().item() == pytest.approx(0.68, abs=0.02)
        assert (values.abs() < 2 * std).float().mean().item() == pytest.approx(0.955, abs=0.015)
        rows = values.reshape(-1, values.shape[-1])
        assert abs((rows[1:] * rows[:-1]).mean().item()) < 0.03 * std**2
    assert source.tensor("model.layers.0.input_layernorm.weight").eq(1).all()
    assert source.tensor("model.layers.0.q.bias").eq(0).all()


def test_dummy_bits_never_change() -> None:
    """Machines and releases must agree, or replicas of one dummy model would differ."""
    value = DummySource({"x.weight": (2, 4)}, 7, torch.float32).tensor("x.weight")
    byte_sums = (value * 2 * 147.80053).round().int() + 510
    assert byte_sums.flatten().tolist() == [444, 629, 517, 187, 396, 354, 498, 433]


def test_the_writer_agrees_with_the_library(tmp_path: Path) -> None:
    wanted = {name: value.bfloat16() for name, value in tensors().items() if value.dtype == torch.float32}
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, shapes, torch.bfloat16) as writer:
        for name, value in wanted.items():
            writer.write(name, value.float())
    got = load_file(path)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced tensors were not written"):
        SafetensorsWriter(tmp_path / "a", {"x": (2,)}, torch.float32).__exit__(None, None, None)
    for name, shape in (("y", (2,)), ("x", (3,))):
        with (
            SafetensorsWriter(tmp_path / "b", {"x": (2,)}, torch.float32) as writer,
            pytest.raises(ValueError, match="not the next"),
        ):
            writer.write(name, torch.zeros(shape))
