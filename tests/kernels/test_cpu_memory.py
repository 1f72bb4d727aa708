# pyright: reportCallIssue=false
from __future__ import annotations

import numpy as np
import pytest
import torch

from herd.kernels.cpu_memory import (
    bf16_to_f32,
    dtype_tag,
    elements,
    exp_f32,
    f32_array,
    f32_to_bf16,
    fetch_add,
    i32_array,
    i64_array,
    load,
    stack,
    store,
)

from .compiled import compiled


@compiled
def exp_each(values, out):
    for i in range(values.shape[0]):
        out[i] = exp_f32(values[i])


@compiled
def exp_one_by_one(values, out):
    i = 0
    while i < values.shape[0]:
        out[i] = exp_f32(values[i])
        i += 1 + np.int64(out[i] < np.float32(0.0))


@compiled
def round_each(values, out):
    for i in range(values.shape[0]):
        out[i] = f32_to_bf16(values[i])


@compiled
def widen_each(values, out):
    for i in range(values.shape[0]):
        out[i] = bf16_to_f32(values[i])


@compiled
def copy_through_float32(source, target, count, tag):
    x, y = elements(source, count, tag), elements(target, count, tag)
    for i in range(count):
        store(y, i, load(x, i))


@compiled
def sum_of_integers(address32, address64, count):
    total = np.int64(0)
    for i in range(count):
        total += i32_array(address32, count)[i] * i64_array(address64, count)[i]
    return total


@compiled
def double_floats(address, count):
    x = f32_array(address, count)
    for i in range(count):
        x[i] *= np.float32(2.0)


def exp_of(values: np.ndarray, loop=exp_each) -> np.ndarray:
    out = np.empty_like(values)
    loop(values, out)
    return out


@pytest.mark.parametrize("loop", [exp_each, exp_one_by_one], ids=["vectorised", "scalar"])
def test_exp_is_within_a_few_units_in_the_last_place(loop) -> None:
    """Over the whole range in which the result is a normal float32, ends included; closest for the small arguments
    that decide a softmax."""
    x = np.concatenate(
        [np.linspace(-87.3, 88.0, 400_001), np.linspace(-1, 1, 100_001), np.array([0.0, -0.0, 1e-30, 1e-40])]
    ).astype(np.float32)
    true = np.exp(x.astype(np.float64))
    error = np.abs(exp_of(x, loop) - true) / np.spacing(true.astype(np.float32))
    assert error.max() <= 5.0, x[error.argmax()]
    assert error[np.abs(x) < 5].max() <= 2.6
    assert exp_of(np.zeros(1, np.float32))[0] == 1.0


@pytest.mark.parametrize("loop", [exp_each, exp_one_by_one], ids=["vectorised", "scalar"])
def test_exp_limits(loop) -> None:
    x = np.array([-np.inf, -1e30, -104.0, -87.4, 88.1, 1e30, np.inf], np.float32)
    assert exp_of(x, loop).tolist() == [0.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.inf]
    assert np.isnan(exp_of(np.full(5, np.nan, np.float32), loop)).all()


def test_rounding_to_bfloat16_is_torchs_for_any_bits() -> None:
    rng = np.random.default_rng(0)
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000, 1])
    bits = np.concatenate([rng.integers(0, 2**32, 1_000_000), halves]).astype(np.uint32)
    values = bits.view(np.float32)
    ours = np.empty(len(values), np.uint16)
    round_each(values, ours)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert nan.sum() > 1000
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert torch.from_numpy(ours[nan].view(np.int16)).view(torch.bfloat16).isnan().all()


def test_widening_every_bfloat16() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    ours = np.empty(len(bits), np.float32)
    widen_each(bits, ours)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_read_and_written_in_the_tensors_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(37).to(dtype)
    y = torch.zeros(37, dtype=dtype)
    copy_through_float32(x.data_ptr(), y.data_ptr(), 37, dtype_tag(x))
    assert torch.equal(x, y)


def test_typed_arrays_over_addresses() -> None:
    a, b = torch.arange(7, dtype=torch.int32) - 3, torch.arange(7, dtype=torch.int64) * 10**10
    assert sum_of_integers(a.data_ptr(), b.data_ptr(), 7) == (a * b).sum().item()
    x = torch.arange(5.0)
    double_floats(x.data_ptr(), 5)
    assert x.tolist() == [0, 2, 4, 6, 8]


@compiled
def count_on_the_stack(turns):
    first, second = stack(8), stack(100)
    i64_array(first, 1)[0] = 5
    i64_array(second, 12)[:] = 0
    total = 0
    for _ in range(turns):
        total += fetch_add(first, 2)
    return total, i64_array(first, 1)[0], first % 64, second % 64, i64_array(second, 12).sum()


def test_memory_on_the_stack_and_counting_in_it() -> None:
    assert count_on_the_stack(3) == (5 + 7 + 9, 11, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="bfloat16 or float32"):
        dtype_tag(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("stub", [lambda: elements(0, 1, 2), lambda: load([0], 0), lambda: store([0], 0, 1)])
def test_compiled_only_helpers_say_so(stub) -> None:
    with pytest.raises(NotImplementedError, match="compiled"):
        stub()
