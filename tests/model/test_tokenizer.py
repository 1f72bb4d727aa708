from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from herd.model.bpe_ranks import SPLIT_PATTERN, llama4_special_names, read_ranks
from herd.model.tokenizer import Tokenizer, TokenizerError

from .tokenizers_for_tests import CHATML_SPECIALS, LLAMA4_SPECIALS, write_ranks, write_tokenizer_json

ORDINARY = ("<tool>", "[[x]]")
ALL_SPELLINGS = (*CHATML_SPECIALS, *LLAMA4_SPECIALS, *ORDINARY)
texts = st.lists(st.one_of(st.sampled_from(ALL_SPELLINGS), st.text(max_size=12)), max_size=8).map("".join)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "specials first": write_tokenizer_json(root / "first", CHATML_SPECIALS, last=False, ordinary=ORDINARY),
        "specials last": write_tokenizer_json(root / "last", LLAMA4_SPECIALS, ordinary=ORDINARY),
        "ranks": write_ranks(root / "ranks"),
    }


@pytest.fixture(scope="module", params=["specials first", "specials last", "ranks"])
def tokenizer(request, directories) -> Tokenizer:
    return Tokenizer.from_dir(directories[request.param])


@settings(deadline=None)
@given(text=texts)
def test_text_never_becomes_a_special_token_and_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module", params=["specials first", "specials last"])
def pair(request, directories) -> tuple[Tokenizer, HfTokenizer]:
    directory = directories[request.param]
    return Tokenizer.from_dir(directory), HfTokenizer.from_file(str(directory / "tokenizer.json"))


harmless_texts = st.text().filter(lambda text: not any(name in text for name in ALL_SPELLINGS))


@settings(deadline=None)
@given(text=st.lists(st.one_of(harmless_texts, st.sampled_from(ORDINARY))).map("".join))
def test_equals_the_plain_library_where_text_spells_no_special_token(pair, text):
    ours, library = pair
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(text=texts)
def test_encode_with_special_recognises_them_as_the_library_does(pair, text):
    ours, library = pair
    assert ours.encode_with_special(text) == library.encode(text, add_special_tokens=False).ids


def test_ids_and_bytes_of_all_tokens_survive_the_separation(pair):
    ours, library = pair
    assert ours.vocab_size == library.get_vocab_size()
    for text, i in ours.special_tokens.items():
        assert library.token_to_id(text) == i
        assert ours.token_bytes(i) == b""
        assert ours.token_text(i) == text
    for i in set(range(ours.vocab_size)) - ours.special_ids:
        assert ours.token_text(i) == library.decode([i], skip_special_tokens=False)
    for text in ORDINARY:
        assert ours.encode(f"a{text}b")[1] == library.token_to_id(text)


def test_bos_comes_from_the_configuration_and_is_not_added(directories):
    tokenizer = Tokenizer.from_dir(directories["specials first"])
    assert tokenizer.bos_id == tokenizer.special_tokens["<|endoftext|>"]
    assert tokenizer.named_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert tokenizer.bos_id not in tokenizer.encode("a")
    ranks = Tokenizer.from_dir(directories["ranks"])
    assert ranks.bos_id == ranks.special_tokens["<|begin_of_text|>"]


