from __future__ import annotations

import numpy as np
import pytest
import torch

from herd.cluster.upload import Staging, upload

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.array([[1, 2, 3]], np.int32),
    np.zeros((0, 2), np.int32),
    np.array([7], np.int64),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, :],
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_arrive_as_they_are(device: str) -> None:
    tensors = upload(ARRAYS, torch.device(device))
    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert tensor.device.type == device
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_is_written_again_and_again(device: str) -> None:
    """The tensors stay where they are, and each begins where a vector load may."""
    staging = Staging(ARRAYS, torch.device(device))
    addresses = [tensor.data_ptr() for tensor in staging.tensors]
    assert all(address % 16 == addresses[0] % 16 for address in addresses)
    for add in (0, 3):
        arrays = [array + add for array in ARRAYS]
        staging.write(arrays)
        for array, tensor in zip(arrays, staging.tensors, strict=True):
            np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
    assert [tensor.data_ptr() for tensor in staging.tensors] == addresses
