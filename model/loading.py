"""From a weight source to a `Decoder`: one tensor (or one expert) at a time, laid out for the device as it comes, so
that memory never holds much more than the weights themselves. Knows layouts, not files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import overload

import torch
from torch import Tensor

from ..kernels.grouped_mlp import ExpertWeights
from ..kernels.linear import Linear
from ..kernels.quantized import NotFinite, QuantizedWeight, concatenate, quantize
from .checkpoint import WeightSource
from .checkpoint_error import CheckpointError
from .config import Llama4Config
from .decoder import AttentionWeights, Decoder, LayerWeights
from .device_experts import DeviceExperts
from .experts import ExpertBackend, LocalExperts
from .heap import trim_heap
from .quantization import SCHEMES, Part, Recipe, Scheme, part_of, weight_sizes
from .stored_weights import StoredWeights, Weight
from .tensor_names import layer_name, top_name

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, bytes in all)"""

_TRIM_BYTES = 16 << 20
"""How much is laid out between two visits of the heap: the most that temporaries can keep of it, about."""


class Loader:
    """Reads one checkpoint into one dtype on one device."""

    def __init__(
        self,
        source: WeightSource,
        config: Llama4Config,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        scheme: Scheme | None = None,
        exact: bool = True,
    ) -> None:
        """`scheme`: what the weights are to be; None leaves them as they are stored. `exact`: a row's bits shall not
        depend on its company. Raises CheckpointError."""
        self._stored = StoredWeights(source, config)
        if scheme is not None and scheme != SCHEMES["none"] and self._stored.quantized:
            raise CheckpointError(f"{source} is quantised already and cannot be made {scheme.name}")
        self._config = config
        self._dtype = dtype
        self._device = torch.device(device)
        self._progress = progress
        self._scheme = scheme
        self._exact = exact
        self._done = self._trimmed = 0
        item = dtype.itemsize
        self._sizes = self._stored.sizes(item) if scheme is None else weight_sizes(config, scheme, item)
        self._total = sum(self._sizes.values())

    def decoder(self, experts: ExpertBackend | None = None) -> Decoder:
        """The whole model; with `experts` given, the routed experts are left to it."""
        config = self._config
        if experts is not None:
            self._total -= self._sizes.get(Part.ROUTED, 0)
        # The head first: laying it out takes a second copy for a moment, which must not come on top of everything else.
        embedding_VD = self._plain(top_name(config, "model.embed_tokens.weight"))
        head = self._head(embedding_VD)
        layers, local = [], {}
        for i in range(config.num_layers):
            layers.append(self.layer(i))
            if experts is None and config.is_moe(i):
                local[i] = [self.expert(i, e) for e in range(config.num_experts)]
        norm_D = self._plain(top_name(config, "model.norm.weight"))
        trim_heap()
        return Decoder(
            config,
            embedding_VD=embedding_VD,
            layers=layers,
            norm_D=norm_D,
            head=head,
            experts=self._experts_here(local) if experts is None else experts,
            exact=self._exact,
        )

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer without its routed experts."""

        def plain(suffix: str) -> Tensor:
            return self._plain(layer_name(self._config, index, suffix))

        def linear(*modules: str) -> Linear:
            names = [layer_name(self._config, index, module) for module in modules]
            return self._linear(self._served({name: self._stored.linear(name) for name in names}))

        moe = self._config.is_moe(index)
        mlp = "feed_forward.shared_expert" if moe else "feed_forward"
        qkv = linear(*(f"self_attn.{name}_proj" for name in "qkv"))
        gate_up = linear(f"{mlp}.gate_proj", f"{mlp}.up_proj")
        return LayerWeights(
            input_norm_D=plain("input_layernorm.weight"),
            attention=AttentionWeights(qkv, linear("self_attn.o_proj")),
            mlp_norm_D=plain("post_attention_layernorm.weight"),
            mlp=ExpertWeights(gate_up, linear(f"{mlp}.down_proj")),
            router=linear("feed_forward.router") if moe else None,
        )

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """One routed expert, read without its neighbours."""
        return self.expert_weights(*self.expert_tensors(layer, index))

    def expert_weights(self, gate_up_2FD: Weight, down_DF: Weight) -> ExpertWeights:
        """What `expert_tensors` read, laid out for the device."""
        return ExpertWeights(self._linear(gate_up_2FD), self._linear(down_DF))

    def expert_tensors(self, layer: int, index: int) -> tuple[Weight, Weight]:
        """What `expert` lays out: gate_up [2F, D] and down [D, F] on the device, contiguous; of the wanted dtype where
        they are not quantised."""
        name = layer_name(self._config, layer, f"feed_forward.experts.{index}")
        gate_up, down = self._stored.expert(layer, index)
        return self._served({f"{name}.{part}": weight for part, weight in gate_up.items()}), self._served(
            {f"{name}.down_proj": down}
        )

    def _experts_here(self, experts: dict[int, list[ExpertWeights]]) -> ExpertBackend:
        if self._device.type == "cuda":
            return DeviceExperts(experts, self._exact)
        return LocalExperts(experts)

    def _linear(self, weight: Weight) -> Linear:
        return Linear(weight, self._exact)

    def _head(self, embedding_VD: Tensor) -> Linear:
        name = top_name(self._config, "lm_head")
        if not self._config.tie_word_embeddings:
            return self._linear(self._served({name: self._stored.linear(name)}))
        if self._scheme is None or self._scheme.head is None:
            return self._linear(embedding_VD)
        # From the file's numbers, as an untied head would be.
        table = self._stored.plain(top_name(self._config, "model.embed_tokens.weight"))
        return self._linear(self._served({name: table}))

    def _plain(self, name: str) -> Tensor:
        return self._place(self._stored.plain(name))

    def _served(self, weights: Mapping[str, Weight]) -> Weight:
        """One weight made of `weights`, one's output channels below the other's, in the format that is served."""
        some = next(iter(weights))
        recipe = None if self._scheme is None else self._scheme.recipe(some, self._config)
        parts = list(weights.values())
        if recipe is not None:
            parts = [_quantized(name, weight, recipe) for name, weight in weights.items()]
        may_be_quantized = part_of(some) is not Part.PLAIN and (self._scheme is None or recipe is not None)
        quantized = [weight for weight in parts if isinstance(weight, QuantizedWeight)]
        if may_be_quantized and len(quantized) == len(parts) and len({(w.kind, w.group) for w in quantized}) == 1:
            return self._place(concatenate(quantized))
        # Plain weights, those that must not be quantised, and parts of one product that differ in their format.
        tensors = [w.dequantize() if isinstance(w, QuantizedWeight) else w for w in parts]
        return self._place(tensors[0] if len(tensors) == 1 else torch.cat([t.to(self._dtype) for t in tensors]))

    @overload
    def _place(self, weight: Tensor) -> Tensor: ...

    @overload
    def _place(self, weight: QuantizedWeight) -> QuantizedWeight: ...

    def _place(self, weight: Weight) -> Weight:
        if isinstance(weight, QuantizedWeight):
            placed = weight.to(self._device)
            self._done += placed.num_bytes
        else:
            placed = weight.to(device=self._device, dtype=self._dtype).contiguous()
            self._done += placed.nbytes
        if self._done - self._trimmed >= _TRIM_BYTES:
            self._trimmed = self._done
            trim_heap()
        if self._progress is not None:
            self._progress("weights", min(self._done, self._total), self._total)
        return placed


def _quantized(name: str, weight: Weight, recipe: Recipe) -> QuantizedWeight:
    assert isinstance(weight, Tensor), "checked on opening"
    try:
        return quantize(weight, recipe.kind, recipe.group(name, weight.shape[1]))
    except NotFinite as error:
        raise CheckpointError(f"{name} cannot be quantised: {error}") from error