def test_decode_skips_special_tokens_and_replaces_broken_bytes(tokenizer):
    special = min(tokenizer.special_ids)
    broken = [i for i in tokenizer.encode("🏵") if i not in tokenizer.special_ids][:1]
    assert tokenizer.decode([special, *tokenizer.encode("a"), *broken, special]) == "a\ufffd"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_lone_surrogates_are_read_as_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_special_token_inside_the_merges_cannot_be_merged(tmp_path):
    """A vocabulary may flag a token as special that its own merges, or `ignore_merges`, would build from text."""
    write_tokenizer_json(tmp_path, LLAMA4_SPECIALS)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    name = max((n for n in document["model"]["vocab"] if n.isalpha() and n.isascii()), key=len)
    document["model"] |= {"ignore_merges": True, "unk_token": name}
    document["added_tokens"].append(
        document["added_tokens"][0] | {"id": document["model"]["vocab"][name], "content": name}
    )
    document["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(document))
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode(f"{name} {name}s")
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == f"{name} {name}s"


def test_white_space_beside_greedy_special_tokens_is_swallowed_as_by_the_library(tmp_path):
    write_tokenizer_json(tmp_path, CHATML_SPECIALS)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    for token in document["added_tokens"]:
        token["lstrip"] = token["content"] == "<|im_start|>"
        token["rstrip"] = token["content"] == "<|im_end|>"
    file.write_text(json.dumps(document))
    text = "a \n<|im_start|> b \n<|im_end|> \nc<|endoftext|> d <|im_end|> <|im_start|>"
    library = HfTokenizer.from_file(str(file))
    assert Tokenizer.from_dir(tmp_path).encode_with_special(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "[]", "cannot be read"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "byte-level"),
        ("tokenizer.json", HfTokenizer(models.WordPiece({"a": 0}, unk_token="a")).to_str(), "WordPiece"),
        ("tokenizer.json", HfTokenizer(models.BPE({"a": 0}, [], byte_fallback=True)).to_str(), "byte fallback"),
        ("tokenizer.model", "\n\x0e\n\x05<unk>", "SentencePiece"),
        ("tokenizer.model", "YQ== 0\nYg== 5\n", "ranks"),
        ("tokenizer.model", "YQ== 0\nYg== 1\n", "single bytes"),
        ("config.json", "{}", "neither"),
    ],
)
def test_files_that_cannot_be_read_are_typed_errors(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(tmp_path)


def test_a_broken_tokenizer_config_is_a_typed_error(tmp_path):
    write_ranks(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(TokenizerError, match="tokenizer_config"):
            Tokenizer.from_dir(tmp_path)


def test_llama4_special_tokens_have_their_published_places():
    names = llama4_special_names()
    assert len(names) == len(set(names)) == 2048
    published = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "fim_suffix",
        5: "header_start",
        6: "header_end",
        7: "eom",
        8: "eot",
        9: "step",
        16: "python_start",
        17: "python_end",
        18: "finetune_right_pad",
        80: "image_start",
        81: "image_end",
        84: "tile_x_separator",
        85: "tile_y_separator",
        90: "image",
        92: "patch",
        1142: "reasoning_thinking_start",
        1143: "reasoning_thinking_end",
        1144: "reserved_special_token_0",
    }
    assert {at: names[at] for at in published} == {at: f"<|{name}|>" for at, name in published.items()}


def _tiktoken_of(directory: Path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(read_ranks(directory / "tokenizer.model"))}
    return tiktoken.Encoding(name="ranks", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def ranks_pair(directories):
    return Tokenizer.from_dir(directories["ranks"]), _tiktoken_of(directories["ranks"])


@settings(deadline=None)
@given(text=st.text(alphabet=st.sampled_from("the rdofé漢 \n1aA'sS/!")))
def test_a_small_ranks_file_equals_tiktoken(ranks_pair, text):
    ours, oracle = ranks_pair
    assert ours.encode(text) == oracle.encode(text)


LLAMA4_SHA256 = "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"


@pytest.fixture(scope="module")
def llama4_directory(tmp_path_factory) -> Path:
    """Meta's own tokenizer, from the package that publishes it. It is under Meta's licence, so it is not kept here."""
    directory = tmp_path_factory.mktemp("llama4")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "llama-models==0.3.0", "-d", "."]
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip(f"llama-models cannot be downloaded: {done.stderr[-200:]}")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("llama_models/llama4/tokenizer.model")
    if hashlib.sha256(data).hexdigest() != LLAMA4_SHA256:
        pytest.skip(f"the wheel holds {len(data)} other bytes instead of the tokenizer")
    (directory / "tokenizer.model").write_bytes(data)
    return directory


def _strings() -> list[str]:
    pools = [
        "abc ABC déÉßǅ\n\t 12345 .,!?'s 'LL're",
        "漢字かなカナ 한국어 Привет",
        "नमस्ते தமிழ் ไทย አማርኛ العربية עברית",
        "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200d",
        "\x00\x01\x1f\x7f\u0085\u2028\u3000 \r\n",
        "<|eot|><|begin_of_text|>{}[]()//\n",
    ]
    rng = random.Random(4)
    strings = ["", " " * 5000, "A" * 5000, "\n" * 5000, "é" * 3000]
    for _ in range(3000):
        pool = "".join(rng.sample(pools, rng.randint(1, 4)))
        strings.append("".join(rng.choice(pool) for _ in range(rng.randint(0, 120))))
        points = (rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(40))
        strings.append("".join(map(chr, points)))
    return strings


@pytest.mark.slow
def test_llama4_tokenizer_equals_tiktoken(llama4_directory):
    ours = Tokenizer.from_dir(llama4_directory)
    oracle = _tiktoken_of(llama4_directory)
    assert ours.vocab_size == 202048
    assert ours.bos_id == 200000
    for text in _strings():
        ids = ours.encode(text)
        assert ids == oracle.encode(text, disallowed_special=())
        assert ours.decode(ids) == text
    assert [ours.token_bytes(i) for i in range(200000)] == oracle.decode_tokens_bytes(list(range(200000)))
