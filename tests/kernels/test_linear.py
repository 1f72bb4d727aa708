from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from herd.kernels.linear import Linear, linear_ref, padded_rows

from .tolerances import assert_as_exact, noise

SHAPES = [
    pytest.param(1, 64, 48, id="one row"),
    pytest.param(5, 17, 33, id="odd sizes"),
    pytest.param(3, 64, 1, id="one output"),
    pytest.param(2, 1, 8, id="one input"),
    pytest.param(130, 96, 64, id="more rows than a tile"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "I", "O"), SHAPES)
def test_linear(T: int, I: int, O: int, dtype: torch.dtype) -> None:  # noqa: E741
    x, weight = noise(T, I, dtype=dtype), noise(O, I, dtype=dtype, seed=1)
    linear = Linear(weight)
    assert (linear.in_features, linear.out_features) == (I, O)
    out = linear(x)
    assert out.is_contiguous()
    assert_as_exact(out, linear_ref(x, weight), linear_ref(x.double(), weight.double()))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_the_callers_weight(dtype: torch.dtype) -> None:
    """Tied embeddings use the same tensor as a table."""
    weight = noise(16, 32, dtype=dtype)
    before = weight.clone()
    Linear(weight)(noise(2, 32, dtype=dtype))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("O", "I"), [(512, 48), (61, 33), (512, 512), (512, 2048), (2048, 2048)])
def test_a_rows_bits_do_not_depend_on_its_company(O: int, I: int, dtype: torch.dtype, threads: None) -> None:  # noqa: E741
    """For every padding rule: single rows, few, up to a fine step, beyond; from the first row and up to the last."""
    linear = Linear(noise(O, I, dtype=dtype, seed=1))
    x = noise(140, I, dtype=dtype)
    whole = linear(x)
    for rows in (*range(1, 34), 63, 64, 65, 97, 139):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[140 - rows :].contiguous()), whole[140 - rows :]), rows


def test_a_single_row_would_have_other_bits_if_it_were_not_padded() -> None:
    linear = Linear(noise(2048, 2048, dtype=torch.float32, seed=1))
    x = noise(2, 2048, dtype=torch.float32)
    together = linear(x)
    assert torch.equal(linear(x[:1]), together[:1])
    linear._fewest_rows = 1
    assert not torch.equal(linear(x[:1]), together[:1])


def test_few_numbers_of_rows_are_compiled() -> None:
    counts = [padded_rows(rows) for rows in range(1, 257)]
    assert all(padded >= rows for rows, padded in enumerate(counts, 1))
    assert counts == sorted(counts)
    assert len(set(counts)) == 8 + 7 + 6
