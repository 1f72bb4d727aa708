"""How far an op may be from the truth, which is its reference run in float64 on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact(out: Tensor, reference: Tensor, truth: Tensor, factor: float = 3.0) -> None:
    """The op errs at most `factor` times as much as the reference does in the op's own dtype, counting for the latter
    at least one rounding of the largest value."""
    assert out.dtype == reference.dtype
    assert out.shape == truth.shape
    assert torch.equal(out.isnan(), truth.isnan())
    truth = truth.nan_to_num()
    rounding = torch.finfo(out.dtype).eps / 2 * truth.abs().max().item()
    allowed = factor * max(largest(reference.double().nan_to_num() - truth), rounding)
    assert largest(out.double().nan_to_num() - truth) <= allowed


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Seeded normal values, rounded to `dtype`."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
