"""The `quantization_config` of a `config.json`, in the words of compressed-tensors: what it says of a model, and how to
say it. Knows names, not tensors: sizes and dummy weights follow what is said here, real ones what lies in the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint_error import CheckpointError
from .quantization import SCHEMES, Part, QuantKind, Recipe, Scheme, part_of
from .tensor_names import layer_name, layer_of, text_tensors, top_name

if TYPE_CHECKING:
    from .config import Llama4Config

_KINDS: Mapping[tuple[Any, Any], QuantKind] = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}
_FORMATS: Mapping[QuantKind, str] = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
_STRATEGIES = ("channel", "group", "tensor")
_UNORDERED = (None, False, "weight", "static")
"""Kinds of `actorder` that leave input channels where they are."""


def declared_scheme(declared: Any, config: Llama4Config) -> Scheme | None:
    """What `declared` (the `quantization_config`, None if absent) says of each part of the model, by most of the layers
    that it quantises. Raises CheckpointError for what Herd cannot compute with, and says what that is."""
    if declared is None:
        return None
    if not isinstance(declared, Mapping) or not isinstance(declared.get("config_groups"), Mapping | None):
        raise CheckpointError("quantization_config holds no object with config_groups")
    if (method := declared.get("quant_method")) != "compressed-tensors":
        raise CheckpointError(f"quantization_config: quant_method is {method!r}; Herd reads compressed-tensors")
    if declared.get("kv_cache_scheme"):
        raise CheckpointError("quantization_config: kv_cache_scheme is set; quantised KV caches are not supported")
    groups = [(_targets(group), _recipe(name, group)) for name, group in (declared.get("config_groups") or {}).items()]
    ignored = _strings(declared.get("ignore"))
    found: dict[Part, dict[int | None, list[Recipe]]] = {}
    for module in _linear_modules(config):
        part = part_of(module)
        if part is Part.PLAIN or _matches(module, ignored, config):
            continue
        recipe = next((recipe for targets, recipe in groups if _matches(module, targets, config)), None)
        if recipe is not None:
            found.setdefault(part, {}).setdefault(layer_of(module), []).append(recipe)
    if not found:
        return None
    recipes: dict[str, Recipe] = {}
    for part, layers in found.items():
        kinds: list[QuantKind] = [of_layer[0].kind for of_layer in layers.values()]
        kind = Counter(kinds[1:-1] or kinds).most_common(1)[0][0]
        recipes[part.name.lower()] = _together(kind, layers.values())
        if part is Part.ROUTED and kinds[0] == kinds[-1] != kind:
            recipes["ends"] = _together(kinds[0], layers.values())
    return Scheme("+".join(sorted({recipe.kind for recipe in recipes.values()})), **recipes)


def _together(kind: QuantKind, layers: Iterable[list[Recipe]]) -> Recipe:
    """One recipe for modules of several widths: it has the groups of all of them."""
    groups = {group for of_layer in layers for recipe in of_layer if recipe.kind == kind for group in recipe.groups}
    ours = SCHEMES["int4"].routed
    assert ours is not None
    return Recipe(kind, tuple(sorted(groups, reverse=True)), ours.fewest if kind == "int4" else 1)


def quantization_config(scheme: Scheme, config: Llama4Config) -> dict[str, Any]:
    """What `config.json` is to say of a checkpoint in `scheme`. Raises CheckpointError for widths that no group
    divides."""
    groups: dict[tuple[QuantKind, int | None], list[str]] = {}
    ignore = [f"{_layers(config)}feed_forward\\.router$", r"re:^vision_model\..*", r"re:^multi_modal_projector\..*"]
    for name, target, num_in in _targets_of(scheme, config):
        recipe = scheme.recipe(name, config)
        if recipe is None:
            ignore.append(target)
            continue
        group = recipe.group(name, num_in)
        groups.setdefault((recipe.kind, group if group < num_in else None), []).append(target)
    formats = sorted({_FORMATS[kind] for kind, _ in groups})
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": _group(kind, group, targets)
            for number, ((kind, group), targets) in enumerate(groups.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(kind: QuantKind, group: int | None, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "mse" if kind == "int4" else "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": _FORMATS[kind],
    }


def _layers(config: Llama4Config, layers: Collection[int] | None = None) -> str:
    """The beginning of a pattern for modules of any of `layers`, or of any layer."""
    numbers = r"\d+" if layers is None else f"({'|'.join(map(str, sorted(layers)))})"
    return rf"re:^{re.escape(config.tensor_prefix)}model\.layers\.{numbers}\."


def _targets_of(scheme: Scheme, config: Llama4Config) -> Iterator[tuple[str, str, int]]:
    """(name of one of the modules, pattern of all of them, input channels) of all that a scheme treats alike."""
    D, F = config.hidden_size, config.expert_width
    first = layer_name(config, 0, "self_attn.")
    yield f"{first}q_proj", rf"{_layers(config)}self_attn\.[qkv]_proj$", D
    yield f"{first}o_proj", rf"{_layers(config)}self_attn\.o_proj$", config.num_heads * config.head_dim
    ends = {min(config.moe_layers), max(config.moe_layers)} if config.moe_layers and scheme.ends is not None else set()
    for layers in (config.moe_layers - ends, ends):
        for where, pattern in (("experts.0.", r"experts\.\d+\."), ("shared_expert.", r"shared_expert\.")):
            yield from _mlp(config, layers, where, pattern, D, F)
    yield from _mlp(config, set(range(config.num_layers)) - config.moe_layers, "", "", D, config.dense_width)
    yield top_name(config, "lm_head"), rf"re:^{re.escape(config.tensor_prefix)}lm_head$", D


def _mlp(
    config: Llama4Config, layers: Collection[int], where: str, pattern: str, D: int, width: int
) -> Iterator[tuple[str, str, int]]:
    if layers:
        some, start = layer_name(config, min(layers), f"feed_forward.{where}"), _layers(config, layers)
        yield f"{some}gate_proj", rf"{start}feed_forward\.{pattern}(gate|up)_proj$", D
        yield f"{some}down_proj", rf"{start}feed_forward\.{pattern}down_proj$", width


def _recipe(name: str, group: Any) -> Recipe:
    """Of one config group."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"quantization_config: {name}: {reason}")

    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise refuse("it quantises no weights")
    kind = _KINDS.get((weights.get("type", "int"), weights.get("num_bits", 8)))
    if kind is None:
        raise refuse(f"weights of type {weights.get('type')!r} with {weights.get('num_bits')} bits are not supported")
    if weights.get("symmetric", True) is not True:
        raise refuse("asymmetric weights (zero points) are not supported")
    if weights.get("actorder") not in _UNORDERED:
        raise refuse(f"actorder {weights['actorder']!r} (input channels in another order) is not supported")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in _STRATEGIES:
        raise refuse(f"strategy {strategy!r} is not supported; {', '.join(_STRATEGIES)} are")
    if group.get("output_activations"):
        raise refuse("quantised output activations are not supported")
    activations = group.get("input_activations")
    if activations and activations.get("dynamic") is not True:
        raise refuse("static scales of activations are not supported")
    size = weights.get("group_size")
    return Recipe(kind, (int(size),) if strategy == "group" and size else ())


