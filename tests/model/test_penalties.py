"""Penalties, logit_bias and suppression against a literal loop, and the counts that live between steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.model.penalties import LogitEdits, PenaltyState, SamplingRow, needs_history
from herd.model.sampling_params import SamplingParams

VOCAB = 40
EOS = {3}
FLOAT32_STEP = 2.0**-24


def row(prompt=(), output=(), state: Any = None, **fields: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 100, **fields}), 0, prompt, output, state)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def edited(x_SV: torch.Tensor, *rows: SamplingRow, suppressed=()) -> torch.Tensor:
    edits, x_SV = LogitEdits(VOCAB, EOS, suppressed), x_SV.clone()
    edits.apply_(x_SV, rows)
    return x_SV


def edited_reference(x_V: np.ndarray, r: SamplingRow, suppressed=()) -> np.ndarray:
    """Penalties, bias and suppression as literal loops, in float64."""
    x, p = x_V.astype(np.float64).copy(), r.params
    for token in set(r.prompt_ids) | set(r.output_ids):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(r.output_ids):
        x[token] -= p.presence_penalty
    for token in r.output_ids:
        x[token] -= p.frequency_penalty
    for token, bias in p.logit_bias:
        x[token] += bias
    for token in suppressed:
        x[token] = -np.inf
    if len(r.output_ids) < p.min_tokens:
        for token in EOS | set(p.stop_token_ids):
            x[token] = -np.inf
    return x


vocab_ids = st.integers(0, 39)
penalty_rows = st.fixed_dictionaries(
    {
        "prompt": st.lists(vocab_ids, max_size=30),
        "output": st.lists(vocab_ids, max_size=30),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
        "logit_bias": st.lists(st.tuples(vocab_ids, st.floats(-100, 100, width=32)), max_size=5).map(tuple),
        "min_tokens": st.sampled_from([0, 3]),
        "stop_token_ids": st.sampled_from([(), (5, 9)]),
    }
)


@given(st.lists(penalty_rows, min_size=1, max_size=6), st.integers(0, 1000), st.booleans())
@settings(deadline=None)
def test_edits_equal_a_literal_loop(fields, seed, with_state):
    rows = [row(state=PenaltyState() if with_state else None, **f) for f in fields]
    x_SV = logits(len(rows), seed)
    got_SV = edited(x_SV, *rows, suppressed=[8, 11])
    for r, x_V, got_V in zip(rows, x_SV.numpy(), got_SV.numpy(), strict=True):
        want_V = edited_reference(x_V, r, suppressed=[8, 11])
        # At most 9 operations in float32 on values below 700.
        np.testing.assert_allclose(got_V, want_V, rtol=0, atol=9 * 700 * FLOAT32_STEP)


@given(st.lists(vocab_ids, max_size=20), st.lists(st.lists(vocab_ids, max_size=90), min_size=1, max_size=6))
@settings(deadline=None)
def test_counts_stay_right_however_the_output_grows(prompt, pieces):
    state, x_V = PenaltyState(), logits(1)
    penalties: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    output: list[int] = []
    for piece in [*pieces, []]:
        output = output + piece
        kept = edited(x_V, row(prompt=prompt, output=output, state=state, **penalties))
        assert torch.equal(kept, edited(x_V, row(prompt=prompt, output=output, **penalties)))
    shorter = output[: len(output) // 2]
    kept = edited(x_V, row(prompt=prompt, output=shorter, state=state, **penalties))
    assert torch.equal(kept, edited(x_V, row(prompt=prompt, output=shorter, **penalties)))


def test_ids_that_the_vocabulary_lacks_have_no_effect():
    odd = row(prompt=[-1, 40, 7], logit_bias=((40, 5.0),), stop_token_ids=(99,), min_tokens=1, repetition_penalty=1.5)
    assert torch.equal(edited(logits(1), odd), edited(logits(1), row([7], min_tokens=1, repetition_penalty=1.5)))


def test_rows_that_need_no_edit_are_known():
    edits = LogitEdits(VOCAB, EOS, ())
    assert not edits.touch([row(), row(output=[1, 2], min_tokens=2, temperature=0.2)])
    for fields in ({"min_tokens": 1}, {"presence_penalty": 0.1}, {"logit_bias": ((1, 2.0),)}):
        assert edits.touch([row(), row(**fields)])
    assert LogitEdits(VOCAB, EOS, [1]).touch([row()])


def test_which_rows_need_history():
    assert not needs_history(row(logit_bias=((1, 1.0),), top_p=0.5, logprobs=3).params)
    for fields in (
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
    ):
        assert needs_history(row(**fields).params)
