"""Would the oracle notice? Each test makes one of the mistakes that implementations of Llama 4 have made, in the
running decoder, and shows that the logits then leave the oracle's by far; two that look like mistakes change nothing.
A sequence is prefilled in pieces past two attention chunks and decoded past two more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels import attention_inputs as inputs_kernel
from herd.kernels.attention_inputs import rope_ref, rope_table
from herd.kernels.paged_attention import PagedKeys, paged_attention
from herd.kernels.route import Route, combine_, gather_scaled, route
from herd.model import decoder as decoder_module
from herd.model.checkpoint import SafetensorsSource
from herd.model.config import rope_frequencies
from herd.model.decoder import Decoder

from ..oracles import TOLERANCE, Oracle
from ..tiny_models import random_ids, sequence_logits

BOTH = ("scout", "maverick")
LARGE = 0.3
"""Three thousand tolerances. Most mistakes move some logit by several standard deviations (1.5)."""
SMALL = 0.01
"""A hundred tolerances: t(p) moves by a tenth at most, in one position of `floor_scale`."""

Change = Callable[[Oracle, pytest.MonkeyPatch], Decoder]


def largest_change(oracle: Oracle, decoder: Decoder) -> float:
    """Largest difference of any logit from the oracle's."""
    ids = random_ids(54, vocab_size=oracle.config.vocab_size, seed=5)
    return (sequence_logits(decoder, ids, piece=7, num_prefill=29) - oracle.logits(ids)).abs().max().item()


def half_split_rope(x_THd: Tensor, table_R: Tensor, rows_T: Tensor) -> Tensor:
    cos, sin = table_R[rows_T][:, None].unbind(-1)
    a, b = x_THd.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def rms(x_THd: Tensor, eps: float, dims: int | tuple[int, ...] = -1) -> Tensor:
    return x_THd * torch.rsqrt(x_THd.pow(2).mean(dims, keepdim=True) + eps)


