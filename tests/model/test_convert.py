from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.model.checkpoint_error import CheckpointError
from herd.model.convert import convert
from herd.model.decoder import Decoder
from herd.model.served_model import open_model
from herd.model.source import ModelSource, resolve_model

from ..integration.live_app import TINY, write_tiny
from ..tiny_models import random_ids, sequence_logits

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "torch_dtype": "float32",
}


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "tiny"
    write_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHAPE))
    return resolve_model(str(folder), load_format="dummy", cache_dir=None)


def opened(folder: Path) -> ModelSource:
    return resolve_model(str(folder), load_format="auto", cache_dir=None)


def logits(source: ModelSource, **options: str) -> Tensor:
    served = open_model(source)
    decoder: Decoder = served.decoder(dtype=torch.float32, **options)  # pyright: ignore[reportArgumentType]
    return sequence_logits(decoder, random_ids(16, vocab_size=200, seed=1), 7, 10)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_a_copy_computes_what_quantising_while_loading_computes(
    source: ModelSource, tmp_path: Path, quantize: str
) -> None:
    out = tmp_path / "out"
    result = convert(source, out, quantize)
    assert torch.equal(logits(opened(out)), logits(source, quantize=quantize))
    assert not torch.equal(logits(opened(out)), logits(source))
    before, after = (sum(column) for column in zip(*result.sizes.values(), strict=True))
    assert 0 < after < before
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source.directory or tmp_path) / name in list((source.directory or tmp_path).iterdir()):
            assert (out / name).exists()
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_large_copies_are_divided_into_files_with_an_index(source: ModelSource, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    convert(source, whole, "int4")
    result = convert(source, out, "int4", shard_bytes=100_000)
    assert result.files == len(list(out.glob("*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = Counter(index["weight_map"].values())
    assert set(files) == {path.name for path in out.glob("*.safetensors")}
    assert torch.equal(logits(opened(out)), logits(opened(whole)))


def test_the_config_says_what_was_done(source: ModelSource, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "int4")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    assert open_model(opened(tmp_path / "out")).config.quantization is not None


def test_progress_reaches_the_end(source: ModelSource, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "out", "int8", progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] > 0
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_what_is_there_is_replaced_only_by_force(source: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, "int8")
    with pytest.raises(CheckpointError, match="exists"):
        convert(source, out, "int4")
    convert(source, out, "int4", force=True)
    assert torch.equal(logits(opened(out)), logits(source, quantize="int4"))


def test_a_folder_that_is_no_checkpoint_is_never_replaced(source: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        convert(source, tmp_path / "photos", "int8", force=True)
    assert source.directory is not None
    with pytest.raises(CheckpointError, match="to be read"):
        convert(source, source.directory, "int8", force=True)


def test_a_quantised_checkpoint_is_not_converted_again(source: ModelSource, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="quantised already"):
        convert(opened(tmp_path / "out"), tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()


def test_widths_that_no_group_divides_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(TINY | {"vocab_size": 64, "intermediate_size": 40, "num_hidden_layers": 6})
    )
    source = resolve_model(str(folder), load_format="dummy", cache_dir=None)
    with pytest.raises(CheckpointError, match="40 input channels"):
        convert(source, tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
