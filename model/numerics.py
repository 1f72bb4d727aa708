"""The name of everything that a result's bits depend on beside the request and the weights: two processes with equal
names compute equal bits in exact mode. Knows what is installed and on which machine, not how anything is computed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import torch

from ..kernels.cpu_gemm_panel import host_has_dots

_KERNELS = Path(__file__).parent.parent / "kernels"


def numeric_class(device: torch.device, dtype: torch.dtype, weights: str) -> str:
    """Such as `cpu-avx512bf16/bfloat16/int4/torch2.13/1f2e3d4c`: where it runs, the model's dtype, how weights are kept
    (`none`: in that dtype), torch's version, and a digest of kernels and of what compiles them."""
    name = str(dtype).removeprefix("torch.")
    version = ".".join(torch.__version__.split(".")[:2])
    return f"{_place(device, dtype)}/{name}/{weights}/torch{version}/{_kernels_digest(device.type)}"


def _place(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"hip-{torch.cuda.get_device_name(device)}" if torch.version.hip else f"sm_{major}{minor}"
    if dtype is torch.bfloat16 and host_has_dots():
        return "cpu-avx512bf16"
    return f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}"


@cache
def _kernels_digest(device_type: str) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for package in ("triton",) if device_type == "cuda" else ("numba", "llvmlite"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for path in sorted(_KERNELS.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