def inputs_with(mistake: str, eps: float) -> Callable[..., Tensor]:
    """A plain `attention_inputs` with one mistake; with "none" it is right."""

    def norm(x_THd: Tensor) -> Tensor:
        if mistake == "unit L2 norm":
            return torch.nn.functional.normalize(x_THd, dim=-1)
        return rms(x_THd, eps, (-2, -1) if mistake == "norm across heads" else -1)

    def inputs(
        qkv_TN: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slots_T: Tensor,
        *,
        num_heads: int,
        table_R: Tensor | None,
        rows_T: Tensor | None,
        q_scale_T: Tensor | None,
        qk_norm_eps: float | None,
    ) -> Tensor:
        K, B, d = v_pages.shape[1:]
        q, k, v = qkv_TN.view(qkv_TN.shape[0], -1, d).split((num_heads, K, K), dim=1)
        normed = qk_norm_eps is not None
        if table_R is not None:
            assert rows_T is not None
            rope = half_split_rope if mistake == "half-split rope" else rope_ref
            if normed and mistake == "norm before rope":
                q, k = norm(q), norm(k)
            q, k = rope(q, table_R, rows_T), rope(k, table_R, rows_T)
            if normed and mistake != "norm before rope":
                q, k = norm(q), norm(k)
        elif mistake == "norm on NoPE layers too":
            q, k = norm(q), norm(k)
        if q_scale_T is not None:
            factor = q_scale_T[:, None, None]
            q, k = (q, k * factor) if mistake == "t on k" else (q * factor, k)
        k_pages[slots_T // B, :, :, slots_T % B] = k
        v_pages[slots_T // B, :, slots_T % B] = v
        return q.contiguous()

    return inputs


def with_inputs(mistake: str) -> Change:
    def change(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
        monkeypatch.setattr(decoder_module, "attention_inputs", inputs_with(mistake, oracle.config.rms_norm_eps))
        return oracle.decoder

    return change


def with_config(**changes: Any) -> Change:
    return lambda oracle, _: oracle.load(config=oracle.config.model_copy(update=changes))


def toggle_qk_norm(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    return with_config(use_qk_norm=not oracle.config.use_qk_norm)(oracle, monkeypatch)


def sliding_window(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """RoPE layers see their last C keys instead of their chunk."""
    width = oracle.config.attention_chunk_size
    assert width is not None
    seen_rope = []

    def inputs(*args: Any, **kwargs: Any) -> Tensor:
        seen_rope.append(kwargs["table_R"] is not None)
        return inputs_kernel.attention_inputs(*args, **kwargs)

    def attention(
        q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float, *, exact: bool
    ) -> Tensor:
        if not seen_rope[-1]:
            return paged_attention(q_THd, k_pages, v_pages, keys, scale, exact=exact)
        length, B = keys.lens[0], v_pages.shape[2]
        slots = torch.arange(length)
        pages = keys.tables_SN[0].long()[slots // B]
        group = q_THd.shape[1] // v_pages.shape[1]
        k = k_pages[pages, :, :, slots % B].repeat_interleave(group, dim=1)
        v = v_pages[pages, :, slots % B].repeat_interleave(group, dim=1)
        at = torch.arange(length - q_THd.shape[0], length)[:, None]
        hidden = (slots > at) | (slots <= at - width)
        scores = torch.einsum("qhd,nhd->hqn", q_THd, k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqn,nhd->qhd", weights, v).contiguous()

    monkeypatch.setattr(decoder_module, "attention_inputs", inputs)
    monkeypatch.setattr(decoder_module, "paged_attention", attention)
    return oracle.load(config=oracle.config.model_copy(update={"attention_chunk_size": None}))


def temperature_one_late(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """t(p) from p instead of p + 1."""
    right = Decoder._temperature
    monkeypatch.setattr(Decoder, "_temperature", lambda self, positions_T: right(self, positions_T - 1))
    return oracle.decoder


def score_on_output(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setattr(decoder_module, "gather_scaled", lambda x_TD, plan: x_TD[plan.tokens_N.long()])
    monkeypatch.setattr(
        decoder_module,
        "combine_",
        lambda shared_TD, rows_ND, plan: combine_(shared_TD, rows_ND * plan.scores_N[:, None], plan),
    )
    return oracle.decoder


def with_scores(scores_of: Callable[[Tensor, Route], Tensor]) -> Change:
    """Other scores of the same experts: `scores_of(logits, plan)`."""

    def change(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
        def routed(logits_TE: Tensor, k: int) -> Route:
            plan = route(logits_TE, k)
            return replace(plan, scores_N=scores_of(logits_TE, plan))

        monkeypatch.setattr(decoder_module, "route", routed)
        return oracle.decoder

    return change


def softmax_scores(logits_TE: Tensor, plan: Route) -> Tensor:
    experts_N = torch.arange(logits_TE.shape[1]).repeat_interleave(torch.tensor(plan.counts_E))
    return logits_TE.softmax(-1)[plan.tokens_N.long(), experts_N]


def renormalised_scores(logits_TE: Tensor, plan: Route) -> Tensor:
    scores_N = plan.scores_N
    return scores_N / scores_N[plan.rows_TK.long()].sum(1)[plan.tokens_N.long()]


class ChangedSource(SafetensorsSource):
    """A checkpoint of which one kind of tensor reads differently."""

    def __init__(self, oracle: Oracle, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(oracle.directory)
        self._suffix, self._change = suffix, change

    def tensor(self, name: str) -> Tensor:
        tensor = super().tensor(name)
        return self._change(tensor) if name.endswith(self._suffix) else tensor

    def expert(self, name: str, index: int) -> Tensor:
        tensor = super().expert(name, index)
        return self._change(tensor) if name.endswith(self._suffix) else tensor


def with_weights(suffix: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda oracle, _: oracle.load(source=ChangedSource(oracle, suffix, change))


def halves_swapped(gate_up: Tensor) -> Tensor:
    return torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)


def read_as_interleaved(gate_up: Tensor) -> Tensor:
    return torch.cat((gate_up[..., 0::2], gate_up[..., 1::2]), dim=-1)


def tiled_heads(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Query head h reads key/value head h mod K."""
    H, K = oracle.config.num_heads, oracle.config.num_kv_heads
    order = torch.tensor([h for k in range(K) for h in range(k, H, K)])

    def attention(q_THd: Tensor, *args: Any, **settings: Any) -> Tensor:
        out_THd = torch.empty_like(q_THd)
        out_THd[:, order] = paged_attention(q_THd[:, order].contiguous(), *args, **settings)
        return out_THd

    monkeypatch.setattr(decoder_module, "paged_attention", attention)
    return oracle.decoder


def absolute_rope(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Angles of p, from a table as long as the context, instead of p mod C."""
    decoder = oracle.load()
    decoder._rope_R = rope_table(rope_frequencies(oracle.config), oracle.config.max_position_embeddings)
    return decoder


MISTAKES: list[tuple[str, Change, tuple[str, ...], float]] = [
    ("half-split rope", with_inputs("half-split rope"), BOTH, LARGE),
    ("qk norm toggled", toggle_qk_norm, BOTH, LARGE),
    ("unit L2 norm", with_inputs("unit L2 norm"), ("scout",), LARGE),
    ("norm across heads", with_inputs("norm across heads"), ("scout",), LARGE),
    ("norm on NoPE layers too", with_inputs("norm on NoPE layers too"), ("scout",), LARGE),
    ("no llama3 scaling", with_config(rope_scaling=None), ("scout",), LARGE),
    ("no chunking", with_config(attention_chunk_size=None), BOTH, LARGE),
    ("sliding window", sliding_window, BOTH, LARGE),
    ("t(p) with p instead of p + 1", temperature_one_late, BOTH, SMALL),
    ("t on k", with_inputs("t on k"), BOTH, LARGE),
    ("score on expert output", score_on_output, BOTH, LARGE),
    ("softmax instead of sigmoid", with_scores(softmax_scores), BOTH, LARGE),
    ("top-1 renormalised to 1", with_scores(renormalised_scores), BOTH, LARGE),
    ("gate and up swapped", with_weights("experts.gate_up_proj", halves_swapped), BOTH, LARGE),
    ("gate and up interleaved", with_weights("experts.gate_up_proj", read_as_interleaved), BOTH, LARGE),
    ("shared expert missing", with_weights("shared_expert.down_proj.weight", torch.zeros_like), BOTH, LARGE),
    ("heads tiled, not repeated", tiled_heads, BOTH, LARGE),
]
EQUAL: list[tuple[str, Change]] = [
    ("the test's own plain inputs", with_inputs("none")),
    ("norm before rope", with_inputs("norm before rope")),
    ("rope at p instead of p mod C", absolute_rope),
]


@pytest.mark.parametrize(
    ("form", "change", "at_least"),
    [
        pytest.param(form, change, at_least, id=f"{name}-{form}")
        for name, change, forms, at_least in MISTAKES
        for form in forms
    ],
)
def test_a_mistake_is_noticed(
    form: str,
    change: Change,
    at_least: float,
    oracles: Callable[[str], Oracle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    oracle = oracles(form)
    assert largest_change(oracle, change(oracle, monkeypatch)) > at_least


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("change", [change for _, change in EQUAL], ids=[name for name, _ in EQUAL])
def test_no_mistake(
    form: str, change: Change, oracles: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = oracles(form)
    assert largest_change(oracle, change(oracle, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("form", BOTH)
def test_the_sequence_is_right_without_a_mistake(form: str, oracles: Callable[[str], Oracle]) -> None:
    oracle = oracles(form)
    assert gather_scaled is decoder_module.gather_scaled
    assert largest_change(oracle, oracle.decoder) < TOLERANCE
