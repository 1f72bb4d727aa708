"""The whole configuration as one frozen tree, and the only place that reads environment variables. Everything else gets
values. Knows nothing of Ray; the engine's own branch is defined beside the engine (`cluster/config.py`).

Sources, each overriding the one before: defaults, a YAML or JSON file, environment variables, `--set`, named options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ..cluster.config import Bytes, EngineConfig
from ..cluster.experts_config import ExpertsConfig
from .config_values import nearest, value_from_text


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    """Which model, and how its files are read."""

    path: str = Field(
        default="pocket", description="checkpoint directory in Hugging Face format, or a preset (herd models)"
    )
    served_names: tuple[str, ...] = Field(
        default=(), description="names that requests may use (default: the model's own)"
    )
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        default="auto", description="of the weights, dummy being seeded random"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="number format of weights and arithmetic"
    )
    quantize: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        default="auto", description="of weights, while they load; auto is as the checkpoint is"
    )
    seed: int = Field(default=0, ge=0, description="of dummy weights")
    chat_format: Literal["auto", "llama4", "template"] = Field(
        default="auto", description="how messages become a prompt"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="prompt plus output in tokens (default: by the model)"
    )
    cache_dir: str | None = Field(default=None, description="where pocket is kept (default: herd in the user's cache)")


class GatewayConfig(_Section):
    """The HTTP API: how much it admits and how long it waits."""

    replicas: int = Field(default=1, ge=1, description="gateway replicas")
    max_inflight: int = Field(
        default=256, ge=1, description="requests one gateway works on; further ones are answered 429"
    )
    max_body_bytes: Bytes = Field(default=4 << 20, ge=1024, description="larger request bodies are answered 413")
    request_timeout_s: float | None = Field(
        default=600.0, gt=0, description="a slower request is answered 504 (none: never)"
    )
    recovery_timeout_s: float = Field(
        default=120.0, ge=0, description="how long requests of an engine that died wait for another one; then 503"
    )
    max_n: int = Field(default=128, ge=1, description="largest n of one request")
    max_logprobs: int = Field(default=20, ge=0, description="largest top_logprobs of one request")
    log_requests: bool = Field(default=True, description="write one line per request to the gateway's log")


class HttpConfig(_Section):
    """Where clients connect."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 means every interface"
    )
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    ingress: Literal["auto", "haproxy", "proxy"] = Field(default="auto", description="what accepts connections")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="how long running requests may go on after a stop")


class RayConfig(_Section):
    """Which Ray cluster."""

    address: str | None = Field(
        default=None, description="running Ray cluster to use (default: start one on this machine)"
    )


class HerdConfig(_Section):
    """Everything that can be configured. The same tree is the argument of the Serve application."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig.model_validate({})
    experts: ExpertsConfig = ExpertsConfig.model_validate({})
    gateway: GatewayConfig = GatewayConfig()
    http: HttpConfig = HttpConfig()
    ray: RayConfig = RayConfig()


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the key and where its value came from."""


@dataclass(frozen=True)
class Effective:
    """A validated configuration and, for each dotted key, where its value came from: "default", "file PATH",
    "env NAME", "--set" or "option"."""

    config: HerdConfig
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, origin) in the order of the tree; values of secret keys are masked."""
        for key, value in _flatten(self.config.model_dump()):
            yield key, "****" if value is not None and is_secret(key) else value, self.origins[key]


_SECRET = re.compile(r"(api_key|secret|password|auth_token)s?$")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
_ALIASES = {"HERD_CACHE_DIR": "model.cache_dir", "RAY_ADDRESS": "ray.address"}


def is_secret(key: str) -> bool:
    """Whether the value of the dotted key must not be shown."""
    return _SECRET.search(key) is not None


def fields() -> dict[str, FieldInfo]:
    """Every field of the tree by its dotted key."""
    return dict(_walk(HerdConfig, ""))


def environment_names() -> dict[str, str]:
    """Environment variable -> dotted key. Where two name one key, the later one wins."""
    return _ALIASES | {"HERD_" + key.upper().replace(".", "_"): key for key in fields()}


def load_config(
    file: Path | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Effective:
    """Merge all sources. `sets` holds `a.b=c` texts, `options` dotted keys (None: not given), `env` stands for the
    process environment. Raises ConfigError."""
    known = fields()
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")

    def put(key: str, value: Any, origin: str) -> None:
        if key not in known:
            raise ConfigError(f"{origin}: there is no setting {key!r}{_did_you_mean(key, known)}")
        values[key], origins[key] = value, origin

    if file is not None:
        for key, value in _read_file(file):
            put(key, value, f"file {file}")
    for name, key in environment_names().items():
        text = (os.environ if env is None else env).get(name)
        # Kubernetes puts HERD_HTTP_PORT=tcp://10.0.0.1:80 into pods beside a service named herd-http.
        if text is not None and not _SERVICE_LINK.match(text):
            put(key, _from_text(key, text, known, f"env {name}"), f"env {name}")
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r}: write it like --set http.port=9000")
        put(key.strip(), _from_text(key.strip(), value, known, "--set"), "--set")
    for key, value in (options or {}).items():
        if value is not None:
            put(key, value, "option")
    return Effective(_validate(values, origins), origins)


def parse_tree(tree: Mapping[str, Any]) -> HerdConfig:
    """The configuration that a nested mapping describes, with defaults for what it leaves out; no environment is read,
    so that the argument of the Serve application alone decides. Raises ConfigError."""
    known = fields()
    values = dict(_flatten(tree))
    for key in values:
        if key not in known:
            raise ConfigError(f"there is no setting {key!r}{_did_you_mean(key, known)}")
    return _validate(values, dict.fromkeys(known, "application arguments"))


def cache_directory(config: ModelConfig) -> Path:
    """Where converted models are kept; need not exist yet."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "herd"


PROGRESS_VARIABLE = "HERD_LOAD_PROGRESS"
"""Set by `herd serve` for the replicas it starts; not a setting."""


def progress_file() -> Path | None:
    """Where an engine on this machine shall say how far it is with loading; None when nobody asked."""
    path = os.environ.get(PROGRESS_VARIABLE)
    return Path(path) if path else None


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for starting children."""
    return dict(os.environ)


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; a mapping is a branch only where the tree has one."""
    known = fields()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _flatten(value, f"{key}.")
        elif value is None and key not in known and any(k.startswith(f"{key}.") for k in known):
            continue  # a section without entries, as YAML reads `http:`
        else:
            yield key, value


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML or JSON: {error}") from error
    if not isinstance(tree, Mapping | None):
        raise ConfigError(f"{file} must hold a mapping of sections, not a {type(tree).__name__}")
    yield from _flatten(tree or {})


def _from_text(key: str, text: str, known: Mapping[str, FieldInfo], origin: str) -> Any:
    if key not in known:
        return text
    try:
        return value_from_text(text, known[key].annotation)
    except ValueError as error:
        raise ConfigError(f"{key}: {error} ({origin})") from error


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> HerdConfig:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    try:
        return HerdConfig.model_validate(tree)
    except ValidationError as failure:
        raise ConfigError("\n".join(_explain(error, origins) for error in failure.errors())) from failure


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    reason = error["msg"].removeprefix("Value error, ")
    path = [str(part) for part in error["loc"]]
    key = next((k for n in range(len(path), 0, -1) if (k := ".".join(path[:n])) in origins), None)
    return reason if key is None else f"{key}: {reason}, got {error['input']!r} ({origins[key]})"


def _did_you_mean(key: str, known: Mapping[str, FieldInfo]) -> str:
    close = nearest(key, known)
    return f"; did you mean {close}?" if close else ""
