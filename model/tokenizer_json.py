"""Hugging Face's `tokenizer.json`, read as a byte-level BPE whose special tokens are out of reach of text: they are
taken out of the vocabulary, the added tokens and the post-processor, and kept beside it with their ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from .byte_level import BpeVocabulary, TokenizerError, name_to_bytes

_BPE_OPTIONS = ("unk_token", "fuse_unk", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def vocabulary_from_json(path: Path) -> BpeVocabulary:
    """Read a tokenizer.json. Raises TokenizerError when it is broken or not byte-level BPE."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        model = document["model"]
        added = document.get("added_tokens") or []
        special = {token["content"]: token for token in added if token["special"]}
        ordinary = {token["content"]: token for token in added if not token["special"]}
        _require_byte_level(path, document)
        return BpeVocabulary(
            bpe=_build(document, special, ordinary),
            token_bytes=_token_bytes(model["vocab"], special, ordinary),
            special_tokens={text: token["id"] for text, token in special.items()},
            eats_left=frozenset(text for text, token in special.items() if token.get("lstrip")),
            eats_right=frozenset(text for text, token in special.items() if token.get("rstrip")),
        )
    except TokenizerError:
        raise
    except Exception as error:
        # `tokenizers` reports a bad file by a bare Exception.
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {type(error).__name__}: {error}") from error


def _require_byte_level(path: Path, document: dict[str, Any]) -> None:
    model = document["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    parts = [_components(document.get(name)) for name in ("pre_tokenizer", "decoder")]
    if kind != "BPE" or model.get("byte_fallback") or not any("ByteLevel" in part for part in parts):
        what = f"{kind} with byte fallback" if model.get("byte_fallback") else kind
        raise TokenizerError(f"{path}: Herd reads byte-level BPE only; this is {what} without a byte-level alphabet")


def _components(node: dict[str, Any] | None) -> set[str]:
    """The types of a pre-tokenizer or decoder, looking into sequences."""
    if node is None:
        return set()
    inner = node.get("pretokenizers") or node.get("decoders") or []
    return {node["type"]}.union(*(_components(child) for child in inner))


def _build(document: dict[str, Any], special: dict[str, Any], ordinary: dict[str, Any]) -> Tokenizer:
    """The encoder without its special tokens; all other tokens keep their ids."""
    model = document["model"]
    bare = dict(document, added_tokens=[], post_processor=None, truncation=None, padding=None)
    bare["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    bpe = Tokenizer.from_str(json.dumps(bare))
    # With the added tokens in the vocabulary, adding them below finds their ids instead of drawing new ones.
    vocab = {name: i for name, i in model["vocab"].items() if name not in special}
    vocab |= {name: token["id"] for name, token in ordinary.items()}
    options = {name: model[name] for name in _BPE_OPTIONS if model.get(name)}
    if options.get("unk_token") in special:
        del options["unk_token"]
    bpe.model = models.BPE(vocab=vocab, merges=_merges(model["merges"], special), **options)
    bpe.add_tokens(
        [AddedToken(text, special=False, **{k: token.get(k, False) for k in _ADDED_FLAGS})
         for text, token in ordinary.items()]
    )  # fmt: skip
    return bpe


def _merges(merges: list[Any], special: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs (older files write "left right"), without those that touch a special token."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    return [(a, b) for a, b in pairs if a not in special and b not in special and a + b not in special]


def _token_bytes(vocab: dict[str, int], special: dict[str, Any], ordinary: dict[str, Any]) -> list[bytes]:
    ids = [*vocab.values(), *(token["id"] for token in (*special.values(), *ordinary.values()))]
    table = [b""] * (max(ids) + 1)
    for name, i in vocab.items():
        table[i] = name_to_bytes(name)
    for text, token in ordinary.items():
        table[token["id"]] = text.encode("utf-8")
    for token in special.values():
        table[token["id"]] = b""
    return table
