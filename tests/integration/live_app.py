"""A Serve application under test: its address, clients that give up in time, and what its engine says of itself."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from herd.deployments.app import build
from herd.model.tokenizer import Tokenizer

from ..model.tokenizers_for_tests import LLAMA4_SPECIALS, write_tokenizer_json

CALL_S = 60.0
"""Longer than any call may take: nothing hangs."""
IDLE_S = 20.0

Message = dict[str, str]

TINY = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 4096,
    "attention_chunk_size": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Scout in small. In bfloat16, where a row's bits do not depend on the rows beside it."""


def write_tiny(folder: Path) -> Tokenizer:
    """A checkpoint without weights (load it as `dummy`) in `folder`, with a tokenizer that knows Llama 4's tokens."""
    tokenizer = Tokenizer.from_dir(write_tokenizer_json(folder, LLAMA4_SPECIALS))
    ends = [tokenizer.special_tokens[name] for name in ("<|end_of_text|>", "<|eot|>")]
    config = TINY | {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    return tokenizer


@dataclass(frozen=True)
class LiveApp:
    """One application named `name`, whose model is `model`."""

    name: str
    model: str
    url: str
    tokenizer: Tokenizer
    max_inflight: int

    @contextmanager
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        """The real client, not trying again by itself."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=CALL_S, **options) as it:
            yield it

    def async_client(self) -> openai.AsyncOpenAI:
        """Use it with `async with`."""
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(limits=limits, timeout=CALL_S)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)  # pyright: ignore

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """`body` as JSON, or as it is if it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}{path}", content=raw, headers=headers, timeout=CALL_S)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=CALL_S)

    def stats(self) -> dict[str, Any]:
        """What `Engine.stats` says. Not from within an event loop."""
        handle = importlib.import_module("ray.serve").get_deployment_handle("Engine", self.name)
        return handle.stats.remote().result(timeout_s=CALL_S)

    def wait_for(self, condition: str, seconds: float = IDLE_S) -> dict[str, Any]:
        """Poll the engine until `condition`, an expression over its figures such as `running > 0`, is true."""
        deadline = time.monotonic() + seconds
        while not eval(condition, {}, stats := self.stats()):
            assert time.monotonic() < deadline, f"not {condition}: {stats}"
            time.sleep(0.02)
        return stats

    def assert_idle(self) -> None:
        """Soon nothing runs or waits and every page is free or cached."""
        stats = self.wait_for("running == 0 and waiting == 0 and pages_used == 0")
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
        assert "herd_gateway_requests_in_flight 0.0" in self.get("/metrics").text


def deploy_app(base_url: str, name: str, model: str, tokenizer: Tokenizer, config: Mapping[str, Any]) -> LiveApp:
    """Run the application of `config` on the shared cluster and wait until it can be talked to."""
    importlib.import_module("ray.serve").run(build(config), name=name, route_prefix=f"/{name}")
    app = LiveApp(name, model, f"{base_url}/{name}", tokenizer, config["gateway"]["max_inflight"])
    deadline = time.monotonic() + CALL_S
    while app.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.1)
    return app
