"""The shapes of the named models against the published totals."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from herd.model.presets import PRESETS


def parameter_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """(total, active) parameters of the text model, embeddings counted."""
    c = config.get("text_config", config)
    D, V, L = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    E, k = c["num_local_experts"], c["num_experts_per_tok"]
    step = c["interleave_moe_layer_step"]
    moe_layers = len(c.get("moe_layers") or [i for i in range(L) if (i + 1) % step == 0])
    attention = 2 * D * c["head_dim"] * (c["num_attention_heads"] + c["num_key_value_heads"])
    expert = 3 * D * c["intermediate_size"]
    embeddings = V * D * (1 if c["tie_word_embeddings"] else 2)
    moe = moe_layers * (D * E + (E + 1) * expert)
    dense = (L - moe_layers) * 3 * D * c["intermediate_size_mlp"]
    total = embeddings + D + L * (attention + 2 * D) + moe + dense
    return total, total - moe_layers * (E - k) * expert


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("scout", 107_769_861_120, 17_172_894_720),
        ("maverick", 400_711_848_960, 17_184_691_200),
        ("behemoth", 1_978_826_766_336, 287_683_393_536),
        # Active is the dense base it was made from, plus the routers.
        ("pocket", 273_930_048, 134_515_008 + 15 * 8 * 576),
    ],
)
def test_parameter_totals(name: str, total: int, active: int) -> None:
    assert parameter_counts(PRESETS[name].config) == (total, active)


@pytest.mark.parametrize(
    ("name", "total"),
    [("scout", 108_641_793_536), ("maverick", 401_583_781_376), ("behemoth", 1_979_736_447_488)],
)
@pytest.mark.filterwarnings("ignore")
def test_the_library_builds_the_whole_model_with_the_published_total(name: str, total: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4Config(**copy.deepcopy(dict(PRESETS[name].config)))
    with torch.device("meta"):
        model = transformers.Llama4ForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == total
    text = config.text_config
    assert [i for i, uses_rope in enumerate(text.no_rope_layers) if not uses_rope] == list(
        range(3, text.num_hidden_layers, 4)
    )
    assert text.use_qk_norm == (name != "maverick")


def test_only_behemoth_is_assumed_and_says_so() -> None:
    assert [name for name, preset in PRESETS.items() if preset.assumed] == ["behemoth"]
    assert "assumed" in PRESETS["behemoth"].summary
    assert next(iter(PRESETS)) == "pocket"
