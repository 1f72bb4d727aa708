from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd.model.stop_strings import StopStrings

letters = st.text(alphabet="ab", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def expected(stops: list[str], include: bool, text: str) -> tuple[str, bool]:
    """By trying every prefix of the whole text."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include else end - max(map(len, complete))], True
    return text, False


def _held(stops: list[str], text: str) -> int:
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


@settings(deadline=None)
@given(stops=stop_lists, include=st.booleans(), text=letters, cuts=st.lists(st.integers(0, 24)))
@example(stops=["aab", "ab"], include=False, text="aaab", cuts=[1, 2, 3])
@example(stops=["abab", "ba"], include=False, text="aabab", cuts=[4])
def test_equals_the_oracle_however_the_text_is_cut(stops, include, text, cuts):
    watch = StopStrings(stops, include)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    given_out = ""
    stopped = False
    for a, b in itertools.pairwise(edges):
        piece, stopped = watch.push(text[a:b])
        given_out += piece
        assert stopped == expected(stops, include, text[:b])[1]
        if not stopped and not include:
            assert given_out == text[: b - _held(stops, text[:b])], "holds back what may become a stop, and no more"
    assert (given_out + watch.finish(), stopped) == expected(stops, include, text)


@settings(deadline=None)
@given(stops=stop_lists.filter(bool), text=letters)
def test_no_stop_string_is_ever_given_out(stops, text):
    watch = StopStrings(stops)
    given_out = "".join(watch.push(char)[0] for char in text) + watch.finish()
    assert not any(stop in given_out for stop in stops)


def test_text_after_the_stop_is_swallowed():
    watch = StopStrings(["END"])
    assert watch.push("one EN") == ("one ", False)
    assert watch.push("D two") == ("", True)
    assert watch.push("three END") == ("", True)
    assert watch.finish() == ""


def test_a_stop_string_that_stays_in_the_output_is_not_held_back():
    watch = StopStrings(["END"], include=True)
    assert watch.push("one EN") == ("one EN", False)
    assert watch.push("D two") == ("D", True)


def test_a_beginning_that_leads_nowhere_is_released():
    watch = StopStrings(["\n\nHuman:"])
    assert watch.push("a\n") == ("a", False)
    assert watch.push("\nHum") == ("", False)
    assert watch.push("ble") == ("\n\nHumble", False)
    assert watch.push("\n") == ("", False)
    assert watch.finish() == "\n"


def test_the_longest_of_those_complete_at_the_same_character_wins():
    assert StopStrings(["d", "bcd", "cd"]).push("abcde") == ("a", True)


def test_a_long_stop_string_costs_linear_time_and_memory():
    stop = "a" * 200_000 + "b"
    watch = StopStrings([stop])
    assert watch.push("a" * 300_000) == ("a" * 100_000, False)
    assert watch.push("b") == ("", True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
