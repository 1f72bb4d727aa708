"""A stand-in for a server: answers the OpenAI endpoints from a script, in a thread of the test's process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubServer:
    """What it shall say, and what it was asked."""

    def __init__(self) -> None:
        self.pieces = ["Par", "is", "."]
        self.end: str | None = "[DONE]"
        """The last event; None cuts the stream."""
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.ready = True
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    def events(self, path: str) -> Iterator[str]:
        chat = path.endswith("chat/completions")
        for piece in self.pieces:
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            yield json.dumps({"choices": [{"index": 0, **choice, "finish_reason": None}]})
        last = {"delta": {}} if chat else {"text": ""}
        yield json.dumps({"choices": [{"index": 0, **last, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 5, "completion_tokens": len(self.pieces), "total_tokens": 5 + len(self.pieces)}
        yield json.dumps({"choices": [], "usage": usage})
        if self.end is not None:
            yield self.end


@contextmanager
def stub_server() -> Iterator[StubServer]:
    """Run one on a free port."""
    stub = StubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ready":
                self.answer(200 if stub.ready else 503, {"status": "ready" if stub.ready else "loading"})
            elif self.path == "/v1/models":
                self.answer(200, {"object": "list", "data": [{"id": "pocket"}, {"id": "other"}]})
            else:
                self.answer(404, {"error": {"message": "no such route"}})

        def do_POST(self) -> None:
            stub.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if stub.refusal is not None:
                self.answer(*stub.refusal)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for event in stub.events(self.path):
                self.wfile.write(f"data: {event}\n\n".encode())

        def answer(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
