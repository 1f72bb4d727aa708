"""The byte-level alphabet of BPE vocabularies (one printable character per byte) and the parts that a vocabulary file
is read into. Knows no file format and no chat format.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tokenizers


class TokenizerError(ValueError):
    """The tokenizer files are absent, broken, or of a kind that Herd does not read (it reads byte-level BPE)."""


@dataclass(frozen=True, slots=True)
class BpeVocabulary:
    """One byte-level BPE vocabulary, with its special tokens kept apart from what text can reach."""

    bpe: tokenizers.Tokenizer
    """Encodes text; holds no special token, so none can come out of it."""
    token_bytes: list[bytes]
    """Exact bytes by id; empty for special tokens and for ids that no token has."""
    special_tokens: dict[str, int]
    """Spelling -> id."""
    eats_left: frozenset[str] = field(default=frozenset())
    """Special tokens that swallow white space on their left when a template spells them."""
    eats_right: frozenset[str] = field(default=frozenset())


def _alphabet() -> dict[int, str]:
    """Byte -> character: bytes with a visible Latin-1 character keep it, the others follow from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + n) for n, b in enumerate(hidden)}


BYTE_TO_CHAR: dict[int, str] = _alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_CHAR_TO_LATIN1 = {ord(char): chr(byte) for byte, char in BYTE_TO_CHAR.items()}


def bytes_to_name(data: bytes) -> str:
    """The vocabulary key of a token with these bytes."""
    return data.decode("latin-1").translate(BYTE_TO_CHAR)


def name_to_bytes(name: str) -> bytes:
    """The bytes of a vocabulary key; a key outside the alphabet stands for its own UTF-8 text."""
    if all(char in _CHAR_TO_BYTE for char in name):
        return name.translate(_CHAR_TO_LATIN1).encode("latin-1")
    return name.encode("utf-8")
