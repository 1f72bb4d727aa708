"""The text weights of a checkpoint, each as it lies in the files: plain or quantised, routed experts stacked or apart.
Whoever asks gets linear weights as [out, in]. Knows layouts of files; nothing of devices or of what is served.

Shapes: D hidden, F expert width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.quantized import QuantizedWeight
from .checkpoint import WeightSource, check_tensors
from .compressed_tensors import FLOATS, TensorSpec, is_quantized, read, refuse_unsupported, stored_tensors
from .config import Llama4Config
from .quantization import Part, part_of
from .tensor_names import is_vision_tensor, layer_name, layer_of, text_tensors

Weight = Tensor | QuantizedWeight


class StoredWeights:
    """Checks on opening that all is there. Every method raises CheckpointError."""

    def __init__(self, source: WeightSource, config: Llama4Config) -> None:
        names = source.names()
        text = [name for name in names if not is_vision_tensor(name)]
        refuse_unsupported(text)
        self._source = source
        self._config = config
        self._shapes = text_tensors(config)
        self._apart = {layer for layer in config.moe_layers if self._experts_are_apart(layer)}
        expected: dict[str, TensorSpec] = {}
        for name, shape in self._shapes.items():
            expected |= self._stored(name, shape)
        check_tensors(
            source,
            {name: spec.shape for name, spec in expected.items()},
            is_vision_tensor,
            {name: spec.dtypes for name, spec in expected.items()},
        )
        self._expected = expected
        self.quantized = any(name.endswith(".weight_scale") for name in expected)
        """Whether any weight is stored with scales."""

    def sizes(self, item_bytes: int) -> dict[Part, int]:
        """Bytes by part, as stored, plain weights at `item_bytes` a number."""
        sizes: dict[Part, int] = {}
        for name, spec in self._expected.items():
            if name.endswith(".weight_shape"):
                continue
            count = math.prod(self._source.shape(name))
            size = count * (item_bytes if spec.dtypes == FLOATS else self._source.dtype(name).itemsize)
            part = part_of(name)
            sizes[part] = sizes.get(part, 0) + size
        return sizes

    def plain(self, name: str) -> Tensor:
        """A tensor that is never quantised."""
        return self._source.tensor(name)

    def linear(self, module: str) -> Weight:
        """The weight of a linear module outside the routed experts."""
        num_out, num_in = self._shapes[f"{module}.weight"]
        return read(self._source, module, (num_out, num_in))

    def expert(self, layer: int, index: int) -> tuple[dict[str, Weight], Weight]:
        """One routed expert, read without its neighbours: gate and up by name, [2F, D] or [F, D] each, and down
        [D, F]."""
        base = layer_name(self._config, layer, "feed_forward.experts.")
        if layer not in self._apart:
            gate_up_D2F = self._source.expert(f"{base}gate_up_proj", index)
            return {"gate_up_proj": gate_up_D2F.t()}, self._source.expert(f"{base}down_proj", index).t()
        D, F = self._config.hidden_size, self._config.expert_width
        gate_up = {name: read(self._source, f"{base}{index}.{name}", (F, D)) for name in ("gate_proj", "up_proj")}
        return gate_up, read(self._source, f"{base}{index}.down_proj", (D, F))

    def expert_dtype(self, layer: int) -> torch.dtype:
        """In which the layer's routed experts lie."""
        name = "experts.0.gate_proj.weight" if layer in self._apart else "experts.gate_up_proj"
        return self._source.dtype(layer_name(self._config, layer, f"feed_forward.{name}"))

    def _experts_are_apart(self, layer: int) -> bool:
        names = self._source.names()
        module = layer_name(self._config, layer, "feed_forward.experts.0.gate_proj")
        return f"{module}.weight" in names or is_quantized(names, module)

    def _stored(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """What must be in the files for one tensor of the plain layout."""
        if part_of(name) is Part.ROUTED and layer_of(name) in self._apart:
            base, _, kind = name.rpartition(".")
            D, F = self._config.hidden_size, self._config.expert_width
            parts = (("down_proj", (D, F)),) if kind == "down_proj" else (("gate_proj", (F, D)), ("up_proj", (F, D)))
            specs: dict[str, TensorSpec] = {}
            for index in range(shape[0]):
                for part, size in parts:
                    specs |= stored_tensors(self._source, f"{base}.{index}.{part}", size)
            return specs
        if len(shape) == 2 and not name.endswith("embed_tokens.weight"):
            return stored_tensors(self._source, name.removesuffix(".weight"), (shape[0], shape[1]))
        return {name: TensorSpec(shape)}
