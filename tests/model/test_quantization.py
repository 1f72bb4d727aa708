"""Which weight gets which number format, what config.json says of it, and how many bytes that makes."""

from __future__ import annotations

from typing import Any

import pytest

from herd.model.checkpoint_error import CheckpointError
from herd.model.config import Llama4Config, parse_config
from herd.model.presets import PRESETS
from herd.model.quantization import (
    SCHEMES,
    Part,
    Recipe,
    Scheme,
    expert_sizes,
    part_of,
    served_scheme,
    weight_sizes,
)
from herd.model.quantization_config import declared_scheme, quantization_config
from herd.model.tensor_names import text_tensors

from ..tiny_models import tiny_config

SCOUT = parse_config(dict(PRESETS["scout"].config))
MAVERICK = parse_config(dict(PRESETS["maverick"].config))
POCKET = parse_config(dict(PRESETS["pocket"].config))


def test_every_weight_has_its_part() -> None:
    parts = {name.rpartition("layers.1.")[2]: part_of(name) for name in text_tensors(MAVERICK)}
    assert parts["feed_forward.experts.down_proj"] is Part.ROUTED
    assert parts["feed_forward.shared_expert.up_proj.weight"] is Part.SHARED
    assert parts["feed_forward.router.weight"] is Part.PLAIN
    assert parts["self_attn.o_proj.weight"] is Part.ATTENTION
    assert parts["input_layernorm.weight"] is Part.PLAIN
    assert part_of("language_model.model.layers.0.feed_forward.gate_proj") is Part.DENSE
    assert part_of("language_model.lm_head.weight") is Part.HEAD
    assert part_of("language_model.model.embed_tokens.weight") is Part.PLAIN


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, POCKET], ids=["scout", "maverick", "pocket"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_router_norms_and_embedding_are_never_quantised(config: Llama4Config, scheme: str) -> None:
    for name in text_tensors(config):
        if any(word in name for word in ("router", "norm", "embed")):
            assert SCHEMES[scheme].recipe(name, config) is None


def test_int4_spares_the_first_and_the_last_experts() -> None:
    kinds: dict[int, set[str]] = {}
    for name in text_tensors(MAVERICK):
        if "expert" in name and (recipe := SCHEMES["int4"].recipe(name, MAVERICK)):
            kinds.setdefault(int(name.split("layers.")[1].split(".")[0]), set()).add(recipe.kind)
    assert {layer for layer, of_layer in kinds.items() if of_layer == {"int8"}} == {1, 47}
    assert all(of_layer == {"int4"} for layer, of_layer in kinds.items() if layer not in (1, 47))


@pytest.mark.parametrize(("num_in", "group"), [(5120, 128), (8192, 128), (2048, 128), (1024, 64), (576, 32), (768, 32)])
def test_narrow_weights_have_narrow_groups(num_in: int, group: int) -> None:
    recipe = SCHEMES["int4"].routed
    assert recipe is not None
    assert recipe.group("x", num_in) == group


def test_widths_that_no_group_divides() -> None:
    with pytest.raises(CheckpointError, match="x has 40 input channels"):
        Recipe("int4", (128, 64, 32)).group("x", 40)
    with pytest.raises(CheckpointError, match="24 input channels"):
        weight_sizes(tiny_config(num_layers=6, moe_layers=frozenset(range(6))), SCHEMES["int4"], 2)
    assert Recipe("int8").group("x", 40) == Recipe("int8", (128, 64, 32, 0)).group("x", 40) == 40


def test_sizes_are_those_of_the_arithmetic() -> None:
    for config in (SCOUT, MAVERICK, POCKET):
        assert sum(weight_sizes(config, SCHEMES["none"], 2).values()) == 2 * config.num_parameters
    expert = 3 * 5120 * 8192
    int8 = expert + 4 * (2 * 8192 + 5120)
    int4 = expert // 2 + 2 * expert // 128
    fine = expert + 4 * expert // 128
    assert expert_sizes(SCOUT, SCHEMES["int8"], 2) == dict.fromkeys(range(48), int8)
    assert expert_sizes(SCOUT, SCHEMES["int4"], 2) == dict.fromkeys(range(48), int4) | {0: fine, 47: fine}
    sizes = weight_sizes(SCOUT, SCHEMES["int4"], 2)
    assert sizes[Part.ROUTED] == 16 * (46 * int4 + 2 * fine)
    assert sizes[Part.SHARED] == 46 * int4 + 2 * fine
    assert sum(sizes.values()) < 64e9, "Scout has to fit one GPU of 80 GB"
    tied = weight_sizes(POCKET, SCHEMES["int8"], 2)
    assert tied[Part.HEAD] == 49152 * 576 + 4 * 49152


def config_of(groups: Any, **more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": groups, **more}


def fp8_group(**weights: Any) -> dict[str, Any]:
    known = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": known | weights, "input_activations": activations}


RELEASED = config_of(
    {"group_0": fp8_group()},
    ignore=[
        "re:.*feed_forward.(gate|up|down)_proj",
        *(
            f"re:.*{name}"
            for name in ("self_attn", "lm_head", "shared_expert", "router", "vision_model", "multi_modal_projector")
        ),
    ],
    kv_cache_scheme=None,
)
"""Routed experts of Maverick alone."""


def test_the_released_configuration_is_understood() -> None:
    scheme = declared_scheme(RELEASED, MAVERICK)
    assert scheme == Scheme("fp8", routed=Recipe("fp8"))
    raw = dict(PRESETS["maverick"].config) | {"quantization_config": RELEASED}
    assert parse_config(raw).quantization == scheme
    assert parse_config(dict(PRESETS["maverick"].config)).quantization is None


def test_a_community_configuration_is_understood() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    scheme = declared_scheme(config_of(groups, ignore=["language_model.lm_head"]), SCOUT)
    assert scheme is not None
    assert scheme.head is None
    assert scheme.routed == scheme.attention == Recipe("int4", (128,), fewest=16)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        (config_of({}, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (config_of({"g": fp8_group(num_bits=4)}), "g: .*4 bits"),
        (config_of({"g": fp8_group(symmetric=False)}), "g: .*zero points"),
        (config_of({"g": fp8_group(actorder="group")}), "g: actorder 'group'"),
        (config_of({"g": fp8_group(strategy="block")}), "g: strategy 'block'"),
        (config_of({"g": fp8_group() | {"input_activations": {"dynamic": False}}}), "g: static"),
        (config_of({"g": {"targets": ["Linear"]}}), "g: it quantises no weights"),
        (config_of({"g": fp8_group() | {"targets": ["re:("]}}), "no pattern"),
        (config_of({"g": 3}), "no object"),
        ([], "no object"),
    ],
)
def test_what_cannot_be_computed_is_refused(declared: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        declared_scheme(declared, SCOUT)
    with pytest.raises(CheckpointError, match=message):
        parse_config(dict(PRESETS["scout"].config) | {"quantization_config": declared})


FEW = SCOUT.model_copy(update={"num_layers": 4, "moe_layers": frozenset(range(4))})


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, POCKET, FEW], ids=["scout", "maverick", "pocket", "four layers"])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_what_a_copy_says_of_itself_is_what_it_is(config: Llama4Config, name: str) -> None:
    """Its sizes come out as those of the scheme, layer by layer."""
    scheme = SCHEMES[name]
    config = config.model_copy(update={"tie_word_embeddings": False})
    said = declared_scheme(quantization_config(scheme, config), config)
    assert said is not None
    assert weight_sizes(config, said, 2) == weight_sizes(config, scheme, 2)
    assert expert_sizes(config, said, 2) == expert_sizes(config, scheme, 2)


def test_what_is_quantised_is_not_quantised_again() -> None:
    quantised = SCOUT.model_copy(update={"quantization": SCHEMES["fp8"]})
    assert served_scheme("auto", SCOUT) == served_scheme("none", SCOUT) == SCHEMES["none"]
    assert served_scheme("int4", SCOUT) == SCHEMES["int4"]
    assert served_scheme("auto", quantised) == SCHEMES["fp8"]
    assert served_scheme("none", quantised) == SCHEMES["none"]
    with pytest.raises(CheckpointError, match=r"already \(fp8\).*int4.*--quantize auto"):
        served_scheme("int4", quantised)
