"""Turns a step plan into tensors, runs the model and draws tokens. The only part of the engine that touches torch;
knows requests and page tables, but neither why they were scheduled nor who waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import PagedKeys
from ..model.decoder import Batch, Decoder, GroupPages
from ..model.kv_cache import KvCache
from ..model.penalties import PenaltyState, SamplingRow, needs_history
from ..model.sampling import Drawn, Sampler
from .kv_manager import KvManager
from .overlap import OverlapTuner
from .page_tables import PageTables
from .request import Request, TokenLogprob
from .scheduler import PlannedRequest, StepPlan

Draw = tuple[int, TokenLogprob | None]


class ModelRunner:
    """Executes step plans on one device."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        sampler: Sampler,
        kv: KvManager,
        max_num_seqs: int,
        overlap: OverlapTuner | None = None,
    ) -> None:
        """`overlap` may split steps in halves; None never does, which is right for experts that compute here."""
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._kv = kv
        self._device = decoder.device
        self._tables = PageTables(kv.layout, max_num_seqs)
        self._penalties: dict[str, PenaltyState] = {}
        self._overlap = overlap or OverlapTuner("off")
        self.split_steps = 0
        """Steps that were computed as two halves."""

    def run(self, plan: StepPlan) -> list[Draw]:
        """Compute a non-empty plan; one draw for each entry of `plan.sampling`. Raises SamplingError for rows without
        a finite logit (it carries what the others drew), and ExpertsUnavailable for tokens without an expert, counted
        through the plan; nothing is drawn then."""
        for request in plan.preempted:
            self._tables.forget(request.id)
        hidden_TD = self._forward(plan.entries)
        if not plan.sampling:
            return []
        hidden_SD = hidden_TD
        if len(plan.sampling) < hidden_TD.shape[0]:
            ends = np.cumsum([entry.num_tokens for entry in plan.entries]) - 1
            last_S = [end for end, entry in zip(ends.tolist(), plan.entries, strict=True) if entry.samples]
            hidden_SD = hidden_TD[torch.tensor(last_S, device=self._device)]
        logits_SV = self._decoder.logits(hidden_SD)
        rows = [self._sampling_row(entry.request) for entry in plan.sampling]
        return [to_draw(drawn) for drawn in self._sampler.sample(logits_SV, rows)]

    def refresh(self) -> None:
        """Let what lies behind the model keep up with the world while there is nothing to compute."""
        self._decoder.experts.refresh()

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that has ended."""
        self._tables.forget(request_id)
        self._penalties.pop(request_id, None)

    def _forward(self, entries: Sequence[PlannedRequest]) -> Tensor:
        with self._overlap.step([entry.num_tokens for entry in entries]) as cut:
            if not cut:
                return self._decoder.forward(self._batch(entries), self._cache)
            self.split_steps += 1
            halves = [self._batch(entries[:cut]), self._batch(entries[cut:])]
            return torch.cat(self._decoder.forward_interleaved(halves, self._cache))

    def _batch(self, entries: Sequence[PlannedRequest]) -> Batch:
        layout = self._kv.layout
        requests = [entry.request for entry in entries]
        tables = [self._kv.tables(request.id) for request in requests]
        rows_S = np.array([self._tables.sync(r.id, t) for r, t in zip(requests, tables, strict=True)], np.int64)
        counts_S = np.array([entry.num_tokens for entry in entries], np.int64)
        firsts_S = np.array([request.num_computed_tokens for request in requests], np.int64)
        q_starts = np.concatenate(([0], np.cumsum(counts_S)))
        sequence_T = np.repeat(np.arange(len(entries)), counts_S)
        positions_T = np.arange(len(sequence_T)) - q_starts[sequence_T] + firsts_S[sequence_T]
        ids: list[int] = []
        for request, num_tokens, _ in entries:
            first = request.num_computed_tokens
            ids += request.token_ids[first : first + num_tokens]
        starts_S = {False: np.zeros_like(firsts_S), True: np.array([t.local_start for t in tables], np.int64)}
        pages = {}
        for kind in self._tables.kinds:
            start_S = starts_S[kind[0]]
            block_T = (positions_T - start_S[sequence_T]) // layout.block_size
            page_T = self._tables.pages(kind, rows_S[sequence_T], block_T).astype(np.int64)
            lens_S = firsts_S + counts_S - start_S
            blocks = -(-int(lens_S.max()) // layout.block_size)
            pages[kind] = GroupPages(
                slots_T=self._tensor(page_T * layout.block_size + positions_T % layout.block_size),
                keys=PagedKeys(
                    self._tensor(self._tables.tables(kind, rows_S, blocks)),
                    self._tensor(lens_S.astype(np.int32)),
                    lens_S.tolist(),
                ),
            )
        ids_T = torch.tensor(ids, device=self._device)
        return Batch(ids_T, self._tensor(positions_T), q_starts.tolist(), pages)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _sampling_row(self, request: Request) -> SamplingRow:
        params = request.spec.sampling
        if not needs_history(params):
            return SamplingRow(params, request.num_tokens)
        state = self._penalties.setdefault(request.id, PenaltyState())
        split = request.num_prompt_tokens
        return SamplingRow(params, request.num_tokens, request.token_ids[:split], request.token_ids[split:], state)


def to_draw(drawn: Drawn) -> Draw:
    """A sampler's token as the scheduler takes it."""
    if drawn.logprob is None:
        return drawn.token_id, None
    return drawn.token_id, TokenLogprob(drawn.logprob, drawn.top_ids, drawn.top_logprobs)
