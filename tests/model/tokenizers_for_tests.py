"""Small tokenizers, written to disk in the formats that checkpoints use."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA4_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|image|>",
)
CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_CORPUS = [
    "The herd of sheep crosses the river; the shepherd counts them: 1, 2, 3, 40, 500.\n\n",
    "system user assistant ipython Environment functions parameters name respond JSON arguments",
    "déjà vu, naïve café, 漢字かな交じり文, 한국어, Привет мир, emoji 👩‍👩‍👧 🏳️‍🌈, नमस्ते",
    'def f(x):\n    return {"name": "f", "parameters": {"x": [1, 2]}}\n',
]


@cache
def _trained(pieces: tuple[str, ...], last: bool) -> str:
    """tokenizer.json with the special tokens first (as in GPT-2's heirs) or last (as in Llama's)."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[] if last else list(pieces),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{pieces[0]} $A", special_tokens=[(pieces[0], tokenizer.token_to_id(pieces[0]))]
    )
    return tokenizer.to_str()


def write_tokenizer_json(
    directory: Path,
    specials: tuple[str, ...],
    *,
    last: bool = True,
    ordinary: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """A trained byte-level BPE whose post-processor adds a BOS; `ordinary` are added tokens that are not special."""
    tokenizer = HfTokenizer.from_str(_trained(specials, last))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ordinary])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    defaults = {"bos_token": specials[0], "eos_token": {"content": specials[-1]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(defaults | (config or {})))
    return directory


def write_ranks(directory: Path, words: tuple[str, ...] = ("the", " herd", " of", "é", "漢")) -> Path:
    """A ranks file: the single bytes, not in byte order, then every prefix of each word."""
    tokens = [bytes([byte]) for byte in sorted(range(256), key=lambda b: (b * 7 + 192) % 256)]
    for word in words:
        data = word.encode()
        tokens += [data[:n] for n in range(2, len(data) + 1) if data[:n] not in tokens]
    directory.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return directory
