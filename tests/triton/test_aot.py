"""Ahead-of-time compilation: it compiles without a GPU, and it notices what it promises to notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FAULTS = """
import sys
sys.path.insert(0, "bench")
from kernels_aot import Outcome, disagreements

def outcome(**changes):
    return Outcome(**{
        "module": "m", "name": "n", "target": "sm_90", "warps": 4, "registers": 255, "spilled_bytes": 0,
        "shared_bytes": 227 << 10, "multiplies": ["mma"], "same_bits": "", **changes,
    })

assert not list(outcome().faults())
assert "spills 8" in next(outcome(spilled_bytes=8).faults())
assert "shared memory" in next(outcome(shared_bytes=(227 << 10) + 1).faults())
assert "shared memory" in next(outcome(target="gfx942", shared_bytes=65 << 10).faults())
assert "no such thing" in next(outcome(error="no such thing").faults())
alike = [outcome(same_bits="a"), outcome(same_bits="a"), outcome(multiplies=["wgmma"])]
assert not list(disagreements(alike))
assert not list(disagreements([*alike, outcome(same_bits="a", target="sm_80", multiplies=["other"])]))
assert len(list(disagreements([*alike, outcome(same_bits="a", multiplies=["wgmma"])]))) == 1
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_faults_are_noticed() -> None:
    done = python("-c", FAULTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["linear, int4 group 128, 16 x 8, ", "down, one MLP, fp8 x fp8, 32 x 8", "route 16, 1 "]
)
def test_kernels_compile_without_a_gpu(pattern: str) -> None:
    done = python("bench/kernels_aot.py", *pattern.split(" "))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
