"""Meta's `tokenizer.model`: a text file of `base64 rank` lines, turned into a byte-level BPE with the 2048 special
tokens of Llama 4 behind the last rank. Knows nothing of Hugging Face's tokenizer.json.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from .byte_level import BpeVocabulary, TokenizerError, bytes_to_name

NUM_SPECIAL_TOKENS = 2048

_LETTER_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTER_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        f"{_LEAD}{_LETTER_UPPER}*{_LETTER_LOWER}+{_CONTRACTION}",
        f"{_LEAD}{_LETTER_UPPER}+{_LETTER_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut before merging: the o200k rule (words with their leading sign, digits by three, signs, space)."""


_BASIC = ("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix")
_TEXT = {
    0: "header_start",
    1: "header_end",
    2: "eom",
    3: "eot",
    4: "step",
    11: "python_start",
    12: "python_end",
    13: "finetune_right_pad",
}
_VISION = {0: "image_start", 1: "image_end", 4: "tile_x_separator", 5: "tile_y_separator", 10: "image", 12: "patch"}
_REASONING = {8: "reasoning_thinking_start", 9: "reasoning_thinking_end"}


def llama4_special_names() -> list[str]:
    """The spellings of Llama 4's special tokens in id order; the first one follows the last rank."""
    text = _family("text_post_train", 75, _TEXT, unused_numbers=(6, 7))
    vision = _family("vision", 1054, _VISION)
    reasoning = _family("reasoning", 10, _REASONING)
    named = [*_BASIC, *text, *vision, *reasoning]
    rest = [f"reserved_special_token_{n}" for n in range(NUM_SPECIAL_TOKENS - len(named))]
    return [f"<|{name}|>" for name in named + rest]


def _family(family: str, size: int, names: dict[int, str], unused_numbers: tuple[int, ...] = ()) -> list[str]:
    """One family of special tokens: those with a name at their places, the others numbered in order."""
    numbers = (n for n in range(size) if n not in unused_numbers)
    return [names.get(at) or f"{family}_reserved_special_token_{next(numbers)}" for at in range(size)]


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a ranks file by rank. Raises TokenizerError when it is not one or its ranks have gaps."""
    tokens: dict[int, bytes] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                encoded, rank = line.split()
                tokens[int(rank)] = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"{path} is not a file of `base64 rank` lines: SentencePiece models are not supported; "
            "Herd reads byte-level BPE (Meta's ranks file or tokenizer.json)"
        ) from error
    ordered = [tokens.get(rank, b"") for rank in range(len(tokens))]
    if not tokens or len(set(ordered)) != len(ordered) or b"" in ordered:
        raise TokenizerError(f"{path}: the ranks are not 0 to n-1, each with its own non-empty token")
    if sum(len(token) == 1 for token in ordered) != 256:
        raise TokenizerError(f"{path}: some of the 256 single bytes have no rank")
    return ordered


def vocabulary_from_ranks(path: Path) -> BpeVocabulary:
    """Read a ranks file and build its BPE (about 3 s for 200,000 ranks). Raises TokenizerError."""
    tokens = read_ranks(path)
    names = [bytes_to_name(token) for token in tokens]
    vocab = {name: rank for rank, name in enumerate(names)}
    # Every way to cut a token into two others is a merge; the rank of the result is its priority.
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cutter = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [cutter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special_tokens = {name: len(tokens) + n for n, name in enumerate(llama4_special_names())}
    return BpeVocabulary(bpe, tokens + [b""] * len(special_tokens), special_tokens)
