"""A small scheduler and clients for it: what the tests of single rules share."""

from __future__ import annotations

from herd.cluster.kv_layout import KvLayout
from herd.cluster.kv_manager import KvManager
from herd.cluster.request import EngineRequest, Request, StepOutput
from herd.cluster.scheduler import Scheduler, StepPlan
from herd.model.sampling_params import SamplingParams

EOS = 1
ANY = 7
"""A token that ends nothing."""


def make(*, num_pages=1000, caching=True, seqs=8, budget=16, queued=8, model_len=200, chunk: int | None = 12):
    """1 global and 3 local layers, blocks of 4 tokens: a block of both groups takes 1 + 3 pages."""
    layout = KvLayout.build(num_global_layers=1, num_local_layers=3, chunk=chunk, block_size=4, num_pages=num_pages)
    return Scheduler(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_queued=queued,
        max_model_len=model_len,
        kv=KvManager(layout, caching),
        eos_ids=frozenset({EOS}),
    )


class Clients:
    """Adds requests in order of arrival; prompts of different clients differ from the first token."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.arrivals = 0

    def add(self, name: str, prompt: int | list[int] = 4, *, max_tokens=50, **fields) -> Request:
        self.arrivals += 1
        sampling = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__dataclass_fields__}
        prompt_ids = [100 * self.arrivals + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        spec = EngineRequest(name, prompt_ids, SamplingParams(max_tokens=max_tokens, **sampling), **fields)
        return self.scheduler.add(spec, self.arrivals)


def shape(plan: StepPlan) -> list[tuple[str, int, bool]]:
    return [(entry.request.id, entry.num_tokens, entry.samples) for entry in plan.entries]


def finish(scheduler: Scheduler, plan: StepPlan, token: int = ANY) -> list[StepOutput]:
    outputs = scheduler.update(plan, [(token, None)] * len(plan.sampling))
    scheduler.check_integrity()
    return outputs


def step(scheduler: Scheduler, token: int = ANY) -> list[tuple[str, int, bool]]:
    plan = scheduler.schedule()
    finish(scheduler, plan, token)
    return shape(plan)
