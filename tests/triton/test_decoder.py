"""A whole tiny decoder whose attention and norms are the Triton kernels, beside the same decoder on the CPU's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels.attention_inputs import attention_inputs_ref
from herd.kernels.paged_attention import paged_attention_ref
from herd.kernels.rms_norm import add_rms_norm_ref_, rms_norm_ref
from herd.kernels.triton_attention import triton_attention
from herd.kernels.triton_attention_inputs import triton_attention_inputs
from herd.kernels.triton_norm import triton_add_rms_norm_, triton_rms_norm
from herd.model import decoder as decoder_module

from ..tiny_models import random_ids, sequence_logits, tiny_config, tiny_decoder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny decoder lives on the CPU")
OPS = ("rms_norm", "add_rms_norm_", "attention_inputs", "paged_attention")
REFERENCE = (rms_norm_ref, add_rms_norm_ref_, attention_inputs_ref, paged_attention_ref)
TRITON = (triton_rms_norm, triton_add_rms_norm_, triton_attention_inputs, triton_attention)


def logits_with(ops: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, piece: int, num_prefill: int) -> Tensor:
    """Of one sequence of 21 tokens, over three chunks of 8."""
    with monkeypatch.context() as patch:
        for name, op in zip(OPS, ops, strict=True):
            patch.setattr(decoder_module, name, op)
        ids = random_ids(21, vocab_size=61, seed=3)
        return sequence_logits(tiny_decoder(tiny_config()), ids, piece, num_prefill)


def test_a_decoder_on_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is as near to the CPU's kernels as the plain references are, which differ by rounding only; and its bits do not
    depend on how the sequence was cut."""
    ours = logits_with(TRITON, monkeypatch, 8, 21)
    plain = logits_with(REFERENCE, monkeypatch, 8, 21)
    own = sequence_logits(tiny_decoder(tiny_config()), random_ids(21, vocab_size=61, seed=3), 8, 21)
    rounding = (plain - own).abs().max().item()
    assert 0 < rounding < 1e-4
    assert (ours - own).abs().max().item() < 3 * max(rounding, torch.finfo(torch.float32).eps * own.abs().max().item())
    assert torch.equal(logits_with(TRITON, monkeypatch, 3, 14), ours)
