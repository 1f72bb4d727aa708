"""Text to token ids and back. Ordinary text never becomes a special token, whatever it spells; special tokens enter a
prompt by id, or through `encode_with_special`, which only the template renderer may call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from .bpe_ranks import vocabulary_from_ranks
from .byte_level import BpeVocabulary, TokenizerError
from .special_text import SpecialText
from .tokenizer_json import vocabulary_from_json

__all__ = ["Tokenizer", "TokenizerError"]


class Tokenizer:
    """One model's byte-level BPE tokenizer. Immutable and safe to share between threads."""

    def __init__(self, vocabulary: BpeVocabulary, config: dict[str, Any] | None = None) -> None:
        """`config` is the parsed tokenizer_config.json; only the names of its control tokens are read."""
        self._bpe = vocabulary.bpe
        self._bytes = vocabulary.token_bytes
        self._vocabulary = vocabulary
        self.special_tokens: dict[str, int] = dict(vocabulary.special_tokens)
        self.special_ids: frozenset[int] = frozenset(self.special_tokens.values())
        self._special_names = {i: text for text, i in self.special_tokens.items()}
        self.vocab_size = len(self._bytes)
        self.named_tokens = _named_tokens(config or {})
        """Spellings by role as tokenizer_config.json gives them: bos_token, eos_token, pad_token, unk_token."""
        self.bos_id = self._bos_id()

    @classmethod
    def from_dir(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json, or else Meta's tokenizer.model, from a checkpoint directory. Raises TokenizerError."""
        directory = Path(path)
        config = _read_config(directory / "tokenizer_config.json")
        if (file := directory / "tokenizer.json").is_file():
            return cls(vocabulary_from_json(file), config)
        if (file := directory / "tokenizer.model").is_file():
            return cls(vocabulary_from_ranks(file), config)
        raise TokenizerError(f"{directory} holds neither tokenizer.json nor tokenizer.model")

    def _bos_id(self) -> int | None:
        for text in (self.named_tokens.get("bos_token"), "<|begin_of_text|>"):
            if text is not None:
                found = self.special_tokens.get(text)
                found = self._bpe.token_to_id(text) if found is None else found
                if found is not None:
                    return found
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Never a special token, no BOS; lone surrogates are read as U+FFFD."""
        try:
            # The batch call skips the character offsets, which cost as much as the encoding itself.
            return self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._bpe.encode_batch_fast([whole], add_special_tokens=False)[0].ids

    def encode_with_special(self, text: str, restore: Callable[[str], str] = str) -> list[int]:
        """Ids of a rendered template, in which special tokens ARE recognised. Never call it on what a user wrote.

        `restore` is applied to each stretch of ordinary text before it is encoded.
        """
        ids: list[int] = []
        for piece in self.special_text.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids += self.encode(restore(piece))
        return ids

    @cached_property
    def special_text(self) -> SpecialText:
        """Finds and disarms the spellings of special tokens in strings."""
        v = self._vocabulary
        return SpecialText(v.special_tokens, v.eats_left, v.eats_right)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of an ordinary token; b"" for special tokens and for ids beyond the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """One token for display: its bytes with U+FFFD where they are not whole characters, or its special name."""
        name = self._special_names.get(token_id)
        return self.token_bytes(token_id).decode("utf-8", "replace") if name is None else name

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids: special tokens skipped, U+FFFD where the bytes are not UTF-8."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return config


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Each value is a string, or an object whose "content" is one."""
    named: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[role] = text
    return named
