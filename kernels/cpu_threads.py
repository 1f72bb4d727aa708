"""Runs one C function on several threads at once: on the OpenMP threads that torch computes with, which wait for work
anyway. Any number of Python threads may do so at the same time. Knows nothing of the work."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def parallel_address() -> int:
    """Address of `GOMP_parallel(function, argument, threads, flags)` in torch's OpenMP runtime, which runs
    `function(argument)` on each thread of a team; 0 where there is none, so that all work stays on one thread."""
    libraries = Path(torch.__file__).parent / "lib"
    for pattern in ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*"):
        for path in sorted(libraries.glob(pattern)):
            try:
                return _address(ctypes.CDLL(str(path)))
            except (OSError, AttributeError):
                continue
    try:
        return _address(ctypes.CDLL(None))
    except AttributeError:
        return 0


def _address(library: ctypes.CDLL) -> int:
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
