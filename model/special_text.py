"""Spellings of special tokens inside strings: finding them in a rendered template, and disarming them in what users
wrote, reversibly, before a template sees it. Pure text; knows no tokenizer and no message format.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping

# Noncharacters: Unicode reserves them for a program's own use and assigns them no meaning in text.
_ESCAPE = "\ufdd0"
_LITERAL = _ESCAPE + "\ufdd1"  # an _ESCAPE that was in the text
_BREAK = _ESCAPE + "\ufdd2"  # nothing; stands where a spelling was broken
_ESCAPED = re.compile(f"{_ESCAPE}([\ufdd1\ufdd2])")

_WORD = re.compile(r"\w+")


class SpecialText:
    """Finds the longest special token at each place, as tokenizers do, and breaks those that must not be found."""

    def __init__(
        self,
        special_tokens: Mapping[str, int],
        eats_left: Collection[str] = (),
        eats_right: Collection[str] = (),
    ) -> None:
        """`eats_left` and `eats_right` name the tokens that swallow the white space beside them."""
        # A spelling of one character cannot be broken, so it is never recognised.
        self._ids = {text: i for text, i in special_tokens.items() if len(text) > 1}
        self._eats_left = frozenset(eats_left)
        self._eats_right = frozenset(eats_right)
        pattern = _any_of(self._ids)
        self._find = re.compile(f"({pattern})")
        self._start = re.compile(f"(?={pattern})(.)", re.DOTALL)
        self._heads = {text[:n] for text in self._ids for n in range(1, len(text))}
        self._tails = {text[n:] for text in self._ids for n in range(1, len(text))}
        self._reach = max(map(len, self._ids), default=1) - 1
        self._all = _ESCAPE.join(self._ids)

    def split(self, text: str) -> list[str | int]:
        """Cut at special tokens: ordinary stretches as text, special tokens as ids, in order."""
        pieces = self._find.split(text)
        found: list[str | int] = []
        for n, piece in enumerate(pieces):
            if n % 2:
                found.append(self._ids[piece])
                continue
            if n and pieces[n - 1] in self._eats_right:
                piece = piece.lstrip()
            if n + 1 < len(pieces) and pieces[n + 1] in self._eats_left:
                piece = piece.rstrip()
            found.append(piece)
        return found

    def disarm(self, text: str) -> str:
        """Break every special token spelled in the text, and every part of one that text before or behind could
        complete. `restore` undoes it; text without such spellings comes back as it is.

        Only a text that is one bare word (letters, digits, underscores) out of the middle of a special token is left
        whole, because templates compare words: a template must not put "<" and ">" around a word of the user's.
        """
        if _ESCAPE in text:
            text = text.replace(_ESCAPE, _LITERAL)
        cuts = {match.start() + 1 for match in self._start.finditer(text)}
        # Templates trim what they are given, so the ends count with and without their white space.
        for end in {len(text), len(text.rstrip())}:
            cuts.update(at + 1 for at in range(max(0, end - self._reach), end) if text[at:end] in self._heads)
        core = text.strip()
        inside = 0 < len(core) < self._reach and core in self._all and not _WORD.fullmatch(core)
        for begin in {0, len(text) - len(text.lstrip())}:
            if inside or any(text[begin : begin + n] in self._tails for n in range(1, self._reach + 1)):
                cuts.add(begin)
        if not cuts:
            return text
        edges = [0, *sorted(cuts), len(text)]
        return _BREAK.join(text[a:b] for a, b in itertools.pairwise(edges))

    @staticmethod
    def restore(text: str) -> str:
        """The text as it was before `disarm`."""
        if _ESCAPE not in text:
            return text
        return _ESCAPED.sub(lambda match: _ESCAPE if match[1] == "\ufdd1" else "", text)


def _any_of(words: Collection[str]) -> str:
    """A pattern for the longest of the words: a prefix tree, so that thousands of words cost no more than a few."""
    tree: dict[str, dict] = {}
    for word in words:
        node = tree
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _branch(tree) if tree else r"(?!)"


def _branch(node: dict[str, dict]) -> str:
    ways = [re.escape(char) + _branch(child) for char, child in node.items() if char]
    if not ways:
        return ""
    inner = ways[0] if len(ways) == 1 and "" not in node else f"(?:{'|'.join(ways)})"
    return f"{inner}?" if "" in node else inner
