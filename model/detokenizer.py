"""Token ids to text while they arrive, by bytes: a character is given out when its last byte is there, never earlier.
Knows no stop strings and no stream.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one growing token sequence.

    All pieces together equal decoding all bytes at once with U+FFFD for what is not UTF-8; bytes that no continuation
    can mend are replaced at once, and only a character's possible beginning (at most 3 bytes) is ever held.
    """

    __slots__ = ("_held", "_token_bytes")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._held = b""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; special tokens have none."""
        data = self._held + b"".join(map(self._token_bytes, ids))
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """The end of the sequence: U+FFFD for a character that never became whole."""
        data, self._held = self._held, b""
        return data.decode("utf-8", "replace")
