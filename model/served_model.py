"""What serving one model needs beside its weights: shape, tokenizer, stop ids and the ids that may never be drawn.
Reads the files of a `ModelSource`; knows nothing of processes or requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .byte_tokenizer import byte_tokenizer
from .checkpoint import DummySource, SafetensorsSource, WeightSource
from .config import Llama4Config, parse_config
from .decoder import Decoder
from .experts import ExpertBackend
from .loading import Loader, Progress
from .quantization import served_scheme
from .source import ModelSource
from .tensor_names import text_tensors
from .tokenizer import Tokenizer

_UNDERSTOOD = frozenset({"<|python_start|>", "<|python_end|>"})
"""Special tokens that an answer may hold although they do not end it."""
_ENDS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model's text side. Build it with `open_model`."""

    source: ModelSource
    config: Llama4Config
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    """Ids that end an answer."""
    suppressed_ids: frozenset[int]
    """Ids that must not be drawn: special tokens that mean nothing in an answer, and ids that no token has."""

    def weights(self, seed: int = 0) -> WeightSource:
        """The checkpoint's tensors, or seeded random ones for a dummy model."""
        return open_weights(self.source, self.config, seed)

    def decoder(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: Progress | None = None,
        experts: ExpertBackend | None = None,
        quantize: str = "auto",
        exact: bool = True,
    ) -> Decoder:
        """Load the weights; with `experts` given, all but the routed experts. Raises CheckpointError."""
        with self.loader(
            dtype=dtype, device=device, seed=seed, progress=progress, quantize=quantize, exact=exact
        ) as loader:
            return loader.decoder(experts)

    @contextmanager
    def loader(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: Progress | None = None,
        quantize: str = "auto",
        exact: bool = True,
    ) -> Iterator[Loader]:
        """Reads any part of the weights, such as single experts, while the context lasts. `quantize`: the name of a
        scheme, or "auto" for whatever the checkpoint is. Raises CheckpointError."""
        # Real tensors tell by themselves what they are; random ones are made into what the configuration says.
        as_stored = quantize == "auto" and self.source.load_format != "dummy"
        scheme = None if as_stored else served_scheme(quantize, self.config)
        weights = self.weights(seed)
        try:
            yield Loader(
                weights, self.config, dtype=dtype, device=device, progress=progress, scheme=scheme, exact=exact
            )
        finally:
            weights.close()


def open_weights(source: ModelSource, config: Llama4Config, seed: int = 0) -> WeightSource:
    """The tensors of a checkpoint, or seeded random ones for a dummy model. Raises CheckpointError."""
    if source.load_format == "dummy" or source.directory is None:
        return DummySource(text_tensors(config), seed, getattr(torch, config.dtype))
    return SafetensorsSource(source.directory)


def open_model(source: ModelSource) -> ServedModel:
    """Read configuration and tokenizer. Raises ConfigError or TokenizerError."""
    config = parse_config(source.config_json, source.generation_json)
    directory = source.tokenizer_dir
    tokenizer = byte_tokenizer(config.vocab_size) if directory is None else Tokenizer.from_dir(directory)
    special = tokenizer.special_tokens
    eos_ids = frozenset(config.eos_token_ids) or frozenset(special[name] for name in _ENDS if name in special)
    unused = tokenizer.special_ids - {special[name] for name in _UNDERSTOOD if name in special}
    beyond = range(tokenizer.vocab_size, config.vocab_size)
    return ServedModel(source, config, tokenizer, eos_ids, frozenset({*unused, *beyond} - eos_ids))
