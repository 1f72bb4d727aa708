"""The experts of one layer as they run on a GPU, beside the CPU's: same choice of experts, same sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.linear import Linear
from herd.kernels.route import combine_, gather_scaled, route
from herd.kernels.triton_linear import TritonLinear
from herd.model.device_experts import DeviceExperts
from herd.model.experts import LocalExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E, D, F = 3, 64, 96


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights() -> list[tuple[Tensor, Tensor]]:
    return [(noise(2 * F, D, seed=e) / 8, noise(D, F, seed=9 + e) / 8) for e in range(E)]


def on_gpu(weights: list[tuple[Tensor, Tensor]]) -> DeviceExperts:
    experts: list[Any] = []
    for gate_up, down in weights:
        packed = SimpleNamespace(gate_up=TritonLinear(gate_up.to(DEVICE)), down=TritonLinear(down.to(DEVICE)))
        experts.append(SimpleNamespace(on_gpu=packed))
    return DeviceExperts({1: experts})


@pytest.mark.parametrize("k", [1, 2])
def test_feed_forward_is_routing_experts_and_sum(weights: list[tuple[Tensor, Tensor]], k: int) -> None:
    x_TD, logits_TE, shared_TD = noise(7, D, seed=20), noise(7, E, seed=21), noise(7, D, seed=22)
    here = LocalExperts({1: [ExpertWeights(Linear(gate_up), Linear(down)) for gate_up, down in weights]})
    plan = route(logits_TE, k)
    rows_ND = here.collect(here.dispatch(1, gather_scaled(x_TD, plan), plan.counts_E))
    expected_TD = combine_(shared_TD.clone(), rows_ND, plan)
    there = on_gpu(weights)
    moved = (tensor.to(DEVICE) for tensor in (x_TD, logits_TE, shared_TD))
    x, logits, shared = moved
    result_TD = there.feed_forward(1, x, logits, k, shared)
    torch.testing.assert_close(result_TD.cpu(), expected_TD, rtol=1e-5, atol=1e-5)
    again_ND = there.collect(there.dispatch(1, gather_scaled(x_TD, plan).to(DEVICE), plan.counts_E))
    torch.testing.assert_close(again_ND.cpu(), rows_ND, rtol=1e-5, atol=1e-5)
