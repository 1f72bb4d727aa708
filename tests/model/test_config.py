from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from herd.model.config import ConfigError, Llama4Config, RopeScaling, load_config, parse_config, rope_frequencies
from herd.model.presets import PRESETS
from herd.model.tensor_names import text_tensors

from ..tiny_models import tiny_config

TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> Llama4Config:
    return parse_config(TEXT | changes)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("scout", 107_769_861_120, 17_172_894_720),
        ("maverick", 400_711_848_960, 17_184_691_200),
        ("behemoth", 1_978_826_766_336, 287_683_393_536),
    ],
)
def test_parameters_of_the_released_models(name: str, total: int, active: int) -> None:
    config = parse_config(PRESETS[name].config)
    assert config.num_parameters == total
    assert config.num_active_parameters == active


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [range(4), (1, 3), ()])
def test_parameters_are_those_of_the_tensors(tied: bool, moe: range) -> None:
    config = tiny_config(tie_word_embeddings=tied, moe_layers=frozenset(moe))
    total = 0
    for shape in text_tensors(config).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    assert config.num_parameters == total


def test_layers_of_the_released_models() -> None:
    scout, maverick = (parse_config(PRESETS[name].config) for name in ("scout", "maverick"))
    nope = set(range(3, 48, 4))
    assert scout.rope_layers == maverick.rope_layers == set(range(48)) - nope
    assert scout.moe_layers == set(range(48))
    assert maverick.moe_layers == set(range(1, 48, 2))
    assert scout.num_local_layers == 36
    assert (scout.use_qk_norm, maverick.use_qk_norm) == (True, False)
    assert scout.rope_scaling == RopeScaling(**{k: v for k, v in LLAMA3.items() if k != "rope_type"})
    assert maverick.rope_scaling is None
    assert scout.tensor_prefix == "language_model."


def test_both_dialects_say_the_same() -> None:
    old = parse(rope_theta=10000.0, rope_scaling=LLAMA3, torch_dtype="float32", attn_temperature_tuning=4)
    new = parse(rope_parameters=LLAMA3 | {"rope_theta": 10000.0}, dtype="float32", attn_temperature_tuning=True)
    assert old == new
    assert (old.rope_theta, old.dtype, old.attn_temperature_tuning) == (10000.0, "float32", True)
    plain_old = parse(rope_theta=10000.0, rope_scaling=None)
    plain_new = parse(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert plain_old == plain_new
    assert plain_old.rope_scaling is None


def test_a_multimodal_config_holds_the_text_config() -> None:
    text_only, text = parse(), {k: v for k, v in TEXT.items() if k != "model_type"}
    both = parse_config(
        {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 8}, "eos_token_id": [7]}
    )
    assert both.multimodal
    assert both.eos_token_ids == (7,)
    assert both.model_copy(update={"multimodal": False, "eos_token_ids": ()}) == text_only


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0, 1, 2, 4, 5, 6}),
        ({"no_rope_layers": []}, {0, 1, 2, 4, 5, 6}),
        ({"no_rope_layers": None}, {0, 1, 2, 4, 5, 6}),
        ({"no_rope_layer_interval": 3}, {0, 1, 3, 4, 6, 7}),
        ({"no_rope_layers": [0, 1, 0, 0, 1, 1, 1, 0]}, {1, 4, 5, 6}),
        ({"no_rope_layers": [0] * 8}, set()),
    ],
)
def test_one_in_no_rope_layers_means_rope(changes: dict[str, Any], expected: set[int]) -> None:
    assert parse(**changes).rope_layers == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set(range(8))),
        ({"interleave_moe_layer_step": 2}, {1, 3, 5, 7}),
        ({"interleave_moe_layer_step": 3}, {2, 5}),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0, 6]}, {0, 6}),
        ({"moe_layers": []}, set()),
    ],
)
def test_moe_layers(changes: dict[str, Any], expected: set[int]) -> None:
    assert parse(**changes).moe_layers == expected


def test_without_chunks_no_layer_is_local() -> None:
    config = parse(attention_chunk_size=None)
    assert config.num_local_layers == 0
    assert config.rope_layers
    assert parse().attention_chunk_size == 8192


def test_end_ids_come_from_the_generation_config_first() -> None:
    assert parse_config(TEXT | {"eos_token_id": 2}).eos_token_ids == (2,)
    assert parse_config(TEXT | {"eos_token_id": 2}, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert parse_config(TEXT | {"eos_token_id": [2, 3]}, {"temperature": 0.6}).eos_token_ids == (2, 3)
    assert parse().eos_token_ids == ()


def test_unknown_keys_are_ignored() -> None:
    extra = {"for_llm_compressor": False, "cache_implementation": "hybrid", "router_aux_loss_coef": 0.001}
    assert parse(**extra) == parse()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"num_attention_heads": 0, "head_dim": None}, "zero"),
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"moe_layers": [8]}, "moe_layers"),
        ({"moe_layers": [-1]}, "moe_layers"),
        ({"moe_layers": 3}, "int"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": -1}}, "factor"),
        ({"rope_scaling": "llama3"}, "config.json"),
        ({"rope_theta": "half a million"}, "half a million"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types"),
        ({"layer_types": ["full_attention"] * 8}, "layer_types"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(**changes)


def test_layer_types_may_repeat_what_is_known() -> None:
    types = ["full_attention" if i % 4 == 3 else "chunked_attention" for i in range(8)]
    assert parse(layer_types=types) == parse()


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama4"', '{"model_type": "llama4", "text_config": null}'])
def test_a_file_that_is_no_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
    with pytest.raises(ConfigError, match="absent"):
        load_config(tmp_path / "absent.json")


def test_a_file_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TEXT | {"eos_token_id": [1, 2]}))
    assert load_config(path, {"eos_token_id": 3}) == parse(eos_token_id=3)


def test_frequencies_of_scout_instruct() -> None:
    """Pairs 0 to 34 untouched, 35 to 63 divided by 16, and no division by the empty middle band."""
    config = parse_config(PRESETS["scout"].config)
    plain = rope_frequencies(config.model_copy(update={"rope_scaling": None}))
    assert plain == pytest.approx([500000.0 ** (-2 * j / 128) for j in range(64)])
    ratios = [p / f for p, f in zip(plain, rope_frequencies(config), strict=True)]
    assert ratios == pytest.approx([1.0] * 35 + [16.0] * 29)


def test_frequencies_of_scout_base() -> None:
    """Factor 8 between 1 and 4: 0 to 28 untouched, 29 to 34 blended, 35 to 63 divided by 8."""
    config = parse_config(PRESETS["scout"].config)
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    base = config.model_copy(update={"rope_scaling": scaling})
    plain = rope_frequencies(config.model_copy(update={"rope_scaling": None}))
    ratios = [p / f for p, f in zip(plain, rope_frequencies(base), strict=True)]
    assert ratios[:29] == pytest.approx([1.0] * 29)
    assert ratios[35:] == pytest.approx([8.0] * 29)
    assert all(1 < a < b < 8 for a, b in pairwise(ratios[29:35]))
