"""Triton's kernels run on the GPU, or interpreted on CPU tensors where there is none (tests/conftest.py)."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
