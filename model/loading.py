"""From a weight source to a `Decoder`: one tensor (or one expert) at a time, laid out for the device as it comes, so
that memory never holds much more than the weights themselves. Knows layouts, not files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.grouped_mlp import ExpertWeights
from ..kernels.linear import Linear
from .checkpoint import WeightSource, check_tensors
from .config import Llama4Config
from .decoder import AttentionWeights, Decoder, LayerWeights
from .experts import ExpertBackend, LocalExperts
from .heap import trim_heap
from .tensor_names import is_vision_tensor, layer_name, text_tensors, top_name

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
    ) -> None:
        shapes = text_tensors(config)
        check_tensors(source, shapes, is_vision_tensor)
        self._source = source
        self._config = config
        self._dtype = dtype
        self._device = torch.device(device)
        self._progress = progress
        self._done = self._trimmed = 0
        self._total = config.num_parameters * dtype.itemsize

    def decoder(self, experts: ExpertBackend | None = None) -> Decoder:
        """The whole model; with `experts` given, the routed experts are left to it."""
        config = self._config
        if experts is not None:
            routed = len(config.moe_layers) * config.num_experts * 3 * config.hidden_size * config.expert_width
            self._total -= routed * self._dtype.itemsize
        # The head first: laying it out takes a second copy for a moment, which must not come on top of everything else.
        embedding_VD = self._get(top_name(config, "model.embed_tokens.weight"))
        if config.tie_word_embeddings:
            head = Linear(embedding_VD)
        else:
            head = Linear(self._get(top_name(config, "lm_head.weight")))
        layers, local = [], {}
        for i in range(config.num_layers):
            layers.append(self.layer(i))
            if experts is None and config.is_moe(i):
                local[i] = [self.expert(i, e) for e in range(config.num_experts)]
        norm_D = self._get(top_name(config, "model.norm.weight"))
        trim_heap()
        return Decoder(
            config,
            embedding_VD=embedding_VD,
            layers=layers,
            norm_D=norm_D,
            head=head,
            experts=LocalExperts(local) if experts is None else experts,
        )

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer without its routed experts."""

        def get(suffix: str) -> Tensor:
            return self._get(layer_name(self._config, index, suffix))

        moe = self._config.is_moe(index)
        mlp = "feed_forward.shared_expert" if moe else "feed_forward"
        qkv = Linear(torch.cat([get(f"self_attn.{name}_proj.weight") for name in "qkv"]))
        gate_up = Linear(torch.cat([get(f"{mlp}.gate_proj.weight"), get(f"{mlp}.up_proj.weight")]))
        return LayerWeights(
            input_norm_D=get("input_layernorm.weight"),
            attention=AttentionWeights(qkv, Linear(get("self_attn.o_proj.weight"))),
            mlp_norm_D=get("post_attention_layernorm.weight"),
            mlp=ExpertWeights(gate_up, Linear(get(f"{mlp}.down_proj.weight"))),
            router=Linear(get("feed_forward.router.weight")) if moe else None,
        )

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """One routed expert, read without its neighbours."""
        gate_up_2FD, down_DF = self.expert_tensors(layer, index)
        return ExpertWeights(Linear(gate_up_2FD), Linear(down_DF))

    def expert_tensors(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        """What `expert` lays out: gate_up [2F, D] and down [D, F], contiguous, of the wanted dtype, on the device."""
        base = layer_name(self._config, layer, "feed_forward.experts.")
        gate_up_2FD = self._place(self._source.expert(f"{base}gate_up_proj", index).t())
        return gate_up_2FD, self._place(self._source.expert(f"{base}down_proj", index).t())

    def _get(self, name: str) -> Tensor:
        return self._place(self._source.tensor(name))

    def _place(self, tensor: Tensor) -> Tensor:
        placed = tensor.to(device=self._device, dtype=self._dtype).contiguous()
        self._done += placed.nbytes
        if self._done - self._trimmed >= _TRIM_BYTES:
            self._trimmed = self._done
            trim_heap()
        if self._progress is not None:
            self._progress("weights", self._done, self._total)
        return placed
