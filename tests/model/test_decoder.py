"""The decoder alone, over one sequence."""

from __future__ import annotations

import torch

from ..tiny_models import sequence_logits, tiny_config, tiny_decoder


def test_x():
    d = tiny_decoder(tiny_config())
    a = sequence_logits(d, list(range(3, 43)), 64)
    b = sequence_logits(d, list(range(3, 43)), 3, 20)
    assert (a - b).abs().max() < 1e-5, (a - b).abs().max()
