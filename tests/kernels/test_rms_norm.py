from __future__ import annotations

import pytest
import torch

from herd.kernels.rms_norm import add_rms_norm_, add_rms_norm_ref_, rms_norm, rms_norm_ref

from .tolerances import assert_as_exact, noise

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, id="one number"),
    pytest.param(1, 5120, id="one row of Scout"),
    pytest.param(3, 7, id="narrower than a vector"),
    pytest.param(13, 65, id="tail of one"),
    pytest.param(64, 576, id="pocket"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_rms_norm(T: int, D: int, dtype: torch.dtype) -> None:
    x, weight = noise(T, D, dtype=dtype), noise(D, dtype=dtype, seed=1)
    before = x.clone()
    truth = rms_norm_ref(x.double(), weight.double(), EPS)
    assert_as_exact(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), truth)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_add_rms_norm(T: int, D: int, dtype: torch.dtype) -> None:
    x, delta, weight = noise(T, D, dtype=dtype), noise(T, D, dtype=dtype, seed=1), noise(D, dtype=dtype, seed=2)
    residual, residual_ref = x.clone(), x.clone()
    reference = add_rms_norm_ref_(residual_ref, delta, weight, EPS)
    out = add_rms_norm_(residual, delta, weight, EPS)
    assert torch.equal(residual, residual_ref), "the residual is the rounded sum"
    assert_as_exact(out, reference, rms_norm_ref(residual.double(), weight.double(), EPS))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15], ids=["zeros", "epsilon decides", "large"])
def test_extreme_magnitudes(scale: float) -> None:
    x, weight = noise(2, 33, scale=scale), noise(33, seed=1)
    assert_as_exact(
        rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), rms_norm_ref(x.double(), weight.double(), EPS)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_spoils_its_own_row_only(bad: float) -> None:
    x, weight = noise(3, 33), torch.ones(33)
    clean = rms_norm(x, weight, EPS)
    x[1, 4] = bad
    out = rms_norm(x, weight, EPS)
    assert out[1, 4].isnan()
    assert torch.equal(out[1].isnan(), rms_norm_ref(x, weight, EPS)[1].isnan())
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
