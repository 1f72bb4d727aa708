"""`herd models`: what can be passed as MODEL without having a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..cluster.sizes import format_size
from ..model.config import parse_config
from ..model.presets import PRESETS, Preset
from ..model.quantization import SCHEMES, weight_sizes
from . import cli_options as o
from .banner import format_count
from .config import cache_directory

_BYTES_PER_PARAMETER = 2
_SIZES = {"bf16": "none", "int8": "int8", "fp8": "fp8", "int4": "int4"}
"""What a model takes, by scheme of quantisation."""


def models(config: o.ConfigFile = None, sets: o.Sets = None, as_json: o.Json = False) -> None:
    """List the models that Herd knows by name.

    Any checkpoint directory of a Llama 4 model in Hugging Face format can be served too.
    """
    cache = cache_directory(o.effective_config(config, sets, {}).config.model)
    rows = [_row(name, preset, cache) for name, preset in PRESETS.items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    sizes = "".join(f"{name.upper():>10}" for name in _SIZES)
    typer.echo(f"{'NAME':<10}{'PARAMETERS':>11}{'ACTIVE':>8}{sizes}  WEIGHTS")
    for row in rows:
        label = row["name"] + ("*" if row["assumed"] else "")
        counts = f"{format_count(row['parameters']):>11}{format_count(row['active_parameters']):>8}"
        sizes = "".join(f"{format_size(row[f'{name}_bytes']):>10}" for name in _SIZES)
        typer.echo(f"{label:<10}{counts}{sizes}  {row['weights']}")
    if any(row["assumed"] for row in rows):
        typer.echo("* its shape was never published; it is assumed from what was said of it")


def _row(name: str, preset: Preset, cache: Path) -> dict[str, Any]:
    shape = parse_config(preset.config, preset.generation)
    return {
        "name": name,
        "parameters": shape.num_parameters,
        "active_parameters": shape.num_active_parameters,
        **{
            f"{kind}_bytes": sum(weight_sizes(shape, SCHEMES[scheme], _BYTES_PER_PARAMETER).values())
            for kind, scheme in _SIZES.items()
        },
        "assumed": preset.assumed,
        "weights": _weights(name, cache),
        "summary": preset.summary,
    }


def _weights(name: str, cache: Path) -> str:
    if name != "pocket":
        return "none: pass a checkpoint directory, or --load-format dummy for random ones"
    if any(cache.glob("pocket-*/manifest.json")):
        return f"ready in {cache}"
    return f"fetched at first use (93 MB download, 548 MB in {cache})"
