"""Tiny Llama 4 models for tests: configurations, dummy weights, a decoder run over one sequence without an engine, and
an engine that records every logit and every output. Needs neither transformers nor files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from herd.cluster.decode_graphs import DecodeGraphs, Record
from herd.cluster.engine import Engine
from herd.cluster.kv_layout import KvLayout
from herd.cluster.kv_manager import KvManager
from herd.cluster.overlap import OverlapTuner
from herd.cluster.request import EngineRequest, StepOutput
from herd.cluster.runner import Draw, ModelRunner
from herd.cluster.scheduler import Scheduler, StepPlan
from herd.kernels.paged_attention import PagedKeys
from herd.model.checkpoint import DummySource
from herd.model.config import Llama4Config, RopeScaling
from herd.model.decoder import Batch, Decoder, GroupPages
from herd.model.kv_cache import KvCache
from herd.model.loading import Loader
from herd.model.sampling import Sampler
from herd.model.sampling_params import SamplingParams
from herd.model.tensor_names import text_tensors


def tiny_config(**changes: Any) -> Llama4Config:
    """A Scout in small: four layers, the last without RoPE, chunks of 8."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "expert_width": 24,
        "dense_width": 40,
        "num_experts": 4,
        "experts_per_token": 1,
        "moe_layers": frozenset(range(4)),
        "rope_layers": frozenset({0, 1, 2}),
        "attention_chunk_size": 8,
        "rope_scaling": RopeScaling(
            factor=16, low_freq_factor=1, high_freq_factor=1, original_max_position_embeddings=32
        ),
        "floor_scale": 4,
        "max_position_embeddings": 1024,
    }
    return Llama4Config(**fields | changes)


