"""The command-line options that are fields of the configuration: their names, types and help come from the tree. Knows
nothing of what commands do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from .banner import base_url
from .config import ConfigError, Effective, fields, load_config

USAGE_ERROR = 2
"""Exit status for anything wrong with what the user passed."""

_FIELDS = fields()


def _field(flag: str, key: str, metavar: str = "N") -> Any:
    """A typer option for the field `key`. It has no default of its own, so that other sources keep their say."""
    field = _FIELDS[key]
    text = str(field.description)
    if choices := get_args(field.annotation) if get_origin(field.annotation) is Literal else ():
        text += f": {', '.join(choices[:-1])} or {choices[-1]}"
    elif field.default not in (None, (), PydanticUndefined):
        text += f" (default: {field.default})"
    return typer.Option(flag, help=text, metavar=metavar, show_default=False)


Host = Annotated[str | None, _field("--host", "http.host", "ADDRESS")]
Port = Annotated[int | None, _field("--port", "http.port")]
Ingress = Annotated[str | None, _field("--ingress", "http.ingress", "KIND")]
Engines = Annotated[int | None, _field("--engines", "engine.replicas")]
Gateways = Annotated[int | None, _field("--gateways", "gateway.replicas")]
Device = Annotated[str | None, _field("--device", "engine.device", "KIND")]
Threads = Annotated[int | None, _field("--threads", "engine.threads")]
KvMemory = Annotated[str | None, _field("--kv-memory", "engine.kv_memory", "SIZE")]
MaxNumSeqs = Annotated[int | None, _field("--max-num-seqs", "engine.max_num_seqs")]
ExpertShards = Annotated[int | None, _field("--expert-shards", "experts.shards")]
ExpertReplicas = Annotated[int | None, _field("--expert-replicas", "experts.replicas")]
Dtype = Annotated[str | None, _field("--dtype", "model.dtype", "KIND")]
Quantize = Annotated[str | None, _field("--quantize", "model.quantize", "KIND")]
LoadFormat = Annotated[str | None, _field("--load-format", "model.load_format", "KIND")]
MaxModelLen = Annotated[int | None, _field("--max-model-len", "model.max_model_len")]
ServedName = Annotated[list[str] | None, _field("--served-name", "model.served_names", "NAME")]
RayAddress = Annotated[str | None, _field("--ray-address", "ray.address", "ADDRESS")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML or JSON file of settings", show_default=False)
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any other setting (herd config show)", show_default=False),
]
Url = Annotated[str | None, typer.Option("--url", help="a running server (default: the local one)", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def effective_config(config: Path | None, sets: list[str] | None, options: dict[str, Any]) -> Effective:
    """The merged configuration; a mistake ends the program with its explanation."""
    try:
        return load_config(config, sets or (), options)
    except ConfigError as error:
        fail(str(error))


def local_url() -> str:
    """Where the configured server of this machine listens."""
    return base_url(effective_config(None, None, {}).config.http)


def fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    """Say `message` on standard error and end the program."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
