"""The Triton kernels of RMSNorm: on the GPU, or interpreted on the CPU where there is none."""

from __future__ import annotations

import pytest
import torch

from herd.kernels.rms_norm import add_rms_norm_ref_, rms_norm_ref
from herd.kernels.triton_norm import triton_add_rms_norm_, triton_rms_norm

from ..kernels.test_rms_norm import DTYPES, EPS, SHAPES
from ..kernels.tolerances import assert_as_exact, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = pytest.param(4096, 14336, marks=pytest.mark.gpu, id="Behemoth's prefill")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [*SHAPES, WIDE])
def test_rms_norm(T: int, D: int, dtype: torch.dtype) -> None:
    x, weight = noise(T, D, dtype=dtype).to(DEVICE), noise(D, dtype=dtype, seed=1).to(DEVICE)
    before = x.clone()
    truth = rms_norm_ref(x.double(), weight.double(), EPS)
    out, reference = triton_rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS)
    assert_as_exact(out, reference, truth)
    assert torch.equal(x, before)
    if dtype is torch.bfloat16:
        assert (out != reference).float().mean() < 0.02, "rounded before it is multiplied by the weight"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [*SHAPES, WIDE])
def test_add_rms_norm(T: int, D: int, dtype: torch.dtype) -> None:
    x, delta, weight = (
        noise(*shape, dtype=dtype, seed=seed).to(DEVICE) for seed, shape in enumerate([(T, D), (T, D), (D,)])
    )
    residual, residual_ref = x.clone(), x.clone()
    reference = add_rms_norm_ref_(residual_ref, delta, weight, EPS)
    out = triton_add_rms_norm_(residual, delta, weight, EPS)
    assert torch.equal(residual, residual_ref), "the residual is the rounded sum"
    assert_as_exact(out, reference, rms_norm_ref(residual.double(), weight.double(), EPS))


@pytest.mark.parametrize("D", [65, 576])
def test_a_row_is_the_same_alone_and_in_company(D: int) -> None:
    x, weight = noise(5, D).to(DEVICE), noise(D, seed=1).to(DEVICE)
    together = triton_rms_norm(x, weight, EPS)
    for t in range(5):
        assert torch.equal(triton_rms_norm(x[t : t + 1].contiguous(), weight, EPS)[0], together[t])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_spoils_its_own_row_only(bad: float) -> None:
    x, weight = noise(3, 33).to(DEVICE), torch.ones(33).to(DEVICE)
    clean = triton_rms_norm(x, weight, EPS)
    x[1, 4] = bad
    out = triton_rms_norm(x, weight, EPS)
    assert torch.equal(out[1].isnan(), rms_norm_ref(x, weight, EPS)[1].isnan())
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
