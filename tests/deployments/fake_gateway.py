"""A gateway without processes: the real HTTP application over engines that follow a script, called through ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import FastAPI

from herd.cluster.errors import EngineUnavailable, HerdError
from herd.cluster.metrics import GatewayMetrics
from herd.deployments.config import GatewayConfig
from herd.deployments.generation_stream import GenerationStream, Update
from herd.deployments.http_app import build_http_app
from herd.deployments.protocol import SamplingDefaults
from herd.deployments.service import Service
from herd.model.chat_format import load_chat_format
from herd.model.tokenizer import Tokenizer

from ..model.tokenizers_for_tests import LLAMA4_SPECIALS, write_tokenizer_json

MAX_MODEL_LEN = 512

Step = tuple[Sequence[int], Sequence[Any] | None, dict[str, Any] | None]
"""Token ids, logprobs and end of one update."""
Script = Callable[[Mapping[str, Any]], Iterable[Step | HerdError]]
"""What an engine does with a request: updates, or the error that breaks its stream."""


@cache
def tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.from_dir(write_tokenizer_json(Path(folder), LLAMA4_SPECIALS))


@cache
def _id_of_bytes() -> dict[bytes, int]:
    return {tokenizer().token_bytes(i): i for i in range(tokenizer().vocab_size)}


def byte_ids(text: str) -> list[int]:
    """One token per byte."""
    return [_id_of_bytes()[bytes([b])] for b in text.encode()]


def end(reason: str = "stop", tokens: int = 0, cached: int = 0) -> dict[str, Any]:
    return {"finish_reason": reason, "num_cached_tokens": cached, "num_output_tokens": tokens}


def saying(text: str, *, per_update: int = 1, reason: str = "stop", cached: int = 0) -> Script:
    """An engine that says `text`, some tokens at a time, whatever it is asked; and no more than max_tokens."""

    def script(request: Mapping[str, Any]) -> list[Step]:
        ids = byte_ids(text)
        limit = request["sampling"]["max_tokens"]
        why = "length" if len(ids) > limit else reason
        ids = ids[:limit]
        wants = request["sampling"]["logprobs"]
        steps: list[Step] = []
        for start in range(0, len(ids), per_update):
            part = ids[start : start + per_update]
            last = start + per_update >= len(ids)
            logprobs = None if wants is None else [[-0.5, [i, 7][:wants], [-0.5, -2.0][:wants]] for i in part]
            steps.append((part, logprobs, end(why, len(ids), cached) if last else None))
        return steps or [((), None, end(why, 0, cached))]

    return script


class FakeEngines:
    """Follows `script` for each request, one update per turn of the loop. With `gate` set, waits for it first."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Mapping[str, Any]] = []
        self.aborted: list[str] = []
        self.gate: asyncio.Event | None = None
        self.hold_before_end: asyncio.Event | None = None
        self.answers = True
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, requests: Sequence[Mapping[str, Any]]) -> GenerationStream:
        stream = GenerationStream(len(requests), lambda i: self.aborted.append(requests[i]["id"]))
        self.requests += requests
        for index, request in enumerate(requests):
            task = asyncio.get_running_loop().create_task(self._play(stream, index, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return stream

    async def info(self) -> Mapping[str, Any]:
        if not self.answers:
            raise EngineUnavailable("no engine")
        return {"max_model_len": MAX_MODEL_LEN}

    async def _play(self, stream: GenerationStream, index: int, request: Mapping[str, Any]) -> None:
        if self.gate is not None:
            await self.gate.wait()
        for step in self.script(request):
            await asyncio.sleep(0)
            if isinstance(step, HerdError):
                stream.fail(index, step)
                return
            if step[2] is not None and self.hold_before_end is not None:
                await self.hold_before_end.wait()
            stream.feed(Update(index, *step))


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]

    def events(self) -> list[Any]:
        """Values of the stream's events; "[DONE]" as it is."""
        events = []
        for block in self.body.decode().split("\n\n")[:-1]:
            assert block.startswith("data: ")
            assert "\n" not in block
            events.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
        return events


def text_of(events: list, index: int = 0) -> str:
    """What a choice said over a stream of either kind."""
    said = ""
    for chunk in events:
        for choice in chunk["choices"] if chunk != "[DONE]" else []:
            if choice["index"] == index:
                said += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return said


@dataclass
class FakeGateway:
    app: FastAPI
    service: Service
    engines: FakeEngines

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        leave: asyncio.Event | None = None,
        pieces: Iterable[bytes] | None = None,
        on_piece: Callable[[bytes], None] | None = None,
    ) -> Reply:
        """One request. `body` is sent as JSON unless it is bytes; `pieces` instead sends a body of unknown length; the
        client goes away when `leave` is set."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {} if pieces is not None else {"content-length": str(len(raw))}
        reply = Reply()
        feed = iter([raw] if pieces is None else pieces)
        state = {"next": next(feed, None)}

        async def receive() -> dict[str, Any]:
            if (piece := state["next"]) is not None:
                state["next"] = next(feed, None)
                return {"type": "http.request", "body": piece, "more_body": state["next"] is not None}
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                return
            reply.body += message.get("body", b"")
            reply.pieces.append(message.get("body", b""))
            reply.complete = not message.get("more_body", False)
            if on_piece is not None:
                on_piece(message.get("body", b""))

        all_headers = sent | {k.lower(): v for k, v in (headers or {}).items()}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(k.encode(), v.encode()) for k, v in all_headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, receive, send)  # pyright: ignore[reportArgumentType]
        return reply

    async def post(self, path: str, body: Any, **kwargs: Any) -> Reply:
        return await self.call("POST", path, body, **kwargs)

    async def chat(self, content: str = "hi", **fields: Any) -> Reply:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]} | fields)

    async def complete(self, prompt: Any = "hi", **fields: Any) -> Reply:
        return await self.post("/v1/completions", {"prompt": prompt} | fields)


@asynccontextmanager
async def gateway(
    script: Script | None = None,
    *,
    ready: bool = True,
    defaults: SamplingDefaults | None = None,
    cluster_status: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    **config: Any,
) -> AsyncIterator[FakeGateway]:
    engines = FakeEngines(script or saying("Hello, wörld!"))
    engines.answers = ready
    service = Service(
        GatewayConfig(**config),
        served_names=("tiny", "alias"),
        tokenizer=tokenizer(),
        chat_format=load_chat_format(None, tokenizer(), "llama4"),
        vocab_size=tokenizer().vocab_size,
        engines=engines,
        metrics=GatewayMetrics(),
        defaults=defaults,
        cluster_status=cluster_status,
    )
    async with service.running():
        assert await service.probe() == ready
        yield FakeGateway(build_http_app(service), service, engines)
