from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.model.chat_format import ChatError, load_chat_format
from herd.model.special_text import SpecialText
from herd.model.template_chat import MAX_TEMPLATE_CHARS, TemplateChat, read_templates
from herd.model.tokenizer import Tokenizer

from .tokenizers_for_tests import CHATML_SPECIALS, CHATML_TEMPLATE, write_tokenizer_json

# Reads every field and runs strings into one another without a seam, which ChatML never does.
SEAMLESS_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}<{{ message.name }}{{ message.content | trim }}{{ message.content }}>
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}
{%- endfor %}{{ '<|im_end|>' }}{% endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=True) }}{% endif -%}
"""
USER = {"role": "user", "content": "Hi"}
fragments = st.sampled_from(
    [*CHATML_SPECIALS, "<|im_", "end|>", "<", "|im_end|>", "|im_end|", "|im", " ", "\ufdd0", "\ufdd1", "\ufdd2"]
)
hostile_texts = st.lists(st.one_of(fragments, st.text(max_size=4)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tokenizer_json(tmp_path_factory.mktemp("chatml"), CHATML_SPECIALS, last=False)


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def chatml(tokenizer) -> TemplateChat:
    return TemplateChat({"default": CHATML_TEMPLATE}, tokenizer)


@pytest.fixture(scope="module")
def seamless(tokenizer) -> TemplateChat:
    return TemplateChat({"default": SEAMLESS_TEMPLATE}, tokenizer)


@pytest.fixture(scope="module")
def library(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def rendered_by(library, template, messages, tools=None, add_generation_prompt=True) -> list[int]:
    text = library.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return library(text, add_special_tokens=False)["input_ids"]


harmless_texts = st.text(max_size=20).filter(lambda text: not any(name in text for name in CHATML_SPECIALS))


@settings(deadline=None)
@given(contents=st.lists(harmless_texts, min_size=1, max_size=4), system=st.booleans(), prompt=st.booleans())
def test_equals_transformers_on_harmless_content(chatml, library, contents, system, prompt):
    roles = (["system"] if system else []) + ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    assert chatml.render(messages, None, prompt) == rendered_by(library, CHATML_TEMPLATE, messages, None, prompt)


def test_equals_transformers_in_what_templates_may_use(tokenizer, library):
    template = """\
{%- generation -%}a{%- endgeneration -%}
{{ strftime_now('%Y') }}{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools | tojson(indent=4) }}
{% for n in range(9) %}
    {% if n == 3 %}{% break %}{% endif %}
    {{ messages[0].content | upper }}{{ documents is none }}
{% endfor %}
{{ messages[1].tool_calls[0].function.arguments | tojson }}{{ '<|im_end|>' }}
"""
    tools = [{"type": "function", "function": {"name": "f", "description": "<a> & 'é'", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ours = TemplateChat({"default": template}, tokenizer)
    assert ours.render(messages, tools) == rendered_by(library, template, messages, tools)
    call["function"]["arguments"] = '{"x": "é"}'
    assert ours.render(messages, tools) == rendered_by(
        library, template, [USER, messages[1] | {"tool_calls": [{"function": {"arguments": {"x": "é"}}}]}], tools
    )


@settings(deadline=None)
@given(text=hostile_texts)
def test_chatml_text_comes_back_exactly_and_adds_no_special_token(chatml, tokenizer, text):
    ids = chatml.render([{"role": "system", "content": ""}, {"role": "user", "content": text}])
    harmless = chatml.render([{"role": "system", "content": ""}, {"role": "user", "content": "x"}])
    assert specials(tokenizer, ids) == specials(tokenizer, harmless)
    assert tokenizer.decode(ids) == tokenizer.decode(harmless).replace("x", text)


@settings(deadline=None)
@given(texts=st.tuples(*[hostile_texts] * 5))
def test_no_string_anywhere_can_spell_a_special_token_even_across_seams(seamless, tokenizer, texts):
    ids, harmless = (seamless.render(*_everywhere(*five)) for five in (texts, ("x",) * 5))
    assert specials(tokenizer, ids) == specials(tokenizer, harmless)


def _everywhere(name, content, function, key, value):
    call = {"id": name, "function": {"name": function, "arguments": json.dumps({key: [value]})}}
    messages = [
        {"role": "user", "name": name, "content": content},
        {"role": "assistant", "name": name, "content": content, "tool_calls": [call, call]},
    ]
    return messages, [{"type": "function", "function": {"name": function, "parameters": {key: value}}}]


def specials(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.special_ids]


def test_a_template_that_puts_brackets_around_a_string_spells_no_special_token(tokenizer):
    template = TemplateChat({"default": "<{{ messages[0].content }}><|{{ messages[0].content }}>"}, tokenizer)
    for text in ("|im_end|", " |im_end|", "im_end|", "|im_end", "|im_end|><|im_end|"):
        ids = template.render([{"role": "user", "content": text}])
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == f"<{text}><|{text}>"


def test_tojson_shows_the_users_own_text(seamless, tokenizer):
    ids = seamless.render([USER], [{"name": "<|im_end|> é"}])
    text = tokenizer.decode(ids)
    assert '"name": "<|im_end|> é"' in text
    assert json.dumps("<|im_end|> é") in text


@settings(deadline=None)
@given(text=hostile_texts)
def test_disarming_is_reversible_and_complete(text):
    special = SpecialText({name: n for n, name in enumerate((*CHATML_SPECIALS, "<|im", "|im_end|><|im"))})
    disarmed = special.disarm(text)
    assert special.split(disarmed) == [disarmed]
    assert special.restore(disarmed) == text


def test_no_second_bos(tokenizer):
    template = TemplateChat({"default": "{{ bos_token }}{{ messages[0].content }}"}, tokenizer)
    ids = template.render([USER])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("Hi")]


def test_content_parts_nulls_and_missing_content_reach_the_template_as_strings(chatml):
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], "name": None}
    assert chatml.render([parts]) == chatml.render([USER])
    call = {"function": {"name": "f", "arguments": "{}"}}
    assert chatml.render([USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    developer = {"role": "developer", "content": "S"}
    assert chatml.render([developer, USER]) == chatml.render([developer | {"role": "system"}, USER])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
        ("{{ messages[0].content + 5 }}", "refuses"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for n in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{% set _ = messages.append(1) %}", "refuses"),
    ],
)
def test_a_template_that_raises_is_a_chat_error(tokenizer, template, message):
    with pytest.raises(ChatError, match=message) as caught:
        TemplateChat({"default": template}, tokenizer).render([USER])
    assert caught.value.param == "messages"


def test_a_faulty_conversation_never_reaches_the_template(chatml):
    with pytest.raises(ChatError) as caught:
        chatml.render([USER, {"role": "wizard", "content": ""}])
    assert caught.value.param == "messages.[1].role"


@pytest.mark.parametrize("template", ["{% for %}", "{{", "x" * (MAX_TEMPLATE_CHARS + 1)])
def test_a_broken_or_huge_template_is_refused_when_loaded(tokenizer, template):
    with pytest.raises(ChatError, match="chat template"):
        TemplateChat({"default": template}, tokenizer)


def test_where_templates_are_found(tmp_path, tokenizer):
    assert read_templates(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "in config"}))
    assert read_templates(tmp_path) == {"default": "in config"}
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_templates(tmp_path) == {"default": "plain", "tool_use": "tools"}
    chat = load_chat_format(tmp_path, tokenizer)
    assert tokenizer.decode(chat.render([USER])) == "plain"
    assert tokenizer.decode(chat.render([USER], [{"name": "f"}])) == "tools"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in its json"}))
    assert read_templates(tmp_path) == {"default": "in its json"}
    (tmp_path / "chat_template.jinja").write_text("in its file")
    assert read_templates(tmp_path) == {"default": "in its file"}


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 5}', '{"chat_template": [{}]}'])
def test_an_unreadable_configuration_is_a_chat_error(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ChatError, match="chat_template"):
        read_templates(tmp_path)
