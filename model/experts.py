"""`ExpertBackend`, the line between the model and wherever its experts live, and `LocalExperts`, the backend that holds
them in this process and is the oracle of every other one.

Shapes: N routed rows sorted by expert, D hidden, E experts. Knows nothing of routing, processes or transports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..kernels.grouped_mlp import ExpertGroup, ExpertWeights


class ExpertsUnavailable(Exception):
    """Some rows could not be computed because nothing hosts their experts. `rows`: which, counted in what the catcher
    handed in: routed rows from a backend, tokens from the decoder."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.message = message
        self.rows = tuple(rows)


class ExpertBackend(Protocol):
    """Runs the routed experts of a layer. `dispatch` starts, `collect` waits: whatever the caller computes in between
    overlaps with the experts where the backend can. Several dispatches may be under way at once."""

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Any:
        """Start expert e of `layer` on its counts_E[e] rows (scores are already applied). Returns a handle."""
        ...

    def collect(self, pending: Any) -> Tensor:
        """The experts' outputs [N, D], in the order of the rows given to `dispatch`. Raises ExpertsUnavailable, with at
        least one row."""
        ...

    def refresh(self) -> None:
        """Called now and then while there is nothing to compute."""
        ...

    def abandon(self) -> None:
        """Forget every dispatch that was not collected, if any: their results will not be asked for. Each forward pass
        ends with it, however it ends."""
        ...


class LocalExperts:
    """All experts in this process, computed on `collect`."""

    def __init__(self, experts: dict[int, list[ExpertWeights]]) -> None:
        self.experts = experts
        self._groups = {layer: ExpertGroup(of_layer) for layer, of_layer in experts.items()}

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> tuple[int, Tensor, Sequence[int]]:
        return layer, rows_ND, counts_E

    def collect(self, pending: tuple[int, Tensor, Sequence[int]]) -> Tensor:
        layer, rows_ND, counts_E = pending
        return self._groups[layer](rows_ND, counts_E)

    def refresh(self) -> None:
        pass

    def abandon(self) -> None:
        pass
