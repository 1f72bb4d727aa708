"""The Llama 4 text decoder: a function of (layer range, rows). Owns the order of operations; the operations are
kernels', the experts an `ExpertBackend`'s, the pages whoever calls.

Shapes: T tokens of S sequences in one flat batch, D hidden, H query heads, K key/value heads, d head_dim, V vocabulary.
Knows nothing of requests, schedules or processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..kernels.attention_inputs import attention_inputs, rope_table
from ..kernels.grouped_mlp import ExpertWeights
from ..kernels.linear import Linear
from ..kernels.paged_attention import PagedKeys, paged_attention
from ..kernels.rms_norm import add_rms_norm_, rms_norm
from ..kernels.route import combine_, gather_scaled, route
from .config import Llama4Config, rope_frequencies
from .device_experts import DeviceExperts
from .experts import ExpertBackend, ExpertsUnavailable
from .kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class GroupPages:
    """The pages that one page index of one block group gives to a batch."""

    slots_T: Tensor
    """int64 page * B + offset where each token's key and value go."""
    keys: PagedKeys


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces of S sequences, flattened. A piece never crosses an attention-chunk border."""

    ids_T: Tensor
    """int64 token ids."""
    positions_T: Tensor
    """int64 absolute positions."""
    pages: dict[tuple[bool, int], GroupPages]
    """(local group?, page of the block) -> pages; they also say which rows belong to which sequence."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    qkv: Linear
    """D -> (H + 2K) d"""
    output: Linear
    """H d -> D"""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer without its routed experts."""

    input_norm_D: Tensor
    attention: AttentionWeights
    mlp_norm_D: Tensor
    mlp: ExpertWeights
    """The dense MLP, or the shared expert."""
    router: Linear | None
    """D -> E; None in dense layers."""


class Decoder:
    """Weights and shape of the model; runs any number of times, in one thread."""

    def __init__(
        self,
        config: Llama4Config,
        *,
        embedding_VD: Tensor,
        layers: list[LayerWeights],
        norm_D: Tensor,
        head: Linear,
        experts: ExpertBackend,
        exact: bool = True,
    ) -> None:
        """`exact`: attention gives a row the same bits whatever else is in its batch and however its sequence was cut
        into pieces."""
        self.config = config
        self.experts = experts
        self._embedding_VD = embedding_VD
        self.layers = layers
        self._norm_D = norm_D
        self.head = head
        rows = config.attention_chunk_size or config.max_position_embeddings
        rows = min(rows, config.max_position_embeddings)
        self._rope_R = rope_table(rope_frequencies(config), rows).to(embedding_VD.device)
        self._scale = config.head_dim**-0.5
        self._exact = exact

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding_VD.device

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KvCache) -> Tensor:
        """Run the batch through all layers, writing its keys and values to `cache`. Returns the normalised hidden
        states [T, D]; `logits` turns rows of them into logits. Raises ExpertsUnavailable with the tokens that lack an
        expert; what was written to the cache by then is of no use to anybody."""
        return self._interleave([batch], cache)[0]

    @torch.inference_mode()
    def forward_interleaved(self, batches: Sequence[Batch], cache: KvCache) -> list[Tensor]:
        """`forward` of several batches that share no sequence, layer by layer in turns, so that one computes its
        attention while the experts of the others are under way. The tokens of ExpertsUnavailable are counted through
        all batches."""
        return self._interleave(batches, cache)

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, D] -> [S, V] in the model dtype."""
        return self.head(hidden_SD)

    def _interleave(self, batches: Sequence[Batch], cache: KvCache) -> list[Tensor]:
        firsts = accumulate((len(batch.ids_T) for batch in batches), initial=0)
        turns = deque(self._run(batch, cache, first) for batch, first in zip(batches, firsts, strict=False))
        hidden = []
        try:
            while turns:
                run = turns.popleft()
                try:
                    next(run)
                    turns.append(run)
                except StopIteration as end:  # in order, since each batch has as many turns
                    hidden.append(end.value)
        finally:
            self.experts.abandon()
        return hidden

    def _run(self, batch: Batch, cache: KvCache, first_token: int) -> Generator[None, None, Tensor]:
        """All layers for one batch; pauses whenever its experts are under way. Returns the hidden states [T, D]."""
        eps = self.config.rms_norm_eps
        residual_TD = functional.embedding(batch.ids_T, self._embedding_VD)
        rows_T = batch.positions_T % self._rope_R.shape[0]
        q_scale_T = self._temperature(batch.positions_T)
        delta_TD = None
        for i, layer in enumerate(self.layers):
            if delta_TD is None:
                x_TD = rms_norm(residual_TD, layer.input_norm_D, eps)
            else:
                x_TD = add_rms_norm_(residual_TD, delta_TD, layer.input_norm_D, eps)
            delta_TD = self._attention(i, x_TD, batch, cache, rows_T, q_scale_T)
            x_TD = add_rms_norm_(residual_TD, delta_TD, layer.mlp_norm_D, eps)
            delta_TD = yield from self._feed_forward(i, x_TD, first_token)
        assert delta_TD is not None
        return add_rms_norm_(residual_TD, delta_TD, self._norm_D, eps)

    def _attention(
        self, index: int, x_TD: Tensor, batch: Batch, cache: KvCache, rows_T: Tensor, q_scale_T: Tensor | None
    ) -> Tensor:
        config, weights = self.config, self.layers[index].attention
        place = cache.places[index]
        pages = batch.pages[place.local, place.page_of_block]
        k_pages, v_pages = cache.layer(index)
        rope = index in config.rope_layers
        q_THd = attention_inputs(
            weights.qkv(x_TD),
            k_pages,
            v_pages,
            pages.slots_T,
            num_heads=config.num_heads,
            table_R=self._rope_R if rope else None,
            rows_T=rows_T if rope else None,
            q_scale_T=None if rope else q_scale_T,
            qk_norm_eps=config.rms_norm_eps if rope and config.use_qk_norm else None,
        )
        out_THd = paged_attention(q_THd, k_pages, v_pages, pages.keys, self._scale, exact=self._exact)
        return weights.output(out_THd.view(x_TD.shape[0], -1))

    def _feed_forward(self, index: int, x_TD: Tensor, first_token: int) -> Generator[None, None, Tensor]:
        layer = self.layers[index]
        if layer.router is None:
            return layer.mlp(x_TD)
        experts, k = self.experts, self.config.experts_per_token
        if isinstance(experts, DeviceExperts):
            return experts.feed_forward(index, x_TD, layer.router(x_TD), k, layer.mlp(x_TD))
        plan = route(layer.router(x_TD), k)
        pending = experts.dispatch(index, gather_scaled(x_TD, plan), plan.counts_E)
        shared_TD = layer.mlp(x_TD)
        yield
        try:
            rows_ND = experts.collect(pending)
        except ExpertsUnavailable as error:
            tokens = {first_token + int(plan.tokens_N[row]) for row in error.rows}
            assert tokens, "no row lacks an expert"
            raise ExpertsUnavailable(error.message, sorted(tokens)) from error
        return combine_(shared_TD, rows_ND, plan)

    def _temperature(self, positions_T: Tensor) -> Tensor | None:
        """t(p) = 1 + attn_scale ln(1 + floor((p + 1) / floor_scale)), the factor of q in NoPE layers; None where it is
        1 throughout."""
        config = self.config
        if not config.attn_temperature_tuning:
            return None
        steps_T = torch.floor((positions_T + 1).double() / config.floor_scale)
        return (1 + config.attn_scale * torch.log1p(steps_T)).float()