def tiny_decoder(config: Llama4Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with seeded random weights."""
    return Loader(DummySource(text_tensors(config), seed, torch.float32), config, dtype=dtype).decoder()


def random_ids(length: int, *, vocab_size: int, seed: int) -> list[int]:
    """Token ids from 3 up, clear of the usual special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


def sequence_logits(decoder: Decoder, ids: Sequence[int], piece: int, num_prefill: int | None = None) -> Tensor:
    """[T, V] logits of one sequence: `num_prefill` ids in pieces of at most `piece`, the rest one by one. Pages come
    in a shuffled order; each layer has pages of its own."""
    config = decoder.config
    chunk = config.attention_chunk_size
    block_size = math.gcd(chunk or 4, 4)
    blocks = -(-len(ids) // block_size)
    kinds = [(place.local, place.page_of_block) for place in _cache_of(decoder, block_size, 1).places]
    cache = _cache_of(decoder, block_size, blocks * len(kinds))
    order = torch.randperm(blocks * len(kinds), generator=torch.Generator().manual_seed(7)).int().view(len(kinds), -1)
    out, start = [], 0
    for end in piece_ends(len(ids), piece, num_prefill, chunk):
        positions_T = torch.arange(start, end)
        pages = {}
        for kind, table_N in zip(kinds, order, strict=True):
            first = start - start % chunk if kind[0] and chunk else 0
            slots_T = table_N[positions_T // block_size].long() * block_size + positions_T % block_size
            table_SN = table_N[None, first // block_size :].contiguous()
            pages[kind] = GroupPages(slots_T, PagedKeys.build(table_SN, [end - first], [0, end - start]))
        batch = Batch(torch.tensor(ids[start:end]), positions_T, pages)
        out.append(decoder.logits(decoder.forward(batch, cache)))
        start = end
    return torch.cat(out)


def _cache_of(decoder: Decoder, block_size: int, num_pages: int) -> KvCache:
    """A cache with one layer to a page."""
    return KvCache(decoder.config, num_pages=num_pages, layers_per_page=1, block_size=block_size, dtype=decoder.dtype)


def piece_ends(length: int, piece: int, num_prefill: int | None, chunk: int | None) -> list[int]:
    """Where the pieces of a sequence end; none crosses a chunk border."""
    ends, start = [], 0
    num_prefill = length if num_prefill is None else num_prefill
    while start < length:
        step = min(piece, num_prefill - start) if start < num_prefill else 1
        if chunk is not None:
            step = min(step, chunk - start % chunk)
        start += step
        ends.append(start)
    return ends


class _RecordingDecoder:
    """A decoder that keeps its last hidden states, seen as [T, D]."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.hidden_TD = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, batch: Batch, cache: KvCache) -> Tensor:
        self.hidden_TD = self._decoder.forward(batch, cache)
        return self.hidden_TD

    def forward_interleaved(self, batches: Sequence[Batch], cache: KvCache) -> list[Tensor]:
        parts = self._decoder.forward_interleaved(batches, cache)
        self.hidden_TD = torch.cat(parts)
        return parts


class _RecordingRunner(ModelRunner):
    """Notes the logits of every position that a plan computes, sampled from or not."""

    def watch(self, decoder: _RecordingDecoder, note: Callable[[str, int, Tensor], None]) -> None:
        self._seen, self._note = decoder, note

    def run(self, plan: StepPlan) -> list[Draw]:
        draws = super().run(plan)
        rows = iter(self._seen.logits(self._seen.hidden_TD))
        for request, num_tokens, _ in plan.entries:
            for position in range(request.num_computed_tokens, request.num_computed_tokens + num_tokens):
                self._note(request.id, position, next(rows))
        return draws


class EngineLab:
    """An engine of one thread. Its outputs are kept by request; so are the logits of all positions, in the order in
    which they were computed (a preempted request computes some twice)."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int = 600,
        block_size: int = 4,
        budget: int = 64,
        max_num_seqs: int = 8,
        max_queued: int = 64,
        max_model_len: int = 512,
        prefix_caching: bool = True,
        eos_ids: Sequence[int] = (),
        clock: Callable[[], float] = lambda: 0.0,
        overlap: OverlapTuner | None = None,
        record: Record | None = None,
    ) -> None:
        """`record`: how decoding steps are recorded and replayed; None computes them anew."""
        config = decoder.config
        local = config.num_local_layers
        layout = KvLayout.build(
            num_global_layers=config.num_layers - local,
            num_local_layers=local,
            chunk=config.attention_chunk_size,
            block_size=block_size,
            num_pages=num_pages,
        )
        self.kv = KvManager(layout, prefix_caching)
        self.cache = KvCache(
            config,
            num_pages=num_pages,
            layers_per_page=layout.layers_per_page,
            block_size=layout.block_size,
            dtype=decoder.dtype,
        )
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_queued=max_queued,
            max_model_len=max_model_len,
            kv=self.kv,
            eos_ids=frozenset(eos_ids),
        )
        self.outputs: dict[str, list[StepOutput]] = defaultdict(list)
        self.logits: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self.prompts: dict[str, list[int]] = {}
        recording = _RecordingDecoder(decoder)
        sampler = Sampler(config.vocab_size, eos_ids=frozenset(eos_ids))
        graphs = None
        if record is not None:
            graphs = DecodeGraphs(lambda b: decoder.logits(recording.forward(b, self.cache)), decoder.device, record)
        self.graphs = graphs
        self.runner = _RecordingRunner(
            cast(Decoder, recording), self.cache, sampler, self.kv, max_num_seqs, overlap, graphs
        )
        self.runner.watch(recording, lambda id_, position, row: self.logits[id_].append((position, row)))
        self.faults: list[BaseException] = []
        self.engine = Engine(
            self.scheduler, self.runner, on_outputs=self._take, on_fault=self.faults.append, clock=clock
        )
        self._numbers = count()

    def submit(self, prompt: Sequence[int], *, deadline_s: float | None = None, **sampling: Any) -> str:
        """Queue a prompt, greedy unless `sampling` says otherwise; returns its id."""
        id_ = f"r{next(self._numbers)}"
        self.prompts[id_] = list(prompt)
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | sampling)
        self.engine.submit(EngineRequest(id_, list(prompt), params, deadline_s=deadline_s))
        return id_

    def generate(self, prompt: Sequence[int], **sampling: Any) -> list[int]:
        """The output of one prompt, run to its end."""
        id_ = self.submit(prompt, **sampling)
        self.run()
        return self.tokens(id_)

    def run(self) -> None:
        """Step until nothing is left, checking all invariants after every step."""
        while self.engine.step():
            self.scheduler.check_integrity()
        assert not self.scheduler.has_work
        self.assert_no_page_held()

    def assert_no_page_held(self) -> None:
        usage = self.kv.usage
        assert usage.used == 0
        assert usage.free + usage.cached == usage.total

    def tokens(self, id_: str) -> list[int]:
        """The output so far."""
        return [token for output in self.outputs[id_] for token in output.token_ids]

    def end(self, id_: str) -> StepOutput:
        """The last output; a request must have exactly one that says so."""
        assert [output.is_last for output in self.outputs[id_]].count(True) == 1
        assert self.outputs[id_][-1].is_last
        return self.outputs[id_][-1]

    def _take(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)
