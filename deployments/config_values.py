"""Turns the text of environment variables and `--set` into values, and wrong keys into suggestions.
Knows nothing of where a value comes from."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

import yaml

_NONE_WORDS = frozenset({"", "none", "null", "~"})


def value_from_text(text: str, annotation: Any) -> Any:
    """What `text` means for a field of type `annotation`; the model's own validation still follows.

    Numbers and words stay text (validation converts them). A list is `a,b` or YAML, a mapping is YAML. Raises
    ValueError for broken YAML.
    """
    kinds = _alternatives(annotation)
    if type(None) in kinds and text.strip().lower() in _NONE_WORDS:
        return None
    is_sequence = any(get_origin(kind) in (tuple, list) for kind in kinds)
    if is_sequence and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if is_sequence or any(get_origin(kind) is dict for kind in kinds):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r} is not valid YAML") from error
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The dotted key of `known` that `word` was probably meant to be: by the whole key or by its last part."""
    word = word.lower()

    def likeness(key: str) -> tuple[float, float]:
        pairs = ((word, key), (word.rpartition(".")[2], key.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
        return max(whole, last), whole

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)
