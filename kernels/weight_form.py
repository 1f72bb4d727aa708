"""The kinds of weights that products are compiled for ahead of time, and the GPUs that can run them. Knows no
kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .gpu_weight import WeightKind
from .launch import Platform

TARGETS: dict[Platform, tuple[str, ...]] = {"cuda": ("sm_90", "sm_100"), "ampere": ("sm_80",), "hip": ("gfx942",)}
_WITHOUT_E4M3 = ("sm_80", "gfx942")
"""sm_80 multiplies no e4m3, and gfx942 another e4m3 than everybody else's. Weights of fp8 become bfloat16 there."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """One layout of `gpu_weight`, with Triton's names for its types."""

    name: str
    kind: WeightKind
    group: int
    plane: int
    weight: str
    scale: str | None

    @property
    def for_experts(self) -> bool:
        """Experts in int8 have one scale per channel."""
        return self.kind != "int8" or not self.group

    def types(self, rows: str) -> dict[str, str | None]:
        """Of the rows, their scales and the weight's scales; None for what a launch leaves out."""
        both = self.kind == "fp8_rows"
        return {rows: "*u8" if both else "*bf16", f"{rows}_scales": "*fp32" if both else None, "scales": self.scale}

    def constants(self, where: Platform) -> dict[str, Any]:
        return {
            "KIND": self.kind,
            "GROUP": self.group,
            "PLANE": self.plane,
            "EVEN": True,
            "ASM": where != "hip",
        }


FORMS = (
    WeightForm("bf16", "plain", 0, 64, "*bf16", None),
    WeightForm("fp8", "fp8", 0, 32, "*i16", "*fp32"),
    WeightForm("fp8 x fp8", "fp8_rows", 0, 64, "*u8", "*fp32"),
    WeightForm("int8", "int8", 0, 32, "*i16", "*fp32"),
    WeightForm("int8 group 128", "int8", 128, 32, "*i16", "*fp32"),
    WeightForm("int4 group 128", "int4", 128, 32, "*i16", "*bf16"),
)


def forms_on(where: Platform) -> list[tuple[WeightForm, tuple[str, ...]]]:
    """Forms with those of the platform's targets that can run them."""
    listed = []
    for form in FORMS:
        targets = tuple(t for t in TARGETS[where] if form.kind != "fp8_rows" or t not in _WITHOUT_E4M3)
        if targets:
            listed.append((form, targets))
    return listed
