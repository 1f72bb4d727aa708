import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.errors import RequestError
from herd.deployments.http_errors import MissingParameter, UnsupportedParameter
from herd.deployments.protocol import (
    INT64_MAX,
    INT64_MIN,
    Limits,
    SamplingDefaults,
    choice_seed,
    draw_seed,
    parse_body,
    timeout_of,
)
from herd.deployments.protocol_chat import ChatBody
from herd.deployments.protocol_completions import CompletionBody, DetokenizeBody

LIMITS = Limits(max_model_len=1000, vocab_size=500, max_n=8, max_logprobs=20)
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields) -> ChatBody:
    body = parse_body(ChatBody, json.dumps({"messages": MESSAGES} | fields).encode())
    body.check(LIMITS)
    return body


def completion(**fields) -> CompletionBody:
    body = parse_body(CompletionBody, json.dumps({"prompt": "hi"} | fields).encode())
    body.check(LIMITS)
    return body


BAD_COMMON = [
    ("n", [0, -1, 9, 1.5, "2", True]),
    ("temperature", [-0.1, 2.1, "1", [], True]),
    ("top_p", [0, 1.1, -1]),
    ("top_k", [-2, 1.5, "4"]),
    ("min_p", [-0.1, 1.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("repetition_penalty", [0, -1]),
    ("logit_bias", [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"1": True}, {"500": 1}, {"1.0": 1}]),
    ("seed", [2**63, -(2**63) - 1, 1.5, "7"]),
    ("stop", ["", ["a", ""], [1], 7, {}, ["x"] * 17]),
    ("stop_token_ids", ["1", [-1], [500], ["a"], [1.5], [True], list(range(257))]),
    ("max_tokens", [0, -1, 1.5, "5"]),
    ("min_tokens", [-1, "1"]),
    ("stream", ["true", 1]),
    ("priority", ["high", 2**31]),
    ("cache_salt", [7, "x" * 1025]),
    ("request_id", ["", "a b", "x" * 129, "ü", 5]),
    ("response_format", ["text", {}, {"type": "nonsense"}]),
    ("model", [7, []]),
]
BAD_CHAT = [
    ("messages", [None, "hi", [], {}]),
    ("messages.[0]", [["hi"]]),
    ("top_logprobs", [-1, 21, "5"]),
    ("max_completion_tokens", [0, "x"]),
    ("tool_choice", ["sometimes", 7]),
    ("tools.[0].type", [[{"function": {"name": "f"}}]]),
    ("tools.[0].function.name", [[{"type": "function", "function": {"name": "no spaces allowed"}}]]),
]
BAD_COMPLETION = [
    ("prompt", [None, 7, [], {}, ["a", 1], [1, "a"], [[]], [[1], "a"], [["a"]], [1.5], [True], ["a"] * 257]),
    ("logprobs", [-1, 21, True, "3"]),
    ("suffix", ["x"]),
    ("best_of", [2]),
]


def cases(table):
    return [(param, value) for param, values in table for value in values]


@pytest.mark.parametrize(("param", "value"), cases(BAD_COMMON + BAD_CHAT))
def test_a_wrong_chat_parameter_is_named(param, value):
    field = param.split(".")[0]
    extra = {"logprobs": True} if param == "top_logprobs" else {}
    with pytest.raises(RequestError) as caught:
        chat(**extra | {field: value})
    assert (caught.value.param or "").split(".type")[0] == param.split(".type")[0]
    assert caught.value.status == 400
    assert caught.value.message


@pytest.mark.parametrize(("param", "value"), cases(BAD_COMMON + BAD_COMPLETION))
def test_a_wrong_completion_parameter_is_named(param, value):
    with pytest.raises(RequestError) as caught:
        completion(**{param: value})
    assert caught.value.param == param


def test_a_missing_parameter_is_named():
    with pytest.raises(MissingParameter) as caught:
        parse_body(ChatBody, b"{}")
    assert (caught.value.param, caught.value.code) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (chat, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (completion, {"best_of": 3}, "best_of"),
    ],
)
def test_what_openai_has_and_we_do_not_says_so(make, fields, param):
    with pytest.raises(UnsupportedParameter) as caught:
        make(**fields)
    assert caught.value.param == param
    assert "not supported" in caught.value.message or "supported yet" in caught.value.message


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        (chat, {"min_tokens": 9, "max_completion_tokens": 5, "max_tokens": 99}, "min_tokens"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_what_does_not_go_together_is_named(make, fields, param):
    with pytest.raises(RequestError) as caught:
        make(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a":' * 300, b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_an_error_without_parameter(raw):
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionBody, raw)
    assert caught.value.status == 400
    assert caught.value.param is None


def test_null_means_absent_everywhere():
    nulls = dict.fromkeys(CompletionBody.model_fields.keys() - {"prompt"})
    given_nothing = completion()
    assert completion(**nulls).model_dump() == given_nothing.model_dump()


def test_unknown_fields_are_kept_by_name_and_known_unused_ones_are_not():
    body = chat(
        user="u", metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=False, zzz=1, yyy=None
    )
    assert body.ignored == ["zzz", "yyy"]


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_shapes_of_a_prompt(prompt, parsed):
    assert completion(prompt=prompt).prompt == parsed


def test_legal_values_at_their_bounds():
    body = chat(
        n=8, temperature=2, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2,
        logit_bias={"0": -100, "499": 100}, seed=INT64_MIN, stop=["x"] * 16, stop_token_ids=[0, 499],
        logprobs=True, top_logprobs=20, max_completion_tokens=1, min_tokens=1, request_id="a.b_c:d-1",
    )  # fmt: skip
    sampling = body.sampling(0, 1, 5, SamplingDefaults())
    assert sampling.logit_bias == ((0, -100.0), (499, 100.0))
    assert (sampling.top_k, sampling.logprobs, sampling.stop_token_ids) == (0, 20, (0, 499))


def test_the_user_goes_before_the_checkpoints_recommendation():
    recommended = SamplingDefaults.model_validate({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "do_sample": True})
    plain = chat().sampling(0, 7, 1, recommended)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.max_tokens) == (0.6, 0.9, 40, 7)
    asked = chat(temperature=0, top_p=1, top_k=-1).sampling(0, 7, 1, recommended)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.0, 1.0, 0)


