"""Which requests compute which tokens in the next step, and what a step's draws mean for them. Owns the waiting and the
running requests and their states; KV blocks are `KvManager`'s. Never sees a tensor, a text, a clock or a process.

A step is `plan = schedule()`, the runner's work, `outputs = update(plan, draws)`; requests may come, be aborted or
expire at any moment between. There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`.

Order is (priority, arrival). The first running request advances in every step, since it may take pages from those
after it and nobody may take its own from it, and the pool alone bounds how long a request may become. So every request
ends as long as none of better order keeps coming.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import NamedTuple

from .errors import ContextLengthExceeded, DeadlineExceeded, HerdError, Overloaded, RequestError
from .kv_manager import KvManager
from .prefix_cache import PrefixHit
from .request import EngineRequest, FinishReason, Request, RequestState, StepOutput, TokenLogprob

_order = attrgetter("order")
_priority = attrgetter("spec.priority")


class PlannedRequest(NamedTuple):
    """Compute positions [request.num_computed_tokens, + num_tokens) of a request."""

    request: Request
    num_tokens: int
    samples: bool
    """The piece reaches the last known token, so a token is drawn after it."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one step. Requests in `preempted` lost their blocks before it; they may be in `entries` again, with
    new tables."""

    entries: tuple[PlannedRequest, ...]
    sampling: tuple[PlannedRequest, ...]
    """Those of `entries` that draw a token, in the same order."""
    preempted: tuple[Request, ...]
    total_tokens: int


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    preemptions: int = 0
    prefix_query_tokens: int = 0
    """Tokens of requests when they were scheduled first."""
    prefix_hit_tokens: int = 0
    """Those of them that the prefix cache supplied."""


class _Step:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = self._total = budget
        self.preempted: list[Request] = []
        self._planned: dict[Request, PlannedRequest] = {}

    def add(self, request: Request, num_tokens: int, samples: bool) -> None:
        assert request not in self._planned, f"request {request.id} is planned twice"
        self._planned[request] = PlannedRequest(request, num_tokens, samples)
        self.budget -= num_tokens

    def drop(self, request: Request) -> None:
        entry = self._planned.pop(request, None)
        if entry is not None:
            self.budget += entry.num_tokens

    def plan(self) -> StepPlan:
        entries = tuple(self._planned.values())
        sampling = tuple([entry for entry in entries if entry.samples])
        return StepPlan(entries, sampling, tuple(self.preempted), self._total - self.budget)


class Scheduler:
    """Continuous batching for one engine. One step at a time: each non-empty plan goes back through `update`,
    `abandon` or `fail_step` before the next `schedule`."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued: int,
        max_model_len: int,
        kv: KvManager,
        eos_ids: frozenset[int],
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), "
                "so that every running request can decode in every step"
            )
        self.kv = kv
        self.counters = SchedulerCounters()
        self.max_num_tokens = min(max_model_len, kv.layout.max_tokens(max_model_len) + 1)
        """Longest sequence, prompt and output, that this engine can produce. The last token of an output is never
        computed, so it may lie one beyond what the pool holds."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_live = max_num_seqs + max_queued
        self._eos_ids = eos_ids
        self._watermark = kv.layout.num_pages // 100
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting: list[Request] = []
        self._next_deadline_s = inf
        self._in_flight: StepPlan | None = None
        self._ended_in_flight: list[Request] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks, preempted ones included."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would plan anything."""
        return bool(self._requests)

    def add(self, spec: EngineRequest, arrival: int) -> Request:
        """Queue a request; `arrival` orders requests of equal priority. A resumed request whose earlier output already
        ends it comes back FINISHED, with its `finish_reason`, and is not queued.

        Raises Overloaded when max_queued requests wait beyond those that have a free seat (max_num_seqs),
        ContextLengthExceeded when not even one token could follow the prompt, and RequestError for an empty prompt or
        an id that is in use.
        """
        if not spec.prompt_ids:
            raise RequestError("the prompt must hold at least one token", param="prompt")
        if spec.id in self._requests:
            raise RequestError(f"request id {spec.id!r} is in use", param="id")
        request = Request(spec, arrival)
        sampling = spec.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        request.stop_ids = stop_ids if sampling.ignore_eos else stop_ids | self._eos_ids
        request.max_num_tokens = min(request.num_prompt_tokens + sampling.max_tokens, self.max_num_tokens)
        if spec.num_resumed_tokens:
            request.finish_reason = _finish_reason(request)
            if request.finish_reason is not None:
                request.advance(RequestState.FINISHED)
                return request
        if request.num_tokens >= self.max_num_tokens:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {self.max_num_tokens} tokens for prompt and output, "
                f"but the prompt alone has {request.num_tokens}",
                limit=self.max_num_tokens,
                requested=request.num_tokens,
            )
        if len(self._requests) >= self._max_live:
            raise Overloaded(f"the engine is full: {self.num_running} requests run and {self.num_waiting} wait")
        self._requests[spec.id] = request
        insort(self._waiting, request, key=_order)
        if spec.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, spec.deadline_s)
        return request

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request at once, whatever it is doing; None when it has ended already. Its blocks are free for the next
        step (a step in flight may still write to them)."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, FinishReason.ABORT)

    def fail(self, request_id: str, error: HerdError) -> StepOutput | None:
        """End one request with an error; None when it has ended already."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, error=error)

    def expire(self, now_s: float) -> list[StepOutput]:
        """End the requests whose deadline has come, each with DeadlineExceeded."""
        if now_s < self._next_deadline_s:
            return []
        self._next_deadline_s = inf
        outputs = []
        for request in list(self._requests.values()):
            deadline_s = request.spec.deadline_s
            if deadline_s is None:
                continue
            if deadline_s <= now_s:
                message = f"the request's deadline passed after {request.num_output_tokens} tokens of output"
                outputs.append(self._end(request, error=DeadlineExceeded(message)))
            else:
                self._next_deadline_s = min(self._next_deadline_s, deadline_s)
        return outputs

    def schedule(self) -> StepPlan:
        """Plan the next step: one token for every running request that decodes, then pieces of the others in order,
        taking in waiting requests in order, until the token budget is used up."""
        assert self._in_flight is None, "the last step is still in flight"
        step = _Step(self._max_num_batched_tokens)
        prefilling = []
        for request in self._running:  # preemption takes from its end only
            if request.num_computed_tokens + 1 < len(request.token_ids):
                prefilling.append(request)
            elif self._make_room(request, 1, step):
                step.add(request, 1, samples=True)
        for request in prefilling:
            self._admit_waiting(step, before=request)
            if request.state is RequestState.RUNNING:
                self._plan_piece(request, step)
        self._admit_waiting(step)
        plan = step.plan()
        if plan.entries:
            self._in_flight = plan
        return plan

    def update(self, plan: StepPlan, draws: Sequence[tuple[int, TokenLogprob | None]]) -> list[StepOutput]:
        """Take a step's results: one drawn token for each entry of `plan.sampling`. Requests that ended meanwhile are
        passed over."""
        assert len(draws) == len(plan.sampling), f"{len(draws)} draws for {len(plan.sampling)} requests"
        self._land(plan)
        kv, running = self.kv, RequestState.RUNNING
        for request, num_tokens, _ in plan.entries:
            if request.state is running:
                request.num_computed_tokens += num_tokens
                kv.commit(request)
        outputs = []
        for (request, _, _), (token_id, logprob) in zip(plan.sampling, draws, strict=True):
            if request.state is not running:
                continue
            request.token_ids.append(token_id)
            reason = _finish_reason(request)
            if reason is not None:
                self._remove(request, reason)
            logprobs = () if logprob is None else (logprob,)
            outputs.append(StepOutput(request.id, (token_id,), logprobs, reason, request.num_cached_tokens))
        return outputs

    def abandon(self, plan: StepPlan) -> None:
        """Take note that a step came to nothing: its requests stand where they stood, and will compute it again."""
        self._land(plan)

    def fail_step(self, plan: StepPlan, error: HerdError) -> list[StepOutput]:
        """Take note that a step could not be computed: all its requests end with `error`."""
        self._land(plan)
        live = [entry.request for entry in plan.entries if entry.request.state is RequestState.RUNNING]
        return [self._end(request, error=error) for request in live]

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, states and blocks agree."""
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=_order), "a queue is out of order"
        assert all(request.state is RequestState.RUNNING for request in self._running)
        assert {*self._running, *self._waiting} == set(self._requests.values()), "a request is lost"
        assert len(self._running) + len(self._waiting) == len(self._requests), "a request is in two queues"
        self.kv.check_integrity()

    def _make_room(self, request: Request, num_tokens: int, step: _Step) -> bool:
        """Blocks for a running request's next tokens, at the expense of running requests after it. The last one has
        nobody to take from: it stalls, False, and keeps what it has until somebody before it needs that."""
        while not self.kv.grow(request, num_tokens):
            last = self._running[-1]
            if last is request:
                assert len(self._running) > 1, f"request {request.id} has outgrown the pool"
                return False
            self._preempt_last(step)
        return True

    def _plan_piece(self, request: Request, step: _Step) -> None:
        """Plan as much of a running request as budget and attention chunk allow in one piece."""
        start, chunk = request.num_computed_tokens, self.kv.layout.chunk
        missing = len(request.token_ids) - start
        num_tokens = min(missing, step.budget)
        if chunk is not None:
            num_tokens = min(num_tokens, chunk - start % chunk)
        if num_tokens and self._make_room(request, num_tokens, step):
            step.add(request, num_tokens, samples=num_tokens == missing)

    def _admit_waiting(self, step: _Step, before: Request | None = None) -> None:
        """Take in and plan waiting requests in order, until one does not fit; only those that come before `before`."""
        while self._waiting and step.budget:
            request = self._waiting[0]
            if before is not None and before.order <= request.order:
                return
            if not self._admit(request, step):
                return
            self._plan_piece(request, step)

    def _admit(self, request: Request, step: _Step) -> bool:
        """Let the first waiting request run if there is a seat, and pages for all its present tokens beside what others
        still need; else at the expense of running requests of strictly worse priority, if that would be enough."""
        running = self._running
        outranked = running[bisect_right(running, request.spec.priority, key=_priority) :]
        if len(running) - len(outranked) >= self._max_num_seqs:
            return False
        hit = self.kv.match(request)
        shortfall = self._shortfall(request, hit)
        if len(outranked) < len(running) and shortfall > sum(map(self.kv.pages_held, outranked)):
            return False
        while running and (len(running) >= self._max_num_seqs or shortfall > 0):
            if running[-1].spec.priority <= request.spec.priority:
                return False
            self._preempt_last(step)
            shortfall = self._shortfall(request, hit)
        del self._waiting[0]
        insort(running, request, key=_order)
        self.kv.attach(request, hit)
        request.num_computed_tokens = hit.num_tokens
        if request.state is RequestState.WAITING:
            request.num_cached_tokens = min(hit.num_tokens, request.num_prompt_tokens)
            self.counters.prefix_query_tokens += request.num_tokens
            self.counters.prefix_hit_tokens += hit.num_tokens
        request.advance(RequestState.RUNNING)
        return True

    def _shortfall(self, request: Request, hit: PrefixHit) -> int:
        """Pages lacking to admit `request` while others run: for all its present tokens, for those that running
        requests before it still have to compute, and a little for decoding. Less would mean thrashing: to let a
        request in, only to take its blocks away before it has caught up."""
        kv = self.kv
        reserved = self._watermark
        for other in self._running:
            if other.order > request.order:
                break
            if other.num_computed_tokens + 1 < len(other.token_ids):
                reserved += kv.pages_missing(other)
        return kv.pages_to_admit(request, hit) + reserved - kv.num_available

    def _preempt_last(self, step: _Step) -> None:
        """Send the last running request back to wait; its published blocks stay cached as long as pages last."""
        request = self._running.pop()
        step.drop(request)
        step.preempted.append(request)
        self.kv.free(request)
        request.num_computed_tokens = 0
        request.advance(RequestState.PREEMPTED)
        insort(self._waiting, request, key=_order)
        self.counters.preemptions += 1

    def _land(self, plan: StepPlan) -> None:
        """The step is over: blocks of requests that ended while it was in flight can go to others."""
        assert self._in_flight is (plan if plan.entries else None), "this plan is not in flight"
        self._in_flight = None
        for request in self._ended_in_flight:
            self.kv.free(request)
        self._ended_in_flight.clear()

    def _end(
        self, request: Request, reason: FinishReason | None = None, *, error: HerdError | None = None
    ) -> StepOutput:
        """End a live request without a further token."""
        self._remove(request, reason)
        return StepOutput(request.id, (), (), reason, request.num_cached_tokens, error)

    def _remove(self, request: Request, reason: FinishReason | None) -> None:
        del self._requests[request.id]
        queue = self._running if request.state is RequestState.RUNNING else self._waiting
        index = bisect_left(queue, request.order, key=_order)
        del queue[queue.index(request, index)]
        if request.state is RequestState.RUNNING:
            if self._in_flight is None:
                self.kv.free(request)
            else:
                self._ended_in_flight.append(request)
        request.finish_reason = reason
        request.advance(RequestState.FINISHED)


def _finish_reason(request: Request) -> FinishReason | None:
    """What the last token of the output means. Stop ids count once min_tokens tokens came before them."""
    if request.token_ids[-1] in request.stop_ids and request.num_output_tokens > request.spec.sampling.min_tokens:
        return FinishReason.STOP
    if len(request.token_ids) >= request.max_num_tokens:
        return FinishReason.LENGTH
    return None
