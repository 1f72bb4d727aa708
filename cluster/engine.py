"""The engine: a loop of schedule, run, update over one model on one device, in one thread. Takes requests and aborts
from other threads, hands out what each step produced. Knows nothing of text, HTTP or Ray."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..model.experts import ExpertsUnavailable
from ..model.sampling import SamplingError
from ..model.sampling_params import SamplingParams
from .errors import EngineFault, ExpertUnavailable, HerdError
from .request import EngineRequest, StepOutput
from .runner import ModelRunner, to_draw
from .scheduler import Scheduler, SchedulerCounters, StepPlan

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
"""Between two looks around of an engine without work."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_used: int
    steps: int
    failed_steps: int
    """Steps whose requests all ended with EngineFault."""
    abandoned_steps: int
    """Steps that lacked an expert: some of their requests ended with ExpertUnavailable, the others repeat them."""
    split_steps: int
    """Steps computed as two halves, one's attention beside the other's experts."""
    generated_tokens: int
    computed_tokens: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    step_seconds: float
    """Time spent in steps so far."""


class Engine:
    """One scheduler and one model runner. `step` does everything; `start` runs it in a thread of its own."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        on_outputs: Callable[[list[StepOutput]], None],
        on_fault: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._on_outputs = on_outputs
        self._on_fault = on_fault
        self._clock = clock
        self._commands: deque[Callable[[], StepOutput | None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._arrivals = 0
        self._steps = self._failed_steps = self._abandoned_steps = self._generated = self._computed = 0
        self._step_seconds = 0.0
        self.fault: BaseException | None = None
        """What ended the thread, if something did: the engine is then of no further use."""

    def submit(self, spec: EngineRequest) -> None:
        """Queue a request, from any thread. A refusal comes back as an output with an error, like any other end."""
        self._enqueue(lambda: self._add(spec))

    def abort(self, request_id: str) -> None:
        """End a request, from any thread. Its last output says so, unless it has ended before."""
        self._enqueue(lambda: self.scheduler.abort(request_id))

    def start(self) -> None:
        """Run steps in a thread whenever there is work."""
        self._thread = threading.Thread(target=self._loop, name="herd-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Leave the loop after the step in hand."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def step(self) -> bool:
        """Take commands, compute one step, hand out its outputs. False when there was nothing to compute."""
        outputs = self._take_commands()
        outputs += self.scheduler.expire(self._clock())
        plan = self.scheduler.schedule()
        if plan.entries:
            outputs += self._execute(plan)
        if outputs:
            for output in outputs:
                if output.is_last:
                    self._runner.forget(output.request_id)
            self._on_outputs(outputs)
        return bool(plan.entries)

    def warm_up(self, prompt_ids: Sequence[int]) -> None:
        """Compute a throw-away request before `start`, so that no client waits for kernels to be compiled."""
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.scheduler.add(EngineRequest("warm-up", prompt_ids, params, cache_salt="warm-up"), 0)
        while (plan := self.scheduler.schedule()).entries:
            self.scheduler.update(plan, self._runner.run(plan))
        self._runner.forget("warm-up")
        self.scheduler.counters = SchedulerCounters()

    def stats(self) -> EngineStats:
        """Counters and gauges; safe from any thread, exact between steps."""
        scheduler = self.scheduler
        usage, counters = scheduler.kv.usage, scheduler.counters
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=usage.total,
            pages_free=usage.free,
            pages_cached=usage.cached,
            pages_used=usage.used,
            steps=self._steps,
            failed_steps=self._failed_steps,
            abandoned_steps=self._abandoned_steps,
            split_steps=self._runner.split_steps,
            generated_tokens=self._generated,
            computed_tokens=self._computed,
            preemptions=counters.preemptions,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            step_seconds=self._step_seconds,
        )

    def _execute(self, plan: StepPlan) -> list[StepOutput]:
        started = self._clock()
        outputs: list[StepOutput] = []
        num_failed = 0
        try:
            draws = self._runner.run(plan)
        except SamplingError as error:
            draws = [(0, None) if drawn is None else to_draw(drawn) for drawn in error.drawn]
            fault = EngineFault("the model produced no finite logits for this request")
            failed = [self.scheduler.fail(plan.sampling[row].request.id, fault) for row in error.rows]
            outputs += [output for output in failed if output is not None]
            num_failed = len(error.rows)
        except ExpertsUnavailable as error:
            return self._abandon(plan, error)
        except Exception as error:  # the edge of the loop: a step's defect must not end the others
            self._failed_steps += 1
            logger.exception("a step failed")
            return self.scheduler.fail_step(plan, EngineFault(f"a step of the model failed: {error}"))
        outputs += self.scheduler.update(plan, draws)
        self._steps += 1
        self._computed += plan.total_tokens
        self._generated += len(draws) - num_failed
        self._step_seconds += self._clock() - started
        return outputs

    def _abandon(self, plan: StepPlan, error: ExpertsUnavailable) -> list[StepOutput]:
        """End the requests that lack an expert; the others lose no more than a step's time."""
        self._abandoned_steps += 1
        ends = list(accumulate(entry.num_tokens for entry in plan.entries))
        hit = sorted({bisect_right(ends, row) for row in error.rows})
        unavailable = ExpertUnavailable(error.message)
        outputs = [self.scheduler.fail(plan.entries[index].request.id, unavailable) for index in hit]
        self.scheduler.abandon(plan)
        return [output for output in outputs if output is not None]

    def _take_commands(self) -> list[StepOutput]:
        outputs = []
        while self._commands:
            output = self._commands.popleft()()
            if output is not None:
                outputs.append(output)
        return outputs

    def _add(self, spec: EngineRequest) -> StepOutput | None:
        self._arrivals += 1
        try:
            request = self.scheduler.add(spec, self._arrivals)
        except HerdError as error:
            return StepOutput(spec.id, (), error=error)
        return StepOutput(spec.id, (), finish_reason=request.finish_reason) if request.finish_reason else None

    def _enqueue(self, command: Callable[[], StepOutput | None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if self.step() or self._commands or self._stopping:
                    continue
                if not self._wake.wait(timeout=0.1 if self.scheduler.has_work else _IDLE_S):
                    self._runner.refresh()
        except BaseException as error:
            self.fault = error
            logger.critical("the engine loop ended", exc_info=True)
            self._on_fault(error)
            raise