@given(st.integers(INT64_MIN, INT64_MAX), st.integers(1, 127))
def test_choice_seeds_are_int64_reproducible_and_apart(seed, index):
    other = choice_seed(seed, index)
    assert INT64_MIN <= other <= INT64_MAX
    assert other == choice_seed(seed, index) != choice_seed(seed, index - 1)
    assert choice_seed(seed, 0) == seed


def test_drawn_seeds_are_int64_and_differ():
    seeds = {draw_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(INT64_MIN <= seed <= INT64_MAX for seed in seeds)


def test_tool_choice_none_hides_the_tools():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert chat(tools=tools).tool_dicts() == tools
    assert chat(tools=tools, tool_choice="none").tool_dicts() is None


def test_the_smaller_deadline_wins():
    assert timeout_of({}, None) is None
    assert timeout_of({}, 30.0) == 30.0
    assert timeout_of({"x-request-timeout-seconds": "60"}, 30.0) == 30.0
    assert 1.8 < (timeout_of({"x-request-timeout-seconds": "2"}, 30.0) or 0) <= 2
    assert 1.8 < (timeout_of({"x-request-timeout-seconds": "2"}, None) or 0) <= 2


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_deadline_that_is_none_is_refused(text):
    with pytest.raises(RequestError) as caught:
        timeout_of({"x-request-timeout-seconds": text}, None)
    assert caught.value.param == "x-request-timeout-seconds"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_nothing_makes_the_parser_fail_otherwise(value):
    for shape, field in ((ChatBody, "messages"), (CompletionBody, "prompt"), (DetokenizeBody, "tokens")):
        for name in (field, "stop", "logit_bias", "tool_choice", "response_format"):
            try:
                parse_body(shape, json.dumps({field: [1], name: value}).encode())
            except RequestError as error:
                assert error.message  # noqa: PT017 - a refusal is one of the two legal outcomes
