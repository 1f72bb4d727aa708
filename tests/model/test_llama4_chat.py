from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.model.chat_format import ChatError, load_chat_format
from herd.model.llama4_chat import Llama4Chat
from herd.model.template_chat import TemplateChat
from herd.model.tokenizer import Tokenizer

from .tokenizers_for_tests import CHATML_SPECIALS, CHATML_TEMPLATE, LLAMA4_SPECIALS, write_tokenizer_json

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It's <b>&</b> 'wéather'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}},
    {"id": "2", "type": "function", "function": {"name": "now", "arguments": {}}},
]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tokenizer_json(tmp_path_factory.mktemp("llama4"), LLAMA4_SPECIALS)


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def chat(tokenizer) -> Llama4Chat:
    return Llama4Chat(tokenizer)


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text with special tokens by name (whole characters only)."""
    text, plain = "", []
    for i in [*ids, None]:
        if i is not None and i not in tokenizer.special_ids:
            plain.append(i)
            continue
        text += tokenizer.decode(plain) + ("" if i is None else tokenizer.token_text(i))
        plain = []
    return text


def published_template() -> str:
    """The chat template that transformers ships for Llama 4, read from its source."""
    found = importlib.util.find_spec("transformers")
    for name in ("processing_llama4.py", "convert_llama4_weights_to_hf.py"):
        for root in (found.submodule_search_locations or []) if found else []:
            file = Path(root) / "models" / "llama4" / name
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ():
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "chat_template":
                    text = ast.literal_eval(node.value)
                    if "<|header_start|>" in text:
                        return text
    pytest.skip("transformers does not ship Llama 4's chat template")


@pytest.fixture(scope="module")
def oracle(directory):
    transformers = pytest.importorskip("transformers")
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot|>"
    )
    template = published_template()

    def render(messages, tools=None, add_generation_prompt=True) -> list[int]:
        text = library.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return library(text, add_special_tokens=False)["input_ids"]

    return render


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [{"role": "system", "content": "  Be brief.\n"}, USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "turns": [USER, {"role": "assistant", "content": "Hello.\n"}, {"role": "user", "content": " \n and now? "}],
    "white space at the seams": [{"role": "user", "content": "\n\n a"}, {"role": "assistant", "content": "\nb\n"}],
    "late system": [USER, {"role": "system", "content": " late "}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
    "system parts": [{"role": "system", "content": [{"type": "text", "text": " S "}]}, USER],
    "empty": [{"role": "user", "content": ""}],
    "calls": [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS}, USER],
    "silent call": [USER, {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}],
    "unicode": [{"role": "user", "content": "漢字 👩‍👩‍👧 é\u0301"}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["no tools", "one tool", "two tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_the_published_template_where_that_is_sound(chat, oracle, name, tools, prompt):
    messages = CONVERSATIONS[name]
    for_template = [dict(message) for message in messages]
    if tools and name == "parts":
        for_template[0]["content"] = "one two"  # the template would print the Python list
    assert chat.render(messages, tools, prompt) == oracle(for_template, tools, prompt)


harmless_texts = st.text(max_size=20).filter(lambda text: not any(name in text for name in LLAMA4_SPECIALS))


@settings(deadline=None)
@given(
    contents=st.lists(harmless_texts, min_size=1, max_size=4),
    system=st.none() | st.text(alphabet="a b\n", max_size=8),
)
def test_equals_the_published_template_on_any_text(chat, oracle, contents, system):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    assert chat.render(messages) == oracle(messages)


def test_the_shape_of_the_smallest_prompt(chat, tokenizer):
    assert spell(tokenizer, chat.render([USER])) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_empty_tool_calls_do_not_swallow_the_message(chat):
    said = {"role": "assistant", "content": "Hello"}
    assert chat.render([USER, said | {"tool_calls": []}]) == chat.render([USER, said])
    assert chat.render([USER, said | {"tool_calls": None}]) == chat.render([USER, said])


@pytest.mark.parametrize("role", ["tool", "ipython"])
@pytest.mark.parametrize("content", ["21C", [{"type": "text", "text": "21"}, {"type": "text", "text": "C"}]])
def test_tool_results_are_not_quoted(chat, tokenizer, role, content):
    ids = chat.render([{"role": role, "content": content, "tool_call_id": "1"}], add_generation_prompt=False)
    assert spell(tokenizer, ids) == "<|begin_of_text|><|header_start|>ipython<|header_end|>\n\n21C<|eot|>"


def test_arguments_as_json_text_are_written_once(chat, tokenizer):
    def call(arguments):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return chat.render([USER, {"role": "assistant", "content": None, "tool_calls": calls}], None, False)

    assert call('{"a":  "é", "b": [1.0]}') == call({"a": "é", "b": [1.0]})
    written = '<|python_start|><|python_end|>{"name": "f", "parameters": %s}<|eot|>'
    assert spell(tokenizer, call('{"a": "é"}')).endswith(written % '{"a": "é"}')
    assert call("") == call(" ") == call(None) == call({})
    assert spell(tokenizer, call('{"a": ')).endswith(written % '{"a": '), "a model's broken JSON stays as it was"
    assert spell(tokenizer, call("[" * 100_000)).endswith("[[}<|eot|>")


def test_tools_go_into_the_first_user_message_whatever_its_form(chat):
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    opening = {"role": "assistant", "content": "Welcome."}
    assert chat.render([parts], [TOOL]) == chat.render([USER], [TOOL])
    assert len(chat.render([opening, USER], [TOOL])) > len(chat.render([opening, USER])) + 20
    assert chat.render([USER], []) == chat.render([USER])
    with pytest.raises(ChatError, match="first user message") as caught:
        chat.render([{"role": "system", "content": "S"}], [TOOL])
    assert caught.value.param == "messages"


def test_developer_speaks_as_system(chat):
    assert chat.render([{"role": "developer", "content": " S "}, USER]) == chat.render(
        [{"role": "system", "content": "S"}, USER]
    )


@settings(deadline=None)
@given(hostile=st.lists(st.one_of(st.sampled_from(LLAMA4_SPECIALS), st.text(max_size=5))).map("".join))
def test_no_string_of_the_user_can_write_a_special_token(chat, tokenizer, hostile):
    def conversation(text: str):
        call = {"function": {"name": text, "arguments": {text: [text]}}}
        return [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "content": text},
        ], [{"type": "function", "function": {"name": text, "parameters": {text: text}}}]

    def specials(text: str) -> list[int]:
        messages, tools = conversation(text)
        return [i for i in chat.render(messages, tools) if i in tokenizer.special_ids]

    assert specials(hostile) == specials("x")


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([USER, "Hi"], "messages.[1]"),
        ([{"content": "Hi"}], "messages.[0].role"),
        ([USER, {"role": "wizard", "content": "Hi"}], "messages.[1].role"),
        ([USER, {"role": ["user"], "content": "Hi"}], "messages.[1].role"),
        ([{"role": "user"}], "messages.[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages.[0].content"),
        ([{"role": "user", "content": 5}], "messages.[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "messages.[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.[0].content"),
        ([USER, {"role": "user", "content": [IMAGE]}], "messages.[1].content"),
        ([USER | {"tool_calls": CALLS}], "messages.[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": "f"}], "messages.[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [*CALLS, {}]}], "messages.[0].tool_calls.[2].function.name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
            "messages.[0].tool_calls.[0].function.arguments",
        ),
    ],
)
def test_a_faulty_conversation_names_the_field(chat, messages, param):
    with pytest.raises(ChatError) as caught:
        chat.render(messages)
    assert caught.value.param == param


def test_a_faulty_tool_names_itself(chat):
    for tools, param in (([TOOL, "f"], "tools.[1]"), ([TOOL, {"f": {1, 2}}], "tools.[1]")):
        with pytest.raises(ChatError) as caught:
            chat.render([USER], tools)
        assert caught.value.param == param


def test_auto_knows_llama4_by_its_tokens(directory, tokenizer, tmp_path):
    assert isinstance(load_chat_format(directory, tokenizer), Llama4Chat)
    assert isinstance(load_chat_format(None, tokenizer), Llama4Chat)
    with pytest.raises(ChatError, match="no chat template"):
        load_chat_format(directory, tokenizer, "template")
    config = {"chat_template": CHATML_TEMPLATE}
    other = write_tokenizer_json(tmp_path / "chatml", CHATML_SPECIALS, config=config)
    assert isinstance(load_chat_format(other, Tokenizer.from_dir(other)), TemplateChat)
    with pytest.raises(ChatError, match="header_start"):
        load_chat_format(other, Tokenizer.from_dir(other), "llama4")
    bare = write_tokenizer_json(tmp_path / "bare", CHATML_SPECIALS)
    with pytest.raises(ChatError, match="/v1/completions"):
        load_chat_format(bare, Tokenizer.from_dir(bare))
