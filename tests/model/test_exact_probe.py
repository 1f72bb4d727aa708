from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.linear import Linear
from herd.model.exact_probe import (
    NumericsError,
    expert_check,
    linear_check,
    probe_attention,
    probe_decoder,
    probe_operations,
)
from herd.model.numerics import numeric_class

from ..tiny_models import tiny_config, tiny_decoder

CPU = torch.device("cpu")


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def test_a_decoder_passes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        decoder = tiny_decoder(tiny_config(moe_layers=frozenset({1, 3})), dtype=dtype)
        probe_decoder(decoder, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_shapes_pass(dtype: torch.dtype) -> None:
    linear = Linear(noise(2048, 2048, dtype=dtype))
    expert = ExpertWeights(Linear(noise(1024, 2048, dtype=dtype)), Linear(noise(2048, 512, dtype=dtype)))
    probe_operations([linear_check("big", linear), expert_check("big", expert)], dtype, CPU)
    probe_attention(10, 2, 128, 16, 300, dtype, CPU)


def test_plain_products_are_refused_by_name_and_shape() -> None:
    weight = noise(2048, 2048)

    class Plain(Linear):
        def __call__(self, x_TI: Tensor) -> Tensor:
            return functional.linear(x_TI, weight)

    plain = Plain(weight)
    with pytest.raises(NumericsError, match=r"attention's input: linear 2048 -> 2048 in float32: rows 0 to"):
        probe_operations([linear_check("attention's input", plain)], torch.float32, CPU)


def test_what_threads_change_is_refused() -> None:
    def by_threads(x: Tensor) -> Tensor:
        return x + torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(NumericsError, match="odd: one thread computes other bits than 2"):
            probe_operations([("odd", by_threads, 8)], torch.float32, CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_each_shape_is_tried_once() -> None:
    calls = []

    def count(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return x

    probe_operations([("same", count, 8), ("same", count, 8)], torch.float32, CPU)
    once = len(calls)
    probe_operations([("same", count, 8), ("other", count, 8)], torch.float32, CPU)
    assert len(calls) == 3 * once


def test_attention_that_depends_on_the_piece_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_piece(q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: Any, scale: float) -> Tensor:
        return q_THd * len(keys.lens)

    monkeypatch.setattr("herd.model.exact_probe.paged_attention", by_piece)
    with pytest.raises(NumericsError, match="attention: 4 and 2 heads of 16, pages of 4, 41 keys"):
        probe_attention(4, 2, 16, 4, 41, torch.float32, CPU)


def test_the_class_names_what_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(dtype: torch.dtype = torch.bfloat16, weights: str = "none") -> str:
        return numeric_class(CPU, dtype, weights)

    assert name() == name()
    assert name(torch.float32) != name()
    assert name(weights="int4") != name()
    place = name().split("/")[0]
    monkeypatch.setattr("herd.model.numerics.host_has_dots", lambda: False)
    assert name().split("/")[0] != place or place != "cpu-avx512bf16"
