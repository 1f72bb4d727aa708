"""Rebuilds the tokenizer files of `pocket` from the metadata of its GGUF file. Knows nothing of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .gguf import GgufError

_CONTROL = 3
"""GGUF's mark of a token that text never spells."""


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    if (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise GgufError("the tokenizer of the GGUF file is not the byte-level one of SmolLM2")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    template: str = metadata["tokenizer.chat_template"]
    _byte_level(tokens, metadata).save(str(directory / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    names = {f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        **names,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(tokens: list[str], metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE that first cuts digits apart, one token each."""
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in metadata["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
