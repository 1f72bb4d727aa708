from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from herd.cluster.request import TokenLogprob
from herd.cluster.runner import to_draw
from herd.model.decoder import Batch, Decoder
from herd.model.kv_cache import KvCache
from herd.model.sampling import Drawn

from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

CHUNK = 8


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def watch_batches(lab: EngineLab, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    batches: list[Batch] = []
    forward = decoder.forward

    def watched(batch: Batch, cache: KvCache) -> Tensor:
        check_batch(batch, lab)
        batches.append(batch)
        return forward(batch, cache)

    monkeypatch.setattr(decoder, "forward", watched)
    return batches


def check_batch(batch: Batch, lab: EngineLab) -> None:
    """What the decoder may rely on."""
    layout = lab.kv.layout
    positions = batch.positions_T.tolist()
    starts = next(iter(batch.pages.values())).keys.starts
    assert starts[0] == 0
    assert starts[-1] == len(positions) == len(batch.ids_T)
    assert set(batch.pages) == {(False, 0), (True, 0), (True, 1), (True, 2)}
    for lo, hi in pairwise(starts):
        piece = positions[lo:hi]
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert piece[0] // CHUNK == piece[-1] // CHUNK, "a piece crosses a chunk border"
    for (local, _), group in batch.pages.items():
        slots = group.slots_T.tolist()
        assert len(set(slots)) == len(slots), "two tokens in one slot"
        assert max(slots) < layout.num_pages * layout.block_size
        assert group.keys.lens_S.tolist() == group.keys.lens
        assert group.keys.starts_S.tolist() == group.keys.starts == starts
        for s, (lo, hi) in enumerate(pairwise(starts)):
            start = positions[lo] // CHUNK * CHUNK if local else 0
            assert group.keys.lens[s] == positions[hi - 1] + 1 - start
            for row in range(lo, hi):
                block, offset = divmod(positions[row] - start, layout.block_size)
                page = group.keys.tables_SN[s, block].item()
                assert slots[row] == page * layout.block_size + offset, "keys are read where they were written"
    tables = [lab.kv.tables(id_) for id_ in lab.kv._held]
    held = {page for table in tables for page in (*table.global_pages, *table.local_pages)}
    for group in batch.pages.values():
        assert {slot // layout.block_size for slot in group.slots_T.tolist()} <= held


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_batches_of_a_busy_engine(decoder: Decoder, prefix_caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding, prefix hits and preemption side by side, in a pool that is too small for all."""
    lab = EngineLab(decoder, num_pages=34, budget=11, max_num_seqs=4, prefix_caching=prefix_caching)
    batches = watch_batches(lab, decoder, monkeypatch)
    shared = random_ids(13, vocab_size=61, seed=0)
    prompts = [shared + random_ids(n, vocab_size=61, seed=n) for n in (1, 5, 9, 2, 20, 3)]
    ids = [lab.submit(prompt, max_tokens=25) for prompt in prompts]
    lab.run()
    assert lab.engine.stats().preemptions > 0
    assert {len(lab.tokens(id_)) for id_ in ids} == {25}
    assert max(len(batch.pages[False, 0].keys.lens) for batch in batches) > 2
    assert len(lab.runner._tables._free_rows) == 4


def test_logits_are_computed_for_sampling_rows_only(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that does not end its prompt draws nothing."""
    lab = EngineLab(decoder, budget=5, max_num_seqs=2)
    drawn: list[int] = []
    sample = lab.runner._sampler.sample

    def counted(logits_SV: Tensor, rows: list) -> list[Drawn]:
        drawn.append(len(logits_SV))
        return sample(logits_SV, rows)

    monkeypatch.setattr(lab.runner._sampler, "sample", counted)
    id_ = lab.submit(random_ids(12, vocab_size=61, seed=0), max_tokens=3)
    lab.run()
    assert drawn == [1, 1, 1]
    assert len(lab.tokens(id_)) == 3
    assert lab.engine.stats().steps > len(drawn)


def test_history_is_kept_for_penalised_requests_and_dropped_at_their_end(decoder: Decoder) -> None:
    """A preempted request is penalised for what it generated before."""
    prompt = random_ids(16, vocab_size=61, seed=0)
    settings = {"max_tokens": 44, "frequency_penalty": 2.0, "repetition_penalty": 1.3}
    alone = EngineLab(decoder).generate(prompt, **settings)
    assert len(set(alone)) > len(set(EngineLab(decoder).generate(prompt, max_tokens=44)))
    layout = EngineLab(decoder).kv.layout
    lab = EngineLab(decoder, num_pages=layout.pages_for(60) + 12, max_num_seqs=3, prefix_caching=False)
    ids = [lab.submit(prompt, **settings) for _ in range(3)]
    lab.run()
    assert lab.engine.stats().preemptions > 0
    assert [lab.tokens(id_) for id_ in ids] == [alone] * 3
    assert lab.runner._penalties == {}


def test_logprobs_reach_the_output(decoder: Decoder) -> None:
    lab = EngineLab(decoder)
    id_ = lab.submit([3, 4, 5], max_tokens=4, logprobs=3)
    plain = lab.submit([3, 4, 5], max_tokens=4)
    lab.run()
    assert lab.tokens(id_) == lab.tokens(plain)
    assert not any(output.logprobs for output in lab.outputs[plain])
    rows = dict(lab.logits[id_])
    for step, output in enumerate(lab.outputs[id_]):
        (entry,) = output.logprobs
        expected = rows[2 + step].double().log_softmax(-1)
        assert entry.logprob == pytest.approx(expected[output.token_ids[0]].item(), abs=1e-5)
        top = expected.topk(3)
        assert entry.top_ids == tuple(top.indices.tolist())
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


def test_to_draw() -> None:
    assert to_draw(Drawn(7)) == (7, None)
    assert to_draw(Drawn(7, -0.5, (7, 2), (-0.5, -2.0))) == (7, TokenLogprob(-0.5, (7, 2), (-0.5, -2.0)))
    assert to_draw(Drawn(7, -0.5)) == (7, TokenLogprob(-0.5, (), ()))


def test_a_bfloat16_model_runs(decoder: Decoder) -> None:
    lab = EngineLab(tiny_decoder(tiny_config(), dtype=torch.bfloat16))
    tokens = lab.generate(random_ids(20, vocab_size=61, seed=0), max_tokens=20)
    assert len(tokens) == 20
