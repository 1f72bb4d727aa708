"""Stop strings matched in a stream of text. What is given out, and when the stream stops, depends on the text alone
and never on how it was cut into pieces. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one stream for several stop strings.

    The stop string that is complete first wins; of several that are complete at the same character, the longest.
    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    __slots__ = ("_fallbacks", "_held", "_include", "_matched", "_stopped", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` keeps the matched stop string in the output. Raises ValueError for an empty stop string."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._fallbacks = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text to give out, whether the stream has stopped). After a stop all further text is swallowed."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        if not any(self._matched) and not any(stop[0] in text for stop in self._stops):
            return text, False
        whole = self._held + text
        end, longest = self._advance(text)
        if longest:
            self._stopped = True
            end += len(self._held)
            self._held = ""
            return whole[: end if self._include else end - longest], True
        # A stop string that stays in the output may go out piece by piece: nothing needs to be held back for it.
        keep = len(whole) if self._include else len(whole) - max(self._matched)
        self._held = whole[keep:]
        return whole[:keep], False

    def finish(self) -> str:
        """The stream ended by itself: the text still held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, text: str) -> tuple[int, int]:
        """Match on (Knuth-Morris-Pratt, one state per stop string). Returns the end of the first match within `text`
        and the length of the longest stop string that ends there; length 0 when there is none."""
        matched = self._matched
        for position, char in enumerate(text):
            longest = 0
            for k, stop in enumerate(self._stops):
                state = matched[k]
                while state and stop[state] != char:
                    state = self._fallbacks[k][state]
                if stop[state] == char:
                    state += 1
                    if state == len(stop):
                        longest = max(longest, state)
                matched[k] = state
            if longest:
                return position + 1, longest
        return 0, 0


def _borders(stop: str) -> list[int]:
    """By n: the length of the longest proper prefix of stop[:n] that also ends it."""
    table = [0] * len(stop)
    state = 0
    for n in range(1, len(stop) - 1):
        while state and stop[n] != stop[state]:
            state = table[state]
        if stop[n] == stop[state]:
            state += 1
        table[n + 1] = state
    return table
