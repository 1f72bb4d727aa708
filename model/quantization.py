"""Which weights of a model are served in how many bits, and how many bytes that makes. Owns the schemes; knows names,
widths and sizes, not tensors, and imports no torch: the command line lists sizes.

Where bits are saved follows from where the bytes are and what an error costs. Routed experts are 90 % and more of a
model's bytes, and shared ones a large part of what a token reads: both take int4, except in the first and the last
layer of experts, the last being by far the most sensitive (Meta's own FP8 weights spare it, too). Attention, dense MLPs
and the output head are a few percent of the bytes, and every token passes them: int8. The router decides which expert
runs, where a small error exchanges all of it; norms and embeddings are read a row at a time: they are never quantised.
`docs/quantisation.md` has the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from .checkpoint_error import CheckpointError
from .tensor_names import layer_of, text_tensors

if TYPE_CHECKING:
    from .config import Llama4Config

QuantKind = Literal["int8", "int4", "fp8"]
"""As in `kernels/quantized.py`, which needs torch."""

ROUNDING_VERSION = 1
"""Raise it whenever `quantize` or a scheme gives other bits: processes that quantise for themselves must agree."""


class Part(StrEnum):
    """What a weight is for, as far as its number format is concerned."""

    ROUTED = "routed experts"
    SHARED = "shared experts"
    DENSE = "dense MLPs"
    ATTENTION = "attention"
    HEAD = "output head"
    PLAIN = "router, norms, embedding"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a weight is quantised."""

    kind: QuantKind
    groups: tuple[int, ...] = ()
    """Widths of the groups of input channels that share a scale, largest first, 0 being all of them; none: one scale
    for each output channel."""
    fewest: int = 1
    """How many groups a row is to have at least, where one of `groups` is narrow enough."""

    def group(self, name: str, num_in: int) -> int:
        """The widest of the groups that leaves enough of them to a row of `num_in`, or else the narrowest. Raises
        CheckpointError, which calls the weight `name`, where none divides the row."""
        if not self.groups:
            return num_in
        dividing = [group or num_in for group in self.groups if not group or num_in % group == 0]
        if not dividing:
            known = ", ".join(map(str, self.groups))
            raise CheckpointError(
                f"{name} has {num_in} input channels, which groups of {known} do not divide: it cannot be {self.kind}"
            )
        return next((group for group in dividing if num_in // group >= self.fewest), dividing[-1])

    def num_bytes(self, name: str, num_out: int, num_in: int) -> int:
        """Of a weight [num_out, num_in] with its scales."""
        scales = num_out * (num_in // self.group(name, num_in))
        return num_out * num_in // 2 + 2 * scales if self.kind == "int4" else num_out * num_in + 4 * scales


@dataclass(frozen=True, slots=True)
class Scheme:
    """What each part of a model is served in; a part without a recipe in the model's own dtype."""

    name: str
    routed: Recipe | None = None
    shared: Recipe | None = None
    dense: Recipe | None = None
    attention: Recipe | None = None
    head: Recipe | None = None
    ends: Recipe | None = None
    """Of the experts, routed and shared, of the first and the last layer that has some; None: as in the others."""

    def recipe(self, name: str, config: Llama4Config) -> Recipe | None:
        """For the weight, or module, called `name`."""
        part = part_of(name)
        if part is Part.PLAIN:
            return None
        moe_ends = (min(config.moe_layers, default=None), max(config.moe_layers, default=None))
        if self.ends is not None and part in (Part.ROUTED, Part.SHARED) and layer_of(name) in moe_ends:
            return self.ends
        return getattr(self, part.name.lower())


_INT8 = Recipe("int8")
_FINE_INT8 = Recipe("int8", (128, 64, 32, 0))
_INT4 = Recipe("int4", (128, 64, 32), fewest=16)
_FP8 = Recipe("fp8")

SCHEMES: Mapping[str, Scheme] = {
    "none": Scheme("none"),
    "int8": Scheme("int8", routed=_INT8, shared=_INT8, dense=_INT8, attention=_INT8, head=_INT8),
    "int4": Scheme(
        "int4",
        routed=_INT4,
        shared=_INT4,
        dense=_FINE_INT8,
        attention=_FINE_INT8,
        head=_FINE_INT8,
        ends=_FINE_INT8,
    ),
    "fp8": Scheme("fp8", routed=_FP8, shared=_FP8),
}
"""By the name that users give. `fp8` is that of the released Maverick FP8, shared experts added. What has eight bits in
`int4` has a scale for each group: 3 % more bytes for less than half of the squared error."""


def part_of(name: str) -> Part:
    """Of a text tensor, or of the module that it belongs to."""
    if ".feed_forward.experts." in name:
        return Part.ROUTED
    if ".feed_forward.shared_expert." in name:
        return Part.SHARED
    if ".feed_forward." in name:
        return Part.PLAIN if ".router" in name else Part.DENSE
    if ".self_attn." in name:
        return Part.ATTENTION
    return Part.HEAD if "lm_head" in name else Part.PLAIN


def served_scheme(wanted: str, config: Llama4Config) -> Scheme:
    """What a model is served in: `wanted` names one of `SCHEMES`, or is "auto" for what the checkpoint says that it is.

    Raises CheckpointError for a quantised checkpoint that is to be quantised once more.
    """
    declared = config.quantization
    if wanted == "auto":
        return declared or SCHEMES["none"]
    if declared is not None and wanted != "none":
        raise CheckpointError(
            f"the checkpoint is quantised already ({declared.name}) and cannot be made {wanted}; "
            "pass --quantize auto to serve it as it is"
        )
    return SCHEMES[wanted]


def weight_sizes(config: Llama4Config, scheme: Scheme, item_bytes: int) -> dict[Part, int]:
    """Bytes of a text model's weights by part, of those that it has. `item_bytes`: of a number of the model's dtype.
    Raises CheckpointError for widths that no group divides."""
    sizes: dict[Part, int] = {}
    shapes = text_tensors(config)
    if config.tie_word_embeddings and scheme.head is not None:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)  # the product's own copy of the embedding
    for name, shape in shapes.items():
        part = part_of(name)
        sizes[part] = sizes.get(part, 0) + _tensor_bytes(config, scheme, item_bytes, name, shape)
    return sizes


def expert_sizes(config: Llama4Config, scheme: Scheme, item_bytes: int) -> dict[int, int]:
    """Bytes of one routed expert of each layer that has some."""
    sizes = dict.fromkeys(sorted(config.moe_layers), 0)
    for name, shape in text_tensors(config).items():
        if part_of(name) is Part.ROUTED:
            layer = layer_of(name)
            assert layer is not None
            sizes[layer] += _tensor_bytes(config, scheme, item_bytes, name, shape) // config.num_experts
    return sizes


def _tensor_bytes(config: Llama4Config, scheme: Scheme, item_bytes: int, name: str, shape: tuple[int, ...]) -> int:
    recipe = scheme.recipe(name, config)
    if recipe is None:
        return math.prod(shape) * item_bytes
    if len(shape) == 3:  # stacked experts [E, in, out]
        return shape[0] * recipe.num_bytes(name, shape[2], shape[1])
    return recipe.num_bytes(name, *shape)
