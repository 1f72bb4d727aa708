"""What the MODEL argument may be, and what each wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.model.checkpoint_error import CheckpointError
from herd.model.presets import PRESETS
from herd.model.source import LoadFormat, ModelNotFound, resolve_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama4_text", "hidden_size": 8}))
    (directory / "model.safetensors").write_bytes(b"never opened here")
    return directory


def test_a_directory(checkpoint: Path) -> None:
    source = resolve_model(f"{checkpoint}/", cache_dir=None)
    assert (source.name, source.load_format, source.assumed) == ("my-model", "safetensors", False)
    assert source.directory == checkpoint
    assert source.config_json["hidden_size"] == 8
    assert source.generation_json == {}
    assert source.tokenizer_dir is None


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model"])
def test_a_directory_with_everything(checkpoint: Path, tokenizer: str) -> None:
    (checkpoint / tokenizer).touch()
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    source = resolve_model(str(checkpoint), load_format="safetensors", cache_dir=None)
    assert source.generation_json == {"temperature": 0.5}
    assert source.tokenizer_dir == checkpoint


def test_a_relative_directory_has_a_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert resolve_model(".", cache_dir=None).name == "my-model"


def test_a_config_alone_serves_with_dummy_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert resolve_model(str(checkpoint), load_format="dummy", cache_dir=None).load_format == "dummy"
    with pytest.raises(ModelNotFound, match="--load-format dummy"):
        resolve_model(str(checkpoint), cache_dir=None)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_a_dummy_form(name: str) -> None:
    source = resolve_model(name, load_format="dummy", cache_dir=None)
    assert (source.name, source.directory, source.tokenizer_dir) == (name, None, None)
    assert source.assumed == (name == "behemoth")
    assert source.config_json == PRESETS[name].config
    source.config_json.get("text_config", source.config_json)["hidden_size"] = 0
    assert resolve_model(name, load_format="dummy", cache_dir=None).config_json == PRESETS[name].config


@pytest.mark.parametrize("name", ["scout", "maverick", "behemoth"])
@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_big_presets_have_no_weights(name: str, load_format: LoadFormat) -> None:
    with pytest.raises(ModelNotFound, match=rf"weights of {name} .*--load-format dummy"):
        resolve_model(name, load_format=load_format, cache_dir=None)


def test_what_is_missing_is_said(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ModelNotFound, match="neither a directory nor one of the presets pocket, scout, maverick"):
        resolve_model("scoot", cache_dir=None)
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        resolve_model(str(tmp_path), cache_dir=None)
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ModelNotFound, match="Meta's own format"):
        resolve_model(str(tmp_path), cache_dir=None)
    with pytest.raises(ModelNotFound, match="is a file"):
        resolve_model(str(checkpoint / "config.json"), cache_dir=None)
    with pytest.raises(ModelNotFound, match="cache directory"):
        resolve_model("pocket", cache_dir=None)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_an_unreadable_config_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_model(str(checkpoint), cache_dir=None)
