"""Recorded decoding steps give what steps computed anew give, bit for bit, whatever shape they are filled up to.
Without a GPU a recording is the function itself, run again over the tensors that it saw first, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from herd.cluster.decode_graphs import Replay, fill_up
from herd.cluster.host_batch import HostBatch, HostPages
from herd.kernels.paged_attention import SPAN

from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

CONFIG = tiny_config(hidden_size=64, max_position_embeddings=4096)


class Recorder:
    """Notes what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.recorded += 1
        result = run().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(run())

        return replay, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_steps_give_the_same_tokens(dtype: torch.dtype) -> None:
    decoder = tiny_decoder(CONFIG, dtype=dtype)
    recorder = Recorder()
    answers = []
    for record in (None, recorder):
        lab = EngineLab(decoder, record=record, max_num_seqs=13, max_queued=40, num_pages=2000)
        prompts = [random_ids(3 + 5 * n % 31, vocab_size=61, seed=n) for n in range(24)]
        ids = [lab.submit(p, max_tokens=5 + n, temperature=float(n % 2), seed=n) for n, p in enumerate(prompts)]
        lab.run()
        answers.append([lab.tokens(id_) for id_ in ids])
    assert answers[0] == answers[1]
    assert recorder.recorded < recorder.replayed


def test_few_shapes_serve_many_numbers_of_sequences() -> None:
    decoder = tiny_decoder(CONFIG)
    recorder = Recorder()
    lab = EngineLab(decoder, record=recorder, max_num_seqs=24, max_queued=40, num_pages=3000)
    for n in range(24):
        lab.submit(random_ids(4, vocab_size=61, seed=n), max_tokens=3 + n)
    lab.run()
    assert lab.graphs is not None
    assert len(lab.graphs) == recorder.recorded <= 6 * 2  # 1, 2, 4, 8, 16 and 24 sequences, two lengths of tables


def batch_of(lens: list[int]) -> HostBatch:
    count = len(lens)
    table = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
    return HostBatch(
        ids_T=np.arange(count),
        positions_T=np.array(lens) - 1,
        starts_S=np.arange(count + 1),
        lens_S={False: np.array(lens, np.int32)},
        pages={(False, 0): HostPages(np.arange(count), table)},
    )


@given(st.lists(st.integers(1, 5 * SPAN), min_size=1, max_size=40))
def test_filling_up_adds_nothing_that_is_read_or_written(lens: list[int]) -> None:
    host = batch_of(lens)
    filled = fill_up(host)
    count, size = len(lens), len(filled.ids_T)
    assert size >= count
    assert size - count < max(8, count)
    for mine, theirs in ((filled.ids_T, host.ids_T), (filled.lens_S[False], host.lens_S[False])):
        assert (mine[:count] == theirs).all()
    pages = filled.pages[False, 0]
    assert (pages.slots_T[count:] == -1).all()
    assert (filled.lens_S[False][count:] == 0).all()
    assert (pages.tables_SN[:count, :3] == host.pages[False, 0].tables_SN).all()
    assert (filled.starts_S == np.arange(size + 1)).all()
    spans_W2, first_S = filled.arrays(spans=True)[4:6]
    wanted = sum(-(-length // SPAN) for length in lens)
    assert (spans_W2[:wanted, 0] >= 0).all()
    assert (spans_W2[wanted:, 0] == -1).all()
    assert first_S[count] == first_S[-1] == wanted
    assert len(first_S) == size + 1
    assert filled.arrays(spans=True)[4].shape == fill_up(filled).arrays(spans=True)[4].shape
