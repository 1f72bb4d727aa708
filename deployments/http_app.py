"""The gateway's routes as a FastAPI application over one `Service`: nothing but routing, the small GET endpoints and
the errors that no handler sees. Knows nothing of Ray."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..cluster.errors import EngineFault, EngineUnavailable, HerdError
from ..cluster.metrics import CONTENT_TYPE
from . import api
from .exchange import Exchange, Handler
from .http_errors import MethodNotAllowed, UnknownRoute, error_body, error_headers
from .protocol_chat import ChatBody
from .protocol_completions import CompletionBody, DetokenizeBody, TokenizeChatBody, TokenizeCompletionBody
from .responses import to_json
from .service import Service

log = logging.getLogger("herd.gateway")

VERSION = importlib.metadata.version("herd-serve")


def build_http_app(service: Service) -> FastAPI:
    """The application of one gateway replica."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="Herd", version=VERSION, lifespan=lifespan, redirect_slashes=False)
    for path, handler, shapes in (
        ("/v1/chat/completions", api.chat_completions, [ChatBody]),
        ("/v1/completions", api.completions, [CompletionBody]),
        ("/tokenize", api.tokenize, [TokenizeCompletionBody, TokenizeChatBody]),
        ("/detokenize", api.detokenize, [DetokenizeBody]),
    ):
        _add_post(app, service, path, handler, shapes)
    _add_models(app, service)
    _add_probes(app, service)
    _add_error_handlers(app, service)
    _add_schemas(app, [ChatBody, CompletionBody, TokenizeCompletionBody, TokenizeChatBody, DetokenizeBody])
    return app


def _add_post(app: FastAPI, service: Service, path: str, handler: Handler, shapes: Sequence[type[BaseModel]]) -> None:
    """The body is read and checked by the handler, so that a wrong one gets an OpenAI error and never a 422."""
    refs = [{"$ref": f"#/components/schemas/{shape.__name__}"} for shape in shapes]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    request_body = {"required": True, "content": {"application/json": {"schema": schema}}}

    async def endpoint() -> Response:
        return Exchange(service, path, handler)

    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_class=Response,
        summary=handler.__doc__,
        operation_id=handler.__name__,
        openapi_extra={"requestBody": request_body},
    )


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        models = [api.model_object(service, name) for name in service.served_names]
        return _json({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        return _json(api.model_object(service, service.resolve_model(name)))


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """The process is alive."""
        return _json({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """An engine answers: requests will be served."""
        if await service.probe():
            return _json({"status": "ready", "models": service.served_names, "max_model_len": service.max_model_len})
        status = "loading" if service.max_model_len is None else "unavailable"
        return _json({"status": status}, 503, error_headers(EngineUnavailable(status)))

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": VERSION})

    @app.get("/herd/status")
    async def cluster_status() -> Response:
        """Expert map, shards, router and engines; answers also while the router is away."""
        return _json(await service.cluster_status())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path[:200]}"
        if error.status_code == 405:
            return _error(service, MethodNotAllowed(f"Method not allowed: {where}."), dict(error.headers or {}))
        if error.status_code == 404:
            return _error(service, UnknownRoute(f"Unknown URL: {where}."))
        refused = HerdError(str(error.detail))
        refused.status = error.status_code
        return _error(service, refused)

    async def on_herd(_: Request, error: Exception) -> Response:
        assert isinstance(error, HerdError)
        return _error(service, error)

    async def on_defect(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error(service, EngineFault("The server had an internal error; it has been logged."))

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(HerdError, on_herd)
    app.add_exception_handler(Exception, on_defect)


def _add_schemas(app: FastAPI, shapes: Sequence[type[BaseModel]]) -> None:
    """Put the bodies' schemas where the routes refer to them."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for shape in shapes:
            if shape.__name__ not in schemas:
                schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[shape.__name__] = schema
        return document

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]


def _json(value: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    extra = {name.decode(): text.decode() for name, text in headers or ()}
    return Response(to_json(value), status, media_type="application/json", headers=extra)


def _error(service: Service, error: HerdError, headers: dict[str, str] | None = None) -> Response:
    service.metrics.errors.labels(error.code).inc()
    extra = {name.decode(): text.decode() for name, text in error_headers(error)}
    return Response(error_body(error), error.status, media_type="application/json", headers=(headers or {}) | extra)
