"""A scheduler in a world without tensors: a runner that remembers what it wrote to every page, clients that know each
output beforehand, and checks of everything a plan promises."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import pytest

from herd.cluster.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    ExpertUnavailable,
    Overloaded,
)
from herd.cluster.kv_layout import KvLayout
from herd.cluster.kv_manager import KvManager
from herd.cluster.request import EngineRequest, FinishReason, Request, RequestState, StepOutput
from herd.cluster.scheduler import Scheduler, StepPlan
from herd.model.sampling_params import SamplingParams

StepEnd = Literal["done", "failed", "abandoned"]
EOS = 1
MAX_MODEL_LEN = 100
MAX_QUEUED = 8


@dataclass(frozen=True)
class Shape:
    num_global_layers: int
    num_local_layers: int
    chunk: int | None
    block_size: int


def chain_of(tokens: list[int], chain: list[int]) -> list[int]:
    """Extend `chain` so that entry p names tokens[: p + 1]: what keys and values at p depend on."""
    for position in range(len(chain), len(tokens)):
        chain.append(hash((chain[-1] if chain else 0, tokens[position])))
    return chain


def draw_after(history: int) -> int:
    """The model: the next token as a function of everything before it. Ends a text now and then."""
    return EOS if history % 23 == 0 else 2 + history % 5


def generate(prompt: list[int], sampling: SamplingParams, limit: int) -> tuple[list[int], FinishReason]:
    """The output of a request that is alone in the world."""
    if len(prompt) >= limit:
        return [], FinishReason.LENGTH
    tokens, chain = list(prompt), chain_of(prompt, [])
    stops = {*sampling.stop_token_ids} if sampling.ignore_eos else {EOS, *sampling.stop_token_ids}
    while True:
        tokens.append(draw_after(chain_of(tokens, chain)[-1]))
        output = tokens[len(prompt) :]
        if tokens[-1] in stops and len(output) > sampling.min_tokens:
            return output, FinishReason.STOP
        if len(output) == sampling.max_tokens or len(tokens) == limit:
            return output, FinishReason.LENGTH


def pool_limit(layout: KvLayout, at_most: int) -> int:
    """Longest sequence the pool can hold, counted position by position."""
    for position in range(at_most):
        num_blocks = position // layout.block_size + 1
        hidden_blocks = 0 if layout.chunk is None else position // layout.chunk * (layout.chunk // layout.block_size)
        pages = num_blocks * layout.pages_per_global_block
        pages += (num_blocks - hidden_blocks) * layout.pages_per_local_block
        if pages > layout.num_pages:
            return position + 1  # the last token is never computed
    return at_most


class World:
    """A scheduler, a runner that moves no tensors but remembers what it wrote where, and clients that keep count."""

    def __init__(self, shape: Shape, num_pages: int, max_num_seqs: int, budget: int, prefix_caching: bool) -> None:
        self.layout = KvLayout.build(
            num_global_layers=shape.num_global_layers,
            num_local_layers=shape.num_local_layers,
            chunk=shape.chunk,
            block_size=shape.block_size,
            num_pages=num_pages,
        )
        self.kv = KvManager(self.layout, prefix_caching)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_queued=MAX_QUEUED,
            max_model_len=MAX_MODEL_LEN,
            kv=self.kv,
            eos_ids=frozenset({EOS}),
        )
        self.limit = pool_limit(self.layout, MAX_MODEL_LEN)
        self.memory: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.chains: dict[Request, list[int]] = defaultdict(list)
        self.mirrors: dict[str, tuple[int, list[int], list[int]]] = {}
        self.live: dict[str, Request] = {}
        self.expected: dict[str, tuple[list[int], FinishReason]] = {}
        self.received: dict[str, list[int]] = {}
        self.num_ended = self.num_added = 0
        self.now_s = 0.0
        self.plan: StepPlan | None = None

    def add(
        self, prompt: list[int], sampling: SamplingParams, *, priority=0, salt="", lifetime_s=None, resume=0
    ) -> None:
        """Send a request; `resume`: as if that many tokens of its output had been received from another engine."""
        arrival = self.num_added
        self.num_added += 1
        output, reason = generate(prompt, sampling, self.limit)
        journal = output[:resume]
        spec = EngineRequest(
            id=f"r{arrival}",
            prompt_ids=prompt + journal,
            sampling=sampling,
            priority=priority,
            cache_salt=salt,
            deadline_s=None if lifetime_s is None else self.now_s + lifetime_s,
            num_resumed_tokens=len(journal),
        )
        if len(prompt) >= self.limit:
            with pytest.raises(ContextLengthExceeded) as caught:
                self.scheduler.add(spec, arrival)
            assert (caught.value.limit, caught.value.requested) == (self.limit, len(prompt))
            return
        if len(journal) < len(output) and len(self.live) == self.max_num_seqs + MAX_QUEUED:
            with pytest.raises(Overloaded):
                self.scheduler.add(spec, arrival)
            return
        request = self.scheduler.add(spec, arrival)
        if request.state is RequestState.FINISHED:
            assert (journal, request.finish_reason) == (output, reason)
            return
        self.live[spec.id] = request
        self.expected[spec.id] = (output[len(journal) :], reason)
        self.received[spec.id] = []

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id)
        if request_id in self.live:
            assert output is not None
            assert output.finish_reason is FinishReason.ABORT
            self.receive(output)
        else:
            assert output is None

    def advance_clock(self, seconds: float) -> None:
        self.now_s += seconds
        for output in self.scheduler.expire(self.now_s):
            assert isinstance(output.error, DeadlineExceeded)
            self.receive(output)
        for request in self.live.values():
            assert request.spec.deadline_s is None or request.spec.deadline_s > self.now_s

    def receive(self, output: StepOutput) -> None:
        request = self.live[output.request_id]
        received = self.received[output.request_id]
        received += output.token_ids
        tokens, reason = self.expected[output.request_id]
        assert received == tokens[: len(received)], "a token is wrong, lost or doubled"
        if output.finish_reason is None and output.error is None:
            assert len(received) < len(tokens)
            return
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (received, output.finish_reason) == (tokens, reason)
        assert request.state is RequestState.FINISHED
        self.num_ended += 1
        del self.live[output.request_id], self.expected[output.request_id], self.received[output.request_id]

    def schedule(self) -> None:
        self.plan = self.scheduler.schedule()
        self.check_plan(self.plan)

    def finish_step(self, end: StepEnd = "done", num_lost: int = 1) -> None:
        """End the step in flight: as planned, with a failure of all, or abandoned because the first `num_lost` of its
        requests lack an expert."""
        plan, self.plan = self.plan, None
        assert plan is not None
        if end == "abandoned":
            self.abandon_step(plan, num_lost)
            return
        self.execute(plan)
        if end == "failed":
            outputs = self.scheduler.fail_step(plan, EngineFault("the step failed"))
            assert all(isinstance(output.error, EngineFault) for output in outputs)
        else:
            draws = [(draw_after(self.chains[entry.request][-1]), None) for entry in plan.sampling]
            outputs = self.scheduler.update(plan, draws)
        for output in outputs:
            self.receive(output)

    def abandon_step(self, plan: StepPlan, num_lost: int) -> None:
        """Whatever the step wrote is worth nothing; who is not lost stands where it stood, and nothing is published."""
        before = {request: (request.num_computed_tokens, request.num_tokens) for request, *_ in plan.entries}
        published = [dict(blocks) for blocks in self.kv.pool._published]
        for request, num_tokens, _ in plan.entries:
            self.mirror_tables(request.id)
            start, stop = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            chain = chain_of(request.token_ids, self.chains[request])
            for place, _content in self.contents(request, chain, start, start, stop):
                self.memory[place] = ("abandoned", 0, 0)
        for request, *_ in plan.entries[:num_lost]:
            output = self.scheduler.fail(request.id, ExpertUnavailable("nobody hosts an expert"))
            assert (output is None) == (request.id not in self.live)
            if output is not None:
                self.receive(output)
        self.scheduler.abandon(plan)
        assert [*self.kv.pool._published] == published
        for request, progress in before.items():
            assert (request.num_computed_tokens, request.num_tokens) == progress

    def execute(self, plan: StepPlan) -> None:
        """What the runner does: write all new positions, then look at everything that attention would read."""
        for request, num_tokens, samples in plan.entries:
            start, stop = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            assert samples == (stop == request.num_tokens)
            self.mirror_tables(request.id)
            chain = chain_of(request.token_ids, self.chains[request])
            for place, content in self.contents(request, chain, start, start, stop):
                self.memory[place] = content
        for request, num_tokens, _ in plan.entries:
            start, stop = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            chain = self.chains[request]
            first_local = 0 if self.layout.chunk is None else start // self.layout.chunk * self.layout.chunk
            for place, content in self.contents(request, chain, 0, first_local, stop):
                assert self.memory[place] == content, f"{request.id} reads another text"

    def contents(self, request: Request, chain: list[int], first_global: int, first_local: int, stop: int):
        """((page, offset), what is to be there) for the positions of both groups."""
        tables, size = self.kv.tables(request.id), self.layout.block_size
        for name, pages, width, origin, first in (
            ("global", tables.global_pages, self.layout.pages_per_global_block, 0, first_global),
            ("local", tables.local_pages, self.layout.pages_per_local_block, tables.local_start, first_local),
        ):
            for position in range(first, stop) if width else ():
                block = (position - origin) // size
                for index, page in enumerate(pages[block * width : (block + 1) * width]):
                    yield (page, position % size), (name, index, chain[position])
                assert first >= origin
                assert len(pages) >= (block + 1) * width, f"position {position} has no page"

    def mirror_tables(self, request_id: str) -> None:
        """Within an epoch a copy of the tail must be enough."""
        tables = self.kv.tables(request_id)
        epoch, global_pages, local_pages = self.mirrors.get(request_id, (0, [], []))
        if epoch != tables.epoch:
            global_pages, local_pages = [], []
        global_pages += tables.global_pages[len(global_pages) :]
        local_pages += tables.local_pages[len(local_pages) :]
        self.mirrors[request_id] = (tables.epoch, global_pages, local_pages)
        assert (global_pages, local_pages) == (tables.global_pages, tables.local_pages)

    def check_plan(self, plan: StepPlan) -> None:
        assert plan.total_tokens == sum(entry.num_tokens for entry in plan.entries) <= self.budget
        assert plan.entries or not self.live, "work, but no progress"
        planned = {entry.request: entry for entry in plan.entries}
        assert len(planned) == len(plan.entries)
        for request, num_tokens, _ in plan.entries:
            assert request.state is RequestState.RUNNING
            assert num_tokens > 0
            start, chunk = request.num_computed_tokens, self.layout.chunk
            assert chunk is None or start // chunk == (start + num_tokens - 1) // chunk, "a piece crosses a border"
        running = sorted((r for r in self.live.values() if r.state is RequestState.RUNNING), key=lambda r: r.order)
        waiting = [r for r in self.live.values() if r.state is not RequestState.RUNNING]
        assert len(running) <= self.max_num_seqs
        assert not running or running[0] in planned, "the first in order makes no progress"
        for request in running[:-1]:
            assert request in planned or request.num_tokens - request.num_computed_tokens > 1, "a decode starves"
        for victim in plan.preempted:
            if victim not in planned:
                assert all(request.order < victim.order for request in planned), "preempted for somebody after it"
        for other in waiting:
            peers = [r for r in running if r.spec.priority == other.spec.priority]
            assert all(r.order < other.order for r in peers), "a later arrival overtook an equal"
        self.check_sharing(running)

    def check_sharing(self, running: list[Request]) -> None:
        """Two requests have a page in common only where both have computed a whole block of the same text."""
        holders: dict[int, tuple[Request, str, int]] = {}
        size = self.layout.block_size
        for request in running:
            tables = self.kv.tables(request.id)
            for name, pages, width, origin in (
                ("global", tables.global_pages, self.layout.pages_per_global_block, 0),
                ("local", tables.local_pages, self.layout.pages_per_local_block, tables.local_start),
            ):
                for index, page in enumerate(pages):
                    stop = origin + (index // width + 1) * size
                    other, other_name, other_stop = holders.setdefault(page, (request, name, stop))
                    if other is request:
                        assert (other_name, other_stop) == (name, stop)
                        continue
                    assert self.kv.prefix_caching
                    assert (other_name, other_stop) == (name, stop)
                    assert stop <= min(request.num_computed_tokens, other.num_computed_tokens)
                    assert request.token_ids[:stop] == other.token_ids[:stop]
                    assert request.spec.cache_salt == other.spec.cache_salt

    def check(self) -> None:
        self.scheduler.check_integrity()
        usage = self.kv.usage
        assert usage.free + usage.cached + usage.used == usage.total == self.layout.num_pages
        assert self.kv.prefix_caching or usage.cached == 0
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def drain(self) -> None:
        """Let everything end; then no page is in use."""
        if self.plan is not None:
            self.finish_step()
        # Alone, each of the live requests needs at most one step per token.
        for _ in range(MAX_MODEL_LEN * (len(self.live) + 1)):
            if not self.scheduler.has_work:
                break
            self.schedule()
            self.finish_step()
            self.check()
        assert not self.live
        assert self.kv.usage.used == 0
