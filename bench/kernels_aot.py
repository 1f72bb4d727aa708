"""Compiles every configuration of every Triton kernel for GPUs that are not here, and says what each takes: registers,
spills, shared memory, the instructions it multiplies with.

    python bench/kernels_aot.py            all; writes bench/results/kernels_aot.json and docs/kernels-aot.md
    python bench/kernels_aot.py linear     those whose name has `linear` in it; writes nothing
    python bench/kernels_aot.py --here     only fills Triton's cache for the GPU of this machine, on all cores

Exits with 1 if a kernel spills, does not compile, needs more shared memory than the chip has, or multiplies with other
instructions than another one that promises the same bits. `ptxas -v` speaks for NVIDIA, the assembly's own metadata for
AMD."""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from herd.kernels.variant import Variant

ROOT = Path(__file__).resolve().parent.parent
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""What one thread block may take."""
_MULTIPLY = re.compile(r"\b(mma\.sync\.[\w.]+|wgmma\.mma_async\.[\w.]+|tcgen05\.mma\.[\w.:]+|v_mfma_\w+)")


@dataclass(frozen=True)
class Outcome:
    """One kernel configuration on one target."""

    module: str
    name: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    multiplies: list[str]
    """The matrix instructions, shapes and types included."""
    same_bits: str
    error: str = ""

    def faults(self) -> Iterator[str]:
        where = f"{self.module}: {self.name} on {self.target}"
        if self.error:
            yield f"{where}: {self.error}"
        if self.spilled_bytes:
            yield f"{where} spills {self.spilled_bytes} bytes"
        if self.shared_bytes > SHARED_KIB[self.target] << 10:
            yield f"{where} takes {self.shared_bytes} bytes of shared memory"


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "kernels").glob("triton_*.py"))


def variants_of(module: str) -> list[Variant]:
    listed = getattr(importlib.import_module(f"herd.kernels.{module}"), "variants", list)()
    assert len({(v.name, t) for v in listed for t in v.targets}) == sum(len(v.targets) for v in listed), module
    return listed


def compiled(variant: Variant, target: str) -> Any:
    names = variant.kernel.arg_names
    types = {**variant.signature, **dict.fromkeys(variant.constexprs, "constexpr")}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False}
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
        options["matrix_instr_nonkdim"] = 16
    return triton.compile(source, target=gpu, options=options)


def measure(module: str, index: int, target: str) -> Outcome:
    variant = variants_of(module)[index]
    about = {"module": module, "name": variant.name, "target": target, "same_bits": variant.same_bits}
    try:
        kernel = compiled(variant, target)
        read = ptxas if target.startswith("sm_") else amd_metadata
        registers, spilled, text = read(kernel, target)
    except Exception as error:  # noqa: BLE001  whatever a compiler says goes into the report
        lines = str(error).strip().splitlines() or [""]
        return Outcome(**about, warps=0, registers=0, spilled_bytes=0, shared_bytes=0, multiplies=[], error=lines[-1])
    multiplies = sorted(set(_MULTIPLY.findall(text)))
    shared = kernel.metadata.shared
    return Outcome(
        **about,
        warps=variant.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        multiplies=multiplies,
    )


def ptxas(kernel: Any, target: str) -> tuple[int, int, str]:
    """-> registers per thread, bytes spilled per thread, PTX."""
    tools = knobs.nvidia
    # Triton assembles with one or the other of its two, by version; only it knows the newer PTX.
    for tool in (
        (tools.ptxas, tools.ptxas_blackwell) if target < "sm_100" or len(target) == 5 else (tools.ptxas_blackwell,)
    ):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(kernel.asm["ptx"])
            file.flush()
            gpu = f"{target}a" if target != "sm_80" else target
            command = [tool.path, "-v", "--gpu-name", gpu, "--fmad=false", file.name, "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        raise RuntimeError(done.stderr)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))
    return registers, spilled, kernel.asm["ptx"]


def amd_metadata(kernel: Any, _: str) -> tuple[int, int, str]:
    """-> vector registers per lane, bytes of scratch memory per lane, assembly."""
    text = kernel.asm["amdgcn"]
    found = {key: [int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", text)] for key in ("vgpr_count", "agpr_count")}
    scratch = [int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)]
    return max(found["vgpr_count"]), max(scratch, default=0), text


def run(pattern: str) -> list[Outcome]:
    jobs = [
        (module, index, target)
        for module in modules()
        for index, variant in enumerate(variants_of(module))
        for target in variant.targets
        if pattern in variant.name
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True), chunksize=4)) if jobs else []


def disagreements(outcomes: list[Outcome]) -> Iterator[str]:
    """Promises of equal bits that the instructions do not keep."""
    used: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.same_bits and not outcome.error:
            used[outcome.same_bits, outcome.target].add(tuple(outcome.multiplies))
    for (label, target), kinds in used.items():
        if len(kinds) > 1:
            yield f"{label} on {target} multiplies with {sorted(kinds)}"


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a kernel configuration a row, a target a column."""
    targets = list(SHARED_KIB)
    rows: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for o in outcomes:
        cell = f"{o.registers} / {o.shared_bytes / 1024:.0f}" if not o.error else "fails"
        rows[o.module, o.name][o.target] = cell + (f" spills {o.spilled_bytes}" if o.spilled_bytes else "")
    limits = ", ".join(f"{target} {limit}" for target, limit in SHARED_KIB.items())
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `make kernels-aot` with Triton {triton.__version__}: registers per thread / KiB of shared memory",
        f"per program (limits: {limits}). None spills. Where a field is empty, the kernel is not for",
        "that GPU: products of e4m3 with e4m3 need sm_89, gfx942 has another e4m3, and its pipelines are shorter.",
    ]
    for module in dict.fromkeys(module for module, _ in rows):
        lines += ["", f"## {module}", "", f"| | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
        for (owner, name), cells in rows.items():
            if owner == module:
                lines.append(f"| {name} | {' | '.join(cells.get(target, '') for target in targets)} |")
    return "\n".join(lines) + "\n"


def warm(module: str, index: int) -> str:
    """Compile a variant as its launch would. Returns the compiler's complaint, if any."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i16": torch.int16}
    dtypes |= {"i8": torch.int8, "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64}
    dtypes |= {"fp8e4nv": torch.float8_e4m3fn}
    variant = variants_of(module)[index]
    arguments: dict[str, Any] = dict(variant.constexprs)
    for name, kind in variant.signature.items():
        if kind[0] == "*":
            arguments[name] = dtypes[kind[1:]]
        else:
            arguments[name] = 0.5 if kind.startswith("fp") else 64 if name in variant.divisible_by_16 else 7
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False}
    in_order = [arguments.pop(name) for name in variant.kernel.arg_names]
    try:
        variant.kernel.warmup(*in_order, grid=(1,), **options)
    except Exception as error:  # noqa: BLE001  the launch itself will say more
        return f"{variant.name}: {error}"
    return ""


def warm_all() -> int:
    major, minor = torch.cuda.get_device_capability()
    target = "gfx942" if torch.version.hip else f"sm_{major}{minor}"
    target = target if target in SHARED_KIB else "sm_80"
    jobs = [(m, i) for m in modules() for i, variant in enumerate(variants_of(m)) if target in variant.targets]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        faults = list(filter(None, pool.map(warm, *zip(*jobs, strict=True), chunksize=4)))
    print(*faults, f"{len(jobs)} compiled for {target}, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


def main() -> int:
    if sys.argv[1:] == ["--here"]:
        return warm_all()
    pattern = " ".join(sys.argv[1:])
    outcomes = run(pattern)
    faults = [fault for outcome in outcomes for fault in outcome.faults()] + list(disagreements(outcomes))
    if not pattern:
        rows = [json.dumps(asdict(outcome)) for outcome in outcomes]
        head = json.dumps({"triton": triton.__version__, "shared_kib": SHARED_KIB})
        text = head[:-1] + ', "kernels": [\n' + ",\n".join(rows) + "\n]}\n"
        (ROOT / "bench" / "results" / "kernels_aot.json").write_text(text)
        (ROOT / "docs" / "kernels-aot.md").write_text(table(outcomes))
    print(*faults, f"{len(outcomes)} compiled, {len(faults)} faults", sep="\n")
    return 1 if faults or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