def _targets(group: Any) -> tuple[str, ...]:
    if not isinstance(group, Mapping):
        raise CheckpointError("quantization_config: a config group holds no object")
    return _strings(group.get("targets"))


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _linear_modules(config: Llama4Config) -> Iterator[str]:
    """Modules of a released, quantised checkpoint: the first expert stands for its layer."""
    for name, shape in text_tensors(config).items():
        if name.endswith(".experts.gate_up_proj"):
            yield f"{name.removesuffix('gate_up_proj')}0.gate_proj"
        elif name.endswith(".experts.down_proj"):
            yield f"{name.removesuffix('down_proj')}0.down_proj"
        elif len(shape) == 2:
            yield name.removesuffix(".weight")
    if config.tie_word_embeddings:
        yield f"{config.tensor_prefix}lm_head"


def _matches(module: str, targets: tuple[str, ...], config: Llama4Config) -> bool:
    """Whether one of `targets` means the module: a class, its name, or a pattern of names."""
    names = (module, module.removeprefix(config.tensor_prefix))
    for target in targets:
        if target == "Linear" or target in names:
            return True
        if target.startswith("re:"):
            try:
                if any(re.match(target[3:], name) for name in names):
                    return True
            except re.error as error:
                raise CheckpointError(f"quantization_config: {target!r} is no pattern: {error}") from error
    return False
