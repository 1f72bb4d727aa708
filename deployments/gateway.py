"""The Serve deployment that clients talk to. Thin: it opens the model's text side and its end of the token stream, and
hands Serve the HTTP application."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from ..cluster.metrics import GatewayMetrics
from ..model.byte_tokenizer import byte_tokenizer
from ..model.chat_format import ChatError, ChatFormat, load_chat_format
from ..model.config import parse_config
from ..model.source import ModelSource, resolve_model
from ..model.tokenizer import Tokenizer
from .config import HerdConfig, ModelConfig, cache_directory, parse_tree
from .engine_client import EngineClient
from .expert_plan import router_spec
from .http_app import build_http_app
from .protocol import SamplingDefaults
from .replica_logging import log_with_serve
from .router_client import RouterClient
from .service import Service

log = logging.getLogger("herd.gateway")


@serve.deployment(max_ongoing_requests=1024)
@serve.ingress()
class Gateway:
    """One replica of the HTTP API. It refuses what is beyond `gateway.max_inflight` itself, so that Serve's own limit,
    `max_ongoing_requests`, should be larger."""

    def __init__(self, tree: Mapping[str, Any], engine: DeploymentHandle) -> None:
        """`tree`: the configuration; `engine`: the Engine deployment."""
        config = parse_tree(tree)
        log_with_serve()
        metrics = GatewayMetrics()
        self._client = EngineClient(
            engine,
            metrics,
            host=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            recovery_timeout_s=config.gateway.recovery_timeout_s,
        )
        self._service = open_service(config, self._client, metrics, serve.get_replica_context().app_name)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        await self._client.start()
        return build_http_app(self._service)

    async def __del__(self) -> None:
        await self._client.close()


class NoChat:
    """Stands for the chat format of a model that has none: completions still work."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def render(self, messages: Any, tools: Any = None, add_generation_prompt: bool = True) -> list[int]:
        """Always raises ChatError."""
        raise ChatError(self._reason, param="messages")


def open_service(config: HerdConfig, client: EngineClient, metrics: GatewayMetrics, application: str) -> Service:
    """Read the model's text side. `application`: the Serve application's name, by which its router is found. Raises
    what `resolve_model` and `Tokenizer` raise."""
    model = config.model
    source = resolve_model(model.path, load_format=model.load_format, cache_dir=cache_directory(model))
    shape = parse_config(source.config_json, source.generation_json)
    directory = source.tokenizer_dir
    has_router = config.experts.mode == "shards"
    router = RouterClient(application, router_spec(config, source, shape)) if has_router else None
    tokenizer = byte_tokenizer(shape.vocab_size) if directory is None else Tokenizer.from_dir(directory)
    return Service(
        config.gateway,
        served_names=model.served_names or (source.name,),
        tokenizer=tokenizer,
        chat_format=_chat_format(model, source, tokenizer),
        vocab_size=shape.vocab_size,
        engines=client,
        metrics=metrics,
        defaults=_sampling_defaults(source),
        returns_request_id=False,  # every ingress of Serve does
        cluster_status=None if router is None else router.status,
    )


def _chat_format(model: ModelConfig, source: ModelSource, tokenizer: Tokenizer) -> ChatFormat:
    try:
        return load_chat_format(source.directory, tokenizer, model.chat_format)
    except ChatError as error:
        if model.chat_format != "auto":
            raise
        log.warning("chat is off: %s", error.message)
        return NoChat(error.message)


def _sampling_defaults(source: ModelSource) -> SamplingDefaults:
    known = SamplingDefaults.model_fields.keys()
    given = {key: value for key, value in source.generation_json.items() if key in known and value is not None}
    try:
        return SamplingDefaults.model_validate(given)
    except ValidationError as error:
        log.warning("generation_config.json is not used: %s", error)
        return SamplingDefaults()
