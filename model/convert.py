"""Writes a quantised copy of a checkpoint: weight by weight, so that memory holds one expert or tensor at a time, and
into a folder of its own that takes its name when all is written. Knows files and schemes; nothing of devices."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.quantized import NotFinite, quantize
from .checkpoint import WeightSource
from .checkpoint_error import CheckpointError
from .checkpoint_writer import SafetensorsWriter
from .compressed_tensors import TensorSpec, write, written_tensors
from .config import Llama4Config, parse_config
from .heap import trim_heap
from .quantization import Part, Recipe, Scheme, part_of, served_scheme
from .quantization_config import quantization_config
from .replaced_folder import replaced_folder
from .served_model import open_weights
from .source import ModelSource
from .stored_weights import StoredWeights, Weight
from .tensor_names import is_vision_tensor, layer_of, text_tensors, top_name

Progress = Callable[[str, int, int], None]
"""(stage, bytes written, bytes in all)"""

SHARD_BYTES = 2_000_000_000
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "MODEL_CARD*",
)
"""Files of a checkpoint that its copy needs, too, and its terms."""
VISION = "vision"


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote."""

    sizes: dict[str, tuple[int, int]]
    """Bytes before and after, by kind of weight."""
    files: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tensors that are made together."""

    part: str
    bytes_before: int
    specs: Mapping[str, TensorSpec]
    make: Callable[[], Iterator[tuple[str, Tensor]]]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(spec.shape) * spec.dtypes[0].itemsize for spec in self.specs.values())


def convert(
    source: ModelSource,
    out: Path,
    quantize: str,
    *,
    dtype: str = "auto",
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Converted:
    """Write the model into the new folder `out` in the scheme named `quantize`, in the layouts of compressed-tensors.

    `dtype`: of the weights that stay plain; "auto" leaves each as it is. `seed`: of dummy weights. `force` replaces a
    checkpoint at `out`. Raises CheckpointError (what is wrong with the input, or why `out` cannot be written) and
    ConfigError; then nothing is left behind.
    """
    config = parse_config(source.config_json, source.generation_json)
    scheme = served_scheme(quantize, config)
    quantization_config(scheme, config)  # says what cannot be done, before anything is written
    weights = open_weights(source, config, seed)
    try:
        stored = StoredWeights(weights, config)
        if stored.quantized:
            raise CheckpointError(f"{weights} is quantised already; convert the original")
        plain = None if dtype == "auto" else getattr(torch, dtype)
        units = list(_Planner(weights, stored, config, scheme, plain).units())
        with replaced_folder(out, force=force, keep=source.directory) as folder:
            total = sum(unit.num_bytes for unit in units)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise CheckpointError(
                    f"the copy takes {total / 1e9:.1f} GB and {out.parent} has {free / 1e9:.1f} GB free"
                )
            files = _write_shards(folder, units, shard_bytes, total, progress or (lambda stage, done, total: None))
            _write_rest(folder, source, config, scheme, dtype)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    finally:
        weights.close()
    sizes: dict[str, tuple[int, int]] = {}
    for unit in units:
        before, after = sizes.get(unit.part, (0, 0))
        sizes[unit.part] = before + unit.bytes_before, after + unit.num_bytes
    return Converted(sizes, files)


class _Planner:
    """Which tensors the copy has, in the order of the original."""

    def __init__(
        self,
        source: WeightSource,
        stored: StoredWeights,
        config: Llama4Config,
        scheme: Scheme,
        dtype: torch.dtype | None,
    ) -> None:
        self._source, self._stored = source, stored
        self._config, self._scheme, self._dtype = config, scheme, dtype

    def units(self) -> Iterator[_Unit]:
        shapes = text_tensors(self._config)
        for name, shape in shapes.items():
            if name.endswith(".experts.gate_up_proj"):
                yield from self._experts(name.removesuffix("gate_up_proj"), shape[0])
            elif part_of(name) is Part.ROUTED:
                continue  # beside its gate and up
            elif self._scheme.recipe(name, self._config) is None:
                yield self._copy(name, part_of(name))
            else:
                module = name.removesuffix(".weight")
                size = (shape[0], shape[1])
                yield self._quantized(module, size, lambda module=module: self._stored.linear(module))
        if self._config.tie_word_embeddings and self._scheme.head is not None:
            table = top_name(self._config, "model.embed_tokens.weight")
            head = top_name(self._config, "lm_head")
            size = (self._config.vocab_size, self._config.hidden_size)
            yield self._quantized(head, size, lambda: self._stored.plain(table), bytes_before=0)
        for name in self._source.names():
            if is_vision_tensor(name):
                yield self._copy(name, VISION)

    def _copy(self, name: str, part: str) -> _Unit:
        shape, dtype = self._source.shape(name), self._source.dtype(name)
        wanted = self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

        def make() -> Iterator[tuple[str, Tensor]]:
            yield name, self._source.tensor(name)

        return _Unit(part, math.prod(shape) * dtype.itemsize, {name: TensorSpec(shape, (wanted,))}, make)

    def _quantized(
        self, module: str, shape: tuple[int, int], read: Callable[[], Weight], bytes_before: int | None = None
    ) -> _Unit:
        def make() -> Iterator[tuple[str, Tensor]]:
            yield from self._tensors(module, read())

        if bytes_before is None:
            bytes_before = math.prod(shape) * self._source.dtype(f"{module}.weight").itemsize
        return _Unit(part_of(module), bytes_before, written_tensors(module, shape, self._recipe(module)), make)

    def _experts(self, base: str, count: int) -> Iterator[_Unit]:
        """The routed experts of one layer, apart."""
        layer = layer_of(base)
        assert layer is not None
        D, F = self._config.hidden_size, self._config.expert_width
        shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
        before = 3 * D * F * self._stored.expert_dtype(layer).itemsize
        for index in range(count):
            specs: dict[str, TensorSpec] = {}
            for name, shape in shapes.items():
                module = f"{base}{index}.{name}"
                specs |= written_tensors(module, shape, self._recipe(module))

            def make(index: int = index) -> Iterator[tuple[str, Tensor]]:
                gate_up, down = self._stored.expert(layer, index)
                if len(gate_up) == 1:
                    (both,) = gate_up.values()
                    assert isinstance(both, Tensor)
                    gate_up = dict(zip(("gate_proj", "up_proj"), both.chunk(2), strict=True))
                for name, weight in (gate_up | {"down_proj": down}).items():
                    yield from self._tensors(f"{base}{index}.{name}", weight)

            yield _Unit(Part.ROUTED, before, specs, make)

    def _tensors(self, module: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        recipe = self._recipe(module)
        assert isinstance(weight, Tensor)
        try:
            yield from write(module, quantize(weight, recipe.kind, recipe.group(module, weight.shape[1]))).items()
        except NotFinite as error:
            raise CheckpointError(f"{module} cannot be quantised: {error}") from error

    def _recipe(self, module: str) -> Recipe:
        recipe = self._scheme.recipe(module, self._config)
        assert recipe is not None, "every scheme quantises the routed experts, and the others were asked before"
        return recipe


def _write_shards(folder: Path, units: list[_Unit], shard_bytes: int, total: int, progress: Progress) -> int:
    """Returns the number of files."""
    shards: list[list[_Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.num_bytes
    weight_map: dict[str, str] = {}
    done = 0
    for number, of_shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        specs = {name: spec for unit in of_shard for name, spec in unit.specs.items()}
        shapes = {name: spec.shape for name, spec in specs.items()}
        dtypes = {name: spec.dtypes[0] for name, spec in specs.items()}
        with SafetensorsWriter(folder / file, shapes, dtypes) as writer:
            for unit in of_shard:
                for name, tensor in unit.make():
                    writer.write(name, tensor)
                done += unit.num_bytes
                progress("quantize", done, total)
                trim_heap()
        weight_map |= dict.fromkeys(specs, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(shards)


def _write_rest(folder: Path, source: ModelSource, config: Llama4Config, scheme: Scheme, dtype: str) -> None:
    """config.json, and whatever else a server reads."""
    values = copy.deepcopy(source.config_json)
    text = values.get("text_config", values)
    if config.tie_word_embeddings and scheme.head is not None:  # the head has bytes of its own now
        values["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if dtype != "auto":
        for section in (values, text):
            section.pop("dtype", None)
            section["torch_dtype"] = dtype
    values["quantization_config"] = quantization_config(scheme, config)
    _write_json(folder / "config.json", values)
    if source.generation_json:
        _write_json(folder / "generation_config.json", source.generation_json)
    if source.directory is not None:
        for path in sorted({path for pattern in _COPIED for path in source.directory.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
