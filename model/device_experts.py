"""The expert backend of a model whose experts are all on the GPU that computes the rest: nothing about a step comes
back to the host between its layers, and a step may be recorded as a CUDA graph. Knows nothing of processes.

Shapes: T tokens, N routed rows sorted by expert, D hidden, E experts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.grouped_mlp import ExpertWeights


class DeviceExperts:
    """`feed_forward` is what the decoder calls; the rest is an `ExpertBackend`, for whoever has rows already."""

    def __init__(self, experts: Mapping[int, Sequence[ExpertWeights]], exact: bool = True) -> None:
        """`experts`: by layer, each laid out on the same GPU."""
        table = importlib.import_module("..kernels.expert_table", __package__).ExpertTable
        self._kernels = importlib.import_module("..kernels.triton_experts", __package__)
        self._routing = importlib.import_module("..kernels.triton_route", __package__)
        self._exact = exact
        self.experts = dict(experts)
        self._tables: dict[int, Any] = {}
        for layer, of_layer in experts.items():
            on_gpu = [expert.on_gpu for expert in of_layer]
            assert on_gpu[0] is not None, "experts are not on a GPU"
            self._tables[layer] = table(on_gpu, on_gpu[0].gate_up.packed.values.device)

    def feed_forward(self, layer: int, x_TD: Tensor, logits_TE: Tensor, k: int, shared_TD: Tensor) -> Tensor:
        """shared + the k experts of each token with the largest router logits, in ascending id; [T, D]."""
        route = self._routing.route_device(logits_TE, k)
        return self._kernels.moe_mlp(x_TD, route, self._tables[layer], shared_TD, self._exact)

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Tensor:
        counts = torch.tensor(list(counts_E), dtype=torch.int32, device=rows_ND.device)
        return self._kernels.grouped_mlp_triton(rows_ND, counts, self._tables[layer], self._exact)

    def collect(self, pending: Tensor) -> Tensor:
        return pending

    def refresh(self) -> None:
        pass

    def abandon(self) -> None:
        pass
