import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.deployments.generation import Delta, ScoredToken
from herd.deployments.responses import DONE, Header, StreamEncoder, WholeChoice, quote, usage_object, whole_body

from .fake_gateway import byte_ids, tokenizer

CHAT = Header("chat", "chatcmpl-1", 1700000000, "tiny")
TEXT = Header("text", "cmpl-1", 1700000000, "tiny")
SCORED = [ScoredToken(byte_ids("a")[0], -0.25, ((byte_ids("b")[0], -0.1), (byte_ids("a")[0], -0.25)), 0)]


def events(data: bytes) -> list[dict]:
    blocks = data.decode().split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_as_one_line_of_json(text):
    quoted = quote(text)
    assert json.loads(quoted) == text
    assert len(quoted.splitlines()) == 1


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 127))
def test_hand_made_chunks_equal_what_json_would_make(text, index):
    for header, piece in ((CHAT, {"delta": {"content": text}}), (TEXT, {"text": text})):
        (chunk,) = events(StreamEncoder(header, tokenizer()).delta(index, Delta(text)))
        choice = {"index": index, **piece, "logprobs": None, "finish_reason": None}
        assert chunk == header.fields(chunk=True) | {"choices": [choice]}


def test_a_chat_opens_with_the_role_and_a_completion_with_nothing():
    (chunk,) = events(StreamEncoder(CHAT, tokenizer()).opening(2))
    assert chunk["choices"] == [
        {"index": 2, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert chunk["object"] == "chat.completion.chunk"
    assert StreamEncoder(TEXT, tokenizer()).opening(2) == b""


def test_text_and_finish_are_two_chunks_and_the_finish_says_it_once():
    text, last = events(StreamEncoder(CHAT, tokenizer()).delta(0, Delta("end", finish_reason="stop")))
    assert text["choices"][0]["finish_reason"] is None
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    (last,) = events(StreamEncoder(TEXT, tokenizer()).delta(0, Delta("", finish_reason="length")))
    assert last["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}


def test_nothing_to_say_is_no_chunk():
    assert StreamEncoder(CHAT, tokenizer()).delta(0, Delta("")) == b""


def test_usage_is_absent_null_or_there_as_asked():
    usage = usage_object(3, 4, None)
    assert usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    delta = Delta("x", finish_reason="stop")
    assert all("usage" not in chunk for chunk in events(StreamEncoder(CHAT, tokenizer()).delta(0, delta)))
    asked = StreamEncoder(CHAT, tokenizer(), null_usage=True)
    assert [chunk["usage"] for chunk in events(asked.opening(0) + asked.delta(0, delta))] == [None] * 3
    assert [chunk["usage"] for chunk in events(asked.delta(0, delta, usage))] == [usage] * 2
    (final,) = events(asked.usage(usage_object(3, 4, 2)))
    assert (final["choices"], final["usage"]["prompt_tokens_details"]) == ([], {"cached_tokens": 2})


def test_chat_logprobs():
    encoder = StreamEncoder(CHAT, tokenizer(), with_logprobs=True)
    (chunk,) = events(encoder.delta(0, Delta("a", [5], SCORED)))
    logprobs = chunk["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    (entry,) = logprobs["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.25, [97])
    assert [top["token"] for top in entry["top_logprobs"]] == ["b", "a"]
    assert "token_ids" not in chunk["choices"][0]


def test_completion_logprobs_hold_the_drawn_token_even_outside_the_top():
    drawn = ScoredToken(byte_ids("c")[0], -9.0, SCORED[0].top, 4)
    encoder = StreamEncoder(TEXT, tokenizer(), with_logprobs=True)
    (chunk,) = events(encoder.delta(0, Delta("ac", [], [*SCORED, drawn])))
    logprobs = chunk["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "c"]
    assert logprobs["text_offset"] == [0, 4]
    assert logprobs["token_logprobs"] == [-0.25, -9.0]
    assert list(logprobs["top_logprobs"][0].items()) == [("b", -0.1), ("a", -0.25)]
    assert list(logprobs["top_logprobs"][1]) == ["b", "a", "c"]


def test_special_tokens_are_shown_by_name():
    eot = tokenizer().special_tokens["<|eot|>"]
    encoder = StreamEncoder(CHAT, tokenizer(), with_logprobs=True)
    (chunk,) = events(encoder.delta(0, Delta("", [eot], [ScoredToken(eot, -1.0, (), 0)], "stop")))
    (entry,) = chunk["choices"][0]["logprobs"]["content"]
    assert (entry["token"], bytes(entry["bytes"])) == ("<|eot|>", b"<|eot|>")


def test_token_ids_stand_where_vllm_puts_them():
    chat = StreamEncoder(CHAT, tokenizer(), with_token_ids=True)
    assert events(chat.opening(0, [1, 2]))[0]["prompt_token_ids"] == [1, 2]
    text = StreamEncoder(TEXT, tokenizer(), with_token_ids=True)
    assert events(text.opening(0, [1, 2]))[0]["choices"][0]["prompt_token_ids"] == [1, 2]
    (chunk,) = events(text.delta(0, Delta("a", [7, 8])))
    assert chunk["choices"][0]["token_ids"] == [7, 8]
    (last,) = events(text.delta(0, Delta("", [9], finish_reason="stop")))
    assert last["choices"][0]["token_ids"] == [9]


@pytest.mark.parametrize("header", [CHAT, TEXT])
def test_a_whole_body_says_what_its_deltas_say(header):
    choice = WholeChoice(prompt_ids=[1, 2])
    for delta in (Delta("a", [5], SCORED), Delta("b", [6]), Delta("", [7], finish_reason="stop")):
        choice.add(delta)
    usage = usage_object(2, 3, 0)
    body = json.loads(whole_body(header, [choice], usage, tokenizer(), with_logprobs=True, with_token_ids=True))
    (item,) = body["choices"]
    assert (item["message"]["content"] if header.kind == "chat" else item["text"]) == "ab"
    assert (item["token_ids"], item["finish_reason"], body["usage"]) == ([5, 6, 7], "stop", usage)
    assert body["object"] == ("chat.completion" if header.kind == "chat" else "text_completion")
    assert (body if header.kind == "chat" else item)["prompt_token_ids"] == [1, 2]


def test_done_is_an_event_of_its_own():
    assert DONE == b"data: [DONE]\n\n"
