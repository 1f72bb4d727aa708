import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.errors import DeadlineExceeded, EngineUnavailable
from herd.deployments.generation import LOWEST_LOGPROB, Choice
from herd.model.stop_strings import StopStrings

from .fake_gateway import byte_ids, end, tokenizer

TEXTS = st.text(alphabet="abAB é漢👩\n", max_size=30)


def run(choice: Choice, ids: list[int], cuts: list[int], last: dict, logprobs: list | None = None):
    """Feed `ids` cut into updates of the given sizes (the rest in one), the end with the last; returns the deltas."""
    deltas = []
    start = 0
    sizes = [*cuts, len(ids)]
    while start < len(ids) or not deltas:
        stop = min(start + sizes.pop(0), len(ids))
        scores = None if logprobs is None else logprobs[start:stop]
        deltas.append(choice.push(ids[start:stop], scores, last if stop == len(ids) else None))
        start = stop
    return deltas


CUTS = st.lists(st.integers(1, 4), max_size=40)


@given(TEXTS, CUTS)
def test_text_is_whole_whatever_the_cuts(text, cuts):
    choice = Choice(tokenizer())
    deltas = run(choice, byte_ids(text), cuts, end("stop"))
    assert "".join(d.text for d in deltas) == text
    assert "\ufffd" not in text
    assert choice.num_tokens == len(byte_ids(text))
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]


@given(TEXTS, CUTS, st.lists(st.text(alphabet="abAB é", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_stop_strings_end_the_text_where_the_matcher_says_whatever_the_cuts(text, cuts, stops, include):
    expected, stopped = StopStrings(stops, include).push(text)
    choice = Choice(tokenizer(), stops=stops, include_stop=include)
    deltas = run(choice, byte_ids(text), cuts, end("length"))
    said = "".join(d.text for d in deltas)
    assert said == (expected if stopped else text)
    assert choice.finish_reason == ("stop" if stopped else "length")
    if not include:
        assert not any(stop in said for stop in stops)
    used = byte_ids(text)[: choice.num_tokens]
    if stopped:
        assert any(tokenizer().decode(used).endswith(stop) for stop in stops), "counts up to the completing token"
    assert [i for d in deltas for i in d.token_ids] == used


def test_a_held_prefix_of_a_stop_string_is_released_at_the_end():
    choice = Choice(tokenizer(), stops=["END"])
    deltas = run(choice, byte_ids("the EN"), [1] * 9, end("length"))
    assert "".join(d.text for d in deltas) == "the EN"
    assert "EN" not in "".join(d.text for d in deltas[:-1])


def test_a_character_cut_by_the_length_limit_becomes_one_replacement():
    ids = byte_ids("a漢")[:-1]
    choice = Choice(tokenizer())
    deltas = run(choice, ids, [1] * 9, end("length"))
    assert [d.text for d in deltas] == ["a", "", "\ufffd"]
    assert deltas[-1].finish_reason == "length"


def test_a_stop_id_is_silent_unless_asked_for():
    x = byte_ids("x")[0]
    for include, text in ((False, "ab"), (True, "abx")):
        choice = Choice(tokenizer(), stop_token_ids=[x], include_stop=include)
        assert "".join(d.text for d in run(choice, byte_ids("abx"), [1, 1], end("stop"))) == text
        assert choice.num_tokens == 3


def test_logprobs_come_with_the_text_they_belong_to():
    scores = [[-0.1 * i, [1, 2], [-0.1, float("-inf")]] for i in range(1, 6)]
    choice = Choice(tokenizer(), wants_logprobs=True)
    deltas = run(choice, byte_ids("aé漢")[:5], [1] * 5, end("length"), scores)
    assert [len(d.scored) for d in deltas] == [1, 0, 2, 0, 2]
    scored = [token for d in deltas for token in d.scored]
    assert [token.offset for token in scored] == [0, 1, 1, 2, 2]
    assert scored[0].top == ((1, -0.1), (2, LOWEST_LOGPROB))
    assert [token.token_id for token in scored] == byte_ids("aé漢")[:5]


def test_after_a_stop_string_nothing_but_the_cached_count_changes():
    choice = Choice(tokenizer(), stops=["b"])
    assert choice.push(byte_ids("ab"), None, None).finish_reason == "stop"
    assert choice.push(byte_ids("cd"), None, None).text == ""
    assert choice.push((), None, end("abort", cached=5)).finish_reason is None
    assert (choice.num_tokens, choice.num_cached_tokens, choice.finish_reason) == (2, 5, "stop")
    choice.push((), None, {"error": DeadlineExceeded("late").to_wire()})


def test_an_end_without_tokens_finishes():
    choice = Choice(tokenizer())
    assert choice.push((), None, end("length", cached=3)).finish_reason == "length"
    assert choice.num_cached_tokens == 3


def test_an_error_of_the_engine_is_raised_as_it_was():
    with pytest.raises(DeadlineExceeded, match="too slow"):
        Choice(tokenizer()).push(byte_ids("a"), None, {"error": DeadlineExceeded("too slow").to_wire()})


def test_an_abort_that_nobody_asked_for_is_an_error():
    with pytest.raises(EngineUnavailable):
        Choice(tokenizer()).push(byte_ids("a"), None, end("abort"))
