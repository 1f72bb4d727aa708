"""Wherever experts live, the tokens are the same: engines over shards against the engine with local experts."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.model.checkpoint import DummySource
from herd.model.config import Llama4Config
from herd.model.decoder import Decoder
from herd.model.loading import Loader
from herd.model.served_model import open_model
from herd.model.source import resolve_model
from herd.model.tensor_names import text_tensors

from ..model.conftest import pocket_dir, pocket_gguf
from ..shard_threads import shard_threads
from ..tiny_models import EngineLab, random_ids, tiny_config

__all__ = ["pocket_dir", "pocket_gguf"]

SCOUT = tiny_config()
MAVERICK = tiny_config(num_experts=7, moe_layers=frozenset({1, 3}), dense_width=48)
TOP_2 = tiny_config(num_experts=5, experts_per_token=2)
SHAPES = [(3, 1), (5, 2)]
"""(shards, copies)"""


def loader_of(config: Llama4Config, dtype: torch.dtype = torch.float32) -> Loader:
    return Loader(DummySource(text_tensors(config), 0, torch.float32), config, dtype=dtype)


def outputs(
    decoder: Decoder, prompts: Sequence[Sequence[int]], lab: dict[str, Any], **sampling: Any
) -> list[list[int]]:
    """The tokens of all prompts, run together."""
    engine = EngineLab(decoder, **lab)
    engine.logits = defaultdict(lambda: deque(maxlen=0))  # pyright: ignore[reportAttributeAccessIssue] - gigabytes
    ids = [engine.submit(prompt, **sampling) for prompt in prompts]
    engine.run()
    return [engine.tokens(id_) for id_ in ids]


def prompts_of(vocab_size: int, count: int, longest: int) -> list[list[int]]:
    return [random_ids(3 + 7 * i % longest, vocab_size=vocab_size, seed=i) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SCOUT, MAVERICK, TOP_2], ids=["scout", "maverick", "top-2"])
def test_200_prompts_on_tiny_models(config: Llama4Config, dtype: torch.dtype) -> None:
    lab = {"max_num_seqs": 16, "max_queued": 200, "num_pages": 3000}
    prompts = prompts_of(config.vocab_size, 200, 40)
    local = outputs(loader_of(config, dtype).decoder(), prompts, lab, max_tokens=10)
    for num_shards, copies in SHAPES:
        loader = loader_of(config, dtype)
        with shard_threads(config, loader, dtype, num_shards=num_shards, copies=copies) as shards:
            assert outputs(loader.decoder(shards.dispatcher), prompts, lab, max_tokens=10) == local
            assert all(compute.load()["rows"] for compute in shards.computes)


def test_over_tcp_in_small_calls() -> None:
    """Every layer's rows are cut into calls of at most three."""
    lab = {"max_num_seqs": 16, "max_queued": 40, "num_pages": 1000}
    prompts = prompts_of(SCOUT.vocab_size, 40, 40)
    local = outputs(loader_of(SCOUT).decoder(), prompts, lab)
    loader = loader_of(SCOUT)
    with shard_threads(SCOUT, loader, num_shards=3, tcp=True, max_rows=3) as shards:
        assert outputs(loader.decoder(shards.dispatcher), prompts, lab) == local


def test_a_shard_that_stops_while_requests_run() -> None:
    """Its rows go to the copies, and the tokens stay the same."""
    prompts = prompts_of(SCOUT.vocab_size, 12, 40)
    local = outputs(loader_of(SCOUT).decoder(), prompts, {}, max_tokens=30)
    loader = loader_of(SCOUT)
    with shard_threads(SCOUT, loader, num_shards=3, copies=2) as shards:
        engine = EngineLab(loader.decoder(shards.dispatcher), max_queued=12)
        ids = [engine.submit(prompt, max_tokens=30) for prompt in prompts]
        for _ in range(8):
            engine.engine.step()
        shards.servers[0].stop()
        engine.run()
        assert [engine.tokens(id_) for id_ in ids] == local
        assert shards.dispatcher.stats()["lost_shards"] >= 1


@pytest.mark.slow
def test_200_prompts_on_pocket(pocket_dir: Path) -> None:
    served = open_model(resolve_model("pocket", load_format="auto", cache_dir=pocket_dir.parent))
    config = served.config
    lab = {"max_num_seqs": 50, "max_queued": 200, "num_pages": 1000, "block_size": 16, "budget": 256}
    prompts = prompts_of(config.vocab_size, 200, 30)
    local = outputs(served.decoder(dtype=torch.float32), prompts, lab, max_tokens=16)
    for num_shards, copies in SHAPES:
        with (
            served.loader(dtype=torch.float32) as loader,
            shard_threads(config, loader, num_shards=num_shards, copies=copies, max_rows=256) as shards,
        ):
            assert outputs(loader.decoder(shards.dispatcher), prompts, lab, max_tokens=16) == local
