"""A stand-in tokenizer for models whose tokenizer files are not at hand (presets with dummy weights): one token per
byte, Llama 4's special tokens at the end of the vocabulary, and placeholders between. Knows no files."""

from __future__ import annotations

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers

from .bpe_ranks import llama4_special_names
from .byte_level import BYTE_TO_CHAR, BpeVocabulary, TokenizerError
from .tokenizer import Tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Text costs one token a byte; ids that no byte has decode to ` <id>`, so that the output of random weights can be
    read. Raises TokenizerError when the vocabulary is too small for 256 bytes and the special tokens."""
    names = llama4_special_names()
    first_special = vocab_size - len(names)
    if first_special < 256:
        raise TokenizerError(f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(names)} special tokens")
    bpe = BpeTokenizer(models.BPE(vocab={char: byte for byte, char in BYTE_TO_CHAR.items()}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    placeholders = [f" {token_id}".encode() for token_id in range(256, first_special)]
    token_bytes = [bytes([byte]) for byte in range(256)] + placeholders + [b""] * len(names)
    specials = {name: first_special + index for index, name in enumerate(names)}
    return Tokenizer(BpeVocabulary(bpe, token_bytes, specials))
