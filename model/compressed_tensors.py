"""One quantised linear weight in a checkpoint, in the three layouts of compressed-tensors that Llama 4 comes in: which
tensors it takes, and back. Which weights are quantised is told by what lies there, never by a rule of layers.

    pack-quantized    weight_packed int32 [O, I / 8], offset nibbles (q + 8), lowest first; weight_scale [O, I / group];
                      weight_shape [2]. With bytes (q + 128) in place of nibbles: int32 [O, I / 4]
    int-quantized     weight int8 [O, I]; weight_scale [O, 1]
    float-quantized   weight float8_e4m3fn [O, I]; weight_scale [O, 1]

Shapes: O out features, I in features, G groups of input channels. A module is a tensor's name without `.weight`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.quantized import QuantizedWeight, QuantKind
from .checkpoint import WeightSource
from .checkpoint_error import CheckpointError
from .quantization import Recipe

FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
_SCALES = (torch.bfloat16, torch.float32, torch.float16)
_SMALLEST_GROUP = 32
_REFUSED = {
    "weight_zero_point": "asymmetric weights (zero points) are not supported",
    "weight_g_idx": "input channels in another order (actorder) are not supported",
    "weight_global_scale": "scales of scales (4-bit floats) are not supported",
    "input_scale": "static scales of activations are not supported",
    "output_scale": "static scales of activations are not supported",
    "input_global_scale": "static scales of activations are not supported",
    "k_scale": "a quantised KV cache is not supported",
    "v_scale": "a quantised KV cache is not supported",
    "q_scale": "quantised attention is not supported",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor of a file must be, or will be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Any of them."""


def refuse_unsupported(names: Collection[str]) -> None:
    """Raise CheckpointError for the first tensor that belongs to a form of quantisation which Herd cannot compute."""
    for name in names:
        reason = _REFUSED.get(name.rpartition(".")[2])
        if reason is not None:
            raise CheckpointError(f"tensor {name}: {reason}")


def is_quantized(names: Collection[str], module: str) -> bool:
    """Whether the module's weight is stored with scales."""
    return f"{module}.weight_packed" in names or f"{module}.weight_scale" in names


def stored_tensors(source: WeightSource, module: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Names of the tensors that hold the module's weight [O, I], and what they must be. Raises CheckpointError for
    scales that are of no use."""
    names, (num_out, num_in) = source.names(), shape
    if not is_quantized(names, module):
        return {f"{module}.weight": TensorSpec(shape)}
    scale = f"{module}.weight_scale"
    specs = {scale: TensorSpec((num_out, 1), _SCALES)}
    if scale in names:
        specs[scale] = TensorSpec(_usable_scale(source, scale, num_out, num_in), _SCALES)
    packed = f"{module}.weight_packed"
    if packed not in names:
        return specs | {f"{module}.weight": TensorSpec(shape, (torch.int8, torch.float8_e4m3fn))}
    per_word = 4 if source.shape(packed) == (num_out, num_in // 4) else 8
    if num_in % per_word:
        raise CheckpointError(f"tensor {packed}: {num_in} input channels do not fill whole words")
    specs[packed] = TensorSpec((num_out, num_in // per_word), (torch.int32,))
    if (size := f"{module}.weight_shape") in names:
        specs[size] = TensorSpec((2,), (torch.int64, torch.int32))
    return specs


def read(source: WeightSource, module: str, shape: tuple[int, int]) -> Tensor | QuantizedWeight:
    """The module's weight [O, I], on the CPU, as it is stored. Raises CheckpointError."""
    names, (num_out, num_in) = source.names(), shape
    if not is_quantized(names, module):
        return source.tensor(f"{module}.weight")
    name = f"{module}.weight_scale"
    scales_OG = source.tensor(name)
    if not bool(scales_OG.isfinite().all()):
        raise CheckpointError(f"tensor {name} holds NaN or infinite values")
    if scales_OG.dtype is not torch.bfloat16:
        scales_OG = scales_OG.float()
    scales_OG = scales_OG.view(num_out, -1) if scales_OG.numel() > 1 else scales_OG.view(1, 1).repeat(num_out, 1)
    group = num_in // scales_OG.shape[1]
    if f"{module}.weight_packed" not in names:
        weight = source.tensor(f"{module}.weight")
        kind: QuantKind = "int8" if weight.dtype is torch.int8 else "fp8"
        return QuantizedWeight(kind, weight, scales_OG, group)
    packed = source.tensor(f"{module}.weight_packed").view(torch.uint8)
    if packed.shape[1] == num_in:
        return QuantizedWeight("int8", packed.bitwise_xor_(0x80).view(torch.int8), scales_OG, group)
    # An offset nibble (q + 8) is the two's complement one with its highest bit turned, and words are little-endian.
    return QuantizedWeight("int4", packed.bitwise_xor_(0x88), scales_OG, group)


def written_tensors(module: str, shape: tuple[int, int], recipe: Recipe) -> dict[str, TensorSpec]:
    """What `write` will return for a weight of this shape."""
    num_out, num_in = shape
    scales = (num_out, num_in // recipe.group(module, num_in))
    if recipe.kind == "int4":
        return {
            f"{module}.weight_packed": TensorSpec((num_out, num_in // 8), (torch.int32,)),
            f"{module}.weight_scale": TensorSpec(scales, (torch.bfloat16,)),
            f"{module}.weight_shape": TensorSpec((2,), (torch.int64,)),
        }
    dtype = torch.int8 if recipe.kind == "int8" else torch.float8_e4m3fn
    return {
        f"{module}.weight": TensorSpec(shape, (dtype,)),
        f"{module}.weight_scale": TensorSpec(scales, (torch.float32,)),
    }


def write(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that hold the weight, by name."""
    if weight.kind != "int4":
        return {f"{module}.weight": weight.q, f"{module}.weight_scale": weight.scales_OG}
    return {
        f"{module}.weight_packed": weight.q.bitwise_xor(0x88).view(torch.int32),
        f"{module}.weight_scale": weight.scales_OG,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }


def _usable_scale(source: WeightSource, name: str, num_out: int, num_in: int) -> tuple[int, ...]:
    """The shape of the scales that are there, if they are one for all, or some for each output channel."""
    shape = source.shape(name)
    if shape in ((), (1,), (num_out,), (num_out, 1)):
        return shape
    if len(shape) == 2 and shape[0] == num_out and num_in % shape[1] == 0:
        if (num_in // shape[1]) % _SMALLEST_GROUP == 0:
            return shape
        raise CheckpointError(
            f"tensor {name} is {list(shape)}: groups of {num_in // shape[1]} input channels are not supported, only "
            f"multiples of {_SMALLEST_GROUP}"
        )
    raise CheckpointError(
        f"tensor {name} is {list(shape)} for a weight of [{num_out}, {num_in}]: scales must be one per output channel "
        "or per group of its input channels (blocks are not supported)"
    )
