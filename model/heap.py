"""Gives freed memory back to the system. glibc keeps freed blocks of up to 32 MiB in its heap, where whatever was laid
out between them pins them: a third of a model's size, after loading it piece by piece."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Return free pages of the C heap to the system; does nothing on other systems than Linux with glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
