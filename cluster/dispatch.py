"""`Dispatcher`, the expert backend whose experts live in shards: groups a layer's rows by shard, sends each shard one
call, takes replies as they come, and sends rows elsewhere when a shard breaks, refuses or is late.

One thread calls `dispatch`, `collect` and `abandon`; maps and channels come from others and are taken in between calls.
Sending rows twice is safe: replicas give equal bits, and of each part only the first result is taken.

Shapes: N routed rows sorted by expert, D hidden, E experts."""

from __future__ import annotations

import itertools
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.experts import ExpertsUnavailable
from .channel_pool import Connect
from .dispatch_counters import DispatchCounters
from .dispatch_link import Flight, Link, Part, Pending, Span
from .errors import ExpertUnavailable
from .expert_frames import Kind
from .expert_map import Expert, ExpertMap
from .experts_config import ExpertsConfig
from .row_split import choose_links, split_spans
from .shard_links import ShardLinks
from .transport import Call, PeerLost, Reply

_BUSY_PAUSE_S = 0.005
"""How long a part rests that a shard had no room or time for and that nobody else hosts."""
_MAX_FAILURES = 3
"""Errors after which a part's requests end, and a shard is chosen last."""
_LONGEST_WAIT_S = 1.0


class Dispatcher:
    """Expert backend over shards. Make it, `update` it with a map, `wait_complete`, then use it."""

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        experts: Sequence[Expert],
        connect: Connect,
        on_failed: Callable[[str, str], None] = lambda shard_id, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`experts`: all that the model has. `connect` makes a channel (see `transport_connect.py`), on another thread.
        `on_failed(shard_id, reason)`: a shard cannot be reached; from another thread, too."""
        self._config = config
        self._clock = clock
        self._links = ShardLinks(experts, connect, on_failed, clock)
        self._pendings: set[Pending] = set()
        self._resting: deque[tuple[float, Part]] = deque()
        self._call_ids = itertools.count(1)
        self._counters = DispatchCounters()
        self._stopping = threading.Event()

    @property
    def epoch(self) -> int:
        """Version of the map that steps use now."""
        return self._links.map.epoch

    def update(self, map: ExpertMap) -> None:
        """Follow another map, from any thread. Its channels are used as they get connected."""
        self._links.update(map)

    def wait_complete(self, timeout_s: float) -> None:
        """Return once every expert can be reached. Raises ExpertUnavailable after `timeout_s`. Before the first
        dispatch, or from the thread that dispatches."""
        deadline = self._clock() + timeout_s
        self._take_news()
        while self._links.missing_since and not self._stopping.is_set():
            left_s = deadline - self._clock()
            if left_s <= 0:
                raise ExpertUnavailable(self._missing_text(timeout_s))
            self._wait(left_s)

    def stats(self) -> dict[str, float]:
        """Counters and gauges; safe from any thread."""
        links = self._links
        return self._counters.figures() | {
            "epoch": self.epoch,
            "shards_connected": len(links),
            "missing": len(links.missing_since),
            "connect_faults": links.connect_faults,
        }

    def stop(self) -> None:
        """End any wait, now and later, with ExpertsUnavailable; from any thread."""
        self._stopping.set()
        self._links.wake()

    def close(self) -> None:
        """Close every channel, after the last dispatch."""
        self._links.close()

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Pending:
        """See `ExpertBackend.dispatch`."""
        if self._links.has_news:
            self._take_news()
        pending = Pending(layer, rows_ND, torch.empty_like(rows_ND), rows_ND.shape[0])
        self._pendings.add(pending)
        spans, start = [], 0
        for expert, count in enumerate(counts_E):
            if count:
                spans.append(Span(expert, start, start + count))
                start += count
        self._counters.layers += 1
        self._assign(pending, spans)
        return pending

    def collect(self, pending: Pending) -> Tensor:
        """See `ExpertBackend.collect`."""
        began = self._clock()
        try:
            while pending.rows_left:
                if pending.failure is not None:
                    raise pending.failure
                if self._stopping.is_set():
                    raise ExpertsUnavailable("the engine is stopping", range(pending.rows_ND.shape[0]))
                if pending.homeless:
                    self._give_up_expired(pending)
                self._wait(_LONGEST_WAIT_S, pending)
        finally:
            self._finish(pending)
            self._counters.wait_s += self._clock() - began
        return pending.out_ND

    def abandon(self) -> None:
        """See `ExpertBackend.abandon`."""
        for pending in list(self._pendings):
            self._finish(pending)

    def refresh(self) -> None:
        """See `ExpertBackend.refresh`: connections that broke are let go of, new ones taken up."""
        self._wait(0.0)

    def _finish(self, pending: Pending) -> None:
        pending.over = True
        self._pendings.discard(pending)

    # --- sending

    def _assign(self, pending: Pending, spans: Sequence[Span], like: Part | None = None) -> list[Part]:
        """Send spans to the shards with the shortest queues, longest span first; those without a shard wait in
        `pending.homeless`. `like`: the part that they were in before, which says what was tried. Returns the parts."""
        tried = like.tried if like is not None else frozenset()
        chosen, homeless = choose_links(self._links.hosts, pending.layer, spans, tried)
        pending.homeless += homeless
        parts = []
        for link, mine in chosen.items():
            for piece in split_spans(mine, link.channel.max_rows):
                part = Part(pending, piece, sum(span.num_rows for span in piece), tried=tried)
                if like is not None:
                    part.attempt, part.failures = like.attempt + 1, like.failures
                parts.append(part)
                self._send(link, part)
        return parts

    def _send(self, link: Link, part: Part) -> None:
        """Put a part on its way, or in line behind the calls under way."""
        if link not in self._links:  # broke a moment ago, under another part of the same layer
            self._send_again(part)
            return
        part.tried |= {link.shard_id}
        link.rows_out += part.num_rows
        if len(link.flights) >= link.channel.max_calls:
            link.backlog.append(part)
        else:
            self._submit(link, part)

    def _submit(self, link: Link, part: Part) -> None:
        config, now, call_id, ranges = self._config, self._clock(), next(self._call_ids), part.ranges
        # What was late once may be a slow cluster: the more often, the more patience.
        late_s = config.call_timeout_s * 2 ** min(part.attempt, 8)
        look_s = late_s if config.hedge_after_s is None else min(late_s, config.hedge_after_s)
        link.flights[call_id] = Flight(part, ranges, self.epoch, now, now + look_s)
        # Where nobody else can take over, a shard shall rather be late than give up.
        timeout_s = late_s if self._elsewhere(part) else max(late_s, config.recovery_timeout_s)
        self._counters.calls += 1
        self._counters.rows += part.num_rows
        pending = part.pending
        call = Call(call_id, self.epoch, pending.layer, timeout_s, part.groups, pending.rows_ND, ranges)
        try:
            link.channel.submit(call)
        except PeerLost as error:
            self._lose(link, str(error))
            return
        self._links.watch_writing(link)

    def _elsewhere(self, part: Part) -> list[Span]:
        """Spans of a part that some shard hosts that was not asked for them yet."""
        hosts, layer = self._links.hosts, part.pending.layer
        return [
            span
            for span in part.spans_left
            if any(link.shard_id not in part.tried for link in hosts[layer, span.expert])
        ]

    # --- waiting

    def _wait(self, longest_s: float, pending: Pending | None = None) -> None:
        """Take what has arrived, waiting for it no longer than `longest_s` or until something is late. `pending`: whose
        experts' absence counts."""
        timeout_s = min(longest_s, max(0.0, self._next_check(pending) - self._clock()))
        woken, events = self._links.ready(timeout_s)
        if woken or self._links.has_news:
            self._take_news()
        for link, mask in events:
            if link in self._links:
                self._serve(link, mask)
        self._check_times()

    def _serve(self, link: Link, mask: int) -> None:
        channel = link.channel
        try:
            if mask & select.EPOLLOUT:
                channel.flush()
                self._links.watch_writing(link)
            replies = channel.poll()
        except PeerLost as error:
            self._lose(link, str(error))
            return
        for reply in replies:
            if link in self._links:
                self._take(link, reply)
        while link.backlog and len(link.flights) < channel.max_calls and link in self._links:
            part = link.backlog.popleft()
            if part.is_over:
                link.rows_out -= part.num_rows
            else:
                self._submit(link, part)
        if link.retired and not link.flights and link in self._links:
            self._links.drop(link)

    def _take(self, link: Link, reply: Reply) -> None:
        flight = link.flights.pop(reply.call_id, None)
        if flight is None:
            link.channel.drop(reply)
            return
        part, pending = flight.part, flight.part.pending
        link.rows_out -= part.num_rows
        link.load = reply.load
        if reply.kind is Kind.RESULT:
            link.errors = 0
        elif reply.kind is Kind.ERROR:
            link.errors += 1
        # Not at the first: a shard counts its faults too, and asks to be replaced.
        link.suspect = link.errors >= _MAX_FAILURES
        if part.is_over or reply.kind is not Kind.RESULT:
            link.channel.drop(reply)
            if not part.is_over:
                self._refused(link, flight, reply)
            return
        link.channel.take(reply, pending.out_ND, flight.ranges)
        pending.complete(part)
        self._counters.hedge_wins += part.is_hedge

    def _refused(self, link: Link, flight: Flight, reply: Reply) -> None:
        """A shard answered without computing: try elsewhere, or there again."""
        part = flight.part
        if reply.kind is Kind.STALE_MAP:
            self._counters.stale += 1
            if flight.epoch == self.epoch:  # else it speaks of a map that is no longer ours
                link.refused.update((part.pending.layer, span.expert) for span in part.spans)
                self._links.find_hosts()
        elif reply.kind is Kind.BUSY:
            self._counters.busy += 1
            if len(self._elsewhere(part)) < len(part.spans_left):
                self._resting.append((self._clock() + _BUSY_PAUSE_S, part))
                return
        else:
            self._counters.errors += 1
            part.failures += 1
            if part.failures >= _MAX_FAILURES:
                message = f"a shard failed to compute its experts: {reply.message}"
                part.pending.failure = ExpertsUnavailable(message, _rows(part.spans))
                return
        self._send_again(part)

    def _send_again(self, part: Part) -> None:
        """Give a part that no shard works on any more to others, if there are any."""
        if part.is_over:
            return
        spans = part.spans_left
        part.done = True  # its spans live on in other parts
        if spans:
            self._counters.retries += 1
            self._assign(part.pending, spans, part)

    # --- failures

    def _next_check(self, pending: Pending | None) -> float:
        """When something may be late, rested or given up."""
        times = [flight.check_at for link in self._links for flight in link.flights.values()]
        times += [at for at, _ in self._resting]
        if pending is not None:
            since, patience_s = self._links.missing_since, self._config.recovery_timeout_s
            keys = ((pending.layer, span.expert) for span in pending.homeless)
            times += [since[key] + patience_s for key in keys if key in since]
        return min(times, default=float("inf"))

    def _check_times(self) -> None:
        """See to calls that are late and to parts that have rested."""
        now = self._clock()
        while self._resting and self._resting[0][0] <= now:
            self._send_again(self._resting.popleft()[1])
        for link in self._links:
            for flight in [f for f in link.flights.values() if f.check_at <= now]:
                if link in self._links:
                    self._look_after(link, flight, now)

    def _look_after(self, link: Link, flight: Flight, now: float) -> None:
        config, part = self._config, flight.part
        age_s, late_s = now - flight.sent_at, config.call_timeout_s * 2 ** min(part.attempt, 8)
        late = age_s >= late_s
        flight.check_at = now + config.call_timeout_s if late else flight.sent_at + late_s
        if late and not link.suspect:
            link.suspect = True
            self._counters.late += 1
            self._empty_backlog(link)
        if late and (link.retired or age_s >= config.recovery_timeout_s + late_s):
            # Nobody expects it back: let its experts count as missing since then, and wait for whoever replaces it.
            self._lose(link, f"no answer for {age_s:.1f} s", since=flight.sent_at)
        elif not part.is_over and (late or self._may_hedge()):
            spans = self._elsewhere(part)
            if spans:
                self._repeat(part, spans, hedge=not late)

    def _repeat(self, part: Part, spans: Sequence[Span], hedge: bool) -> None:
        """Have some of a late part's rows computed elsewhere as well; whoever answers first counts."""
        self._counters.hedges += hedge
        self._counters.retries += not hedge
        part.pending.repeat()
        part.repeated |= frozenset(spans)
        for repeat in self._assign(part.pending, spans, part):
            repeat.is_hedge = hedge

    def _empty_backlog(self, link: Link) -> None:
        """What waits behind a late call need not."""
        parts = list(link.backlog)
        link.backlog.clear()
        for part in parts:
            link.rows_out -= part.num_rows
            self._send_again(part)

    def _may_hedge(self) -> bool:
        return self._counters.hedges < self._config.hedge_share * self._counters.calls

    def _lose(self, link: Link, reason: str, since: float | None = None) -> None:
        """A connection broke: everything it carried goes elsewhere at once."""
        if link not in self._links:
            return
        self._counters.lost_shards += 1
        parts = [flight.part for flight in link.flights.values()] + list(link.backlog)
        self._links.lost(link, reason)
        missing = self._links.missing_since
        for expert in link.hosted if since is not None else ():
            if expert in missing:
                missing[expert] = min(missing[expert], since or 0.0)
        for part in parts:
            self._send_again(part)

    def _give_up_expired(self, pending: Pending) -> None:
        """End the wait for experts that have been missing for too long."""
        since, oldest = self._links.missing_since, self._clock() - self._config.recovery_timeout_s
        expired = [span for span in pending.homeless if since.get((pending.layer, span.expert), oldest + 1) <= oldest]
        if expired:
            self._counters.failed_layers += 1
            raise ExpertsUnavailable(self._missing_text(self._config.recovery_timeout_s), _rows(expired))

    def _missing_text(self, waited_s: float) -> str:
        missing = sorted(self._links.missing_since)
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"no shard hosts expert {named}{more}; none came within {waited_s:g} s"

    def _take_news(self) -> None:
        """Follow the present map and channels: whoever waited for them goes on."""
        self._links.take_news()
        now = self._clock()
        for link in self._links:
            if link.suspect:
                for flight in link.flights.values():
                    flight.check_at = now  # somebody new may take over
        for pending in list(self._pendings):
            spans, pending.homeless = pending.homeless, []
            if spans:
                self._assign(pending, spans)


def _rows(spans: Sequence[Span]) -> list[int]:
    return [row for span in spans for row in range(span.start, span.end)]
