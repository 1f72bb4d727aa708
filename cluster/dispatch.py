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
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..model.experts import ExpertsUnavailable
from .channel_pool import Connect
from .dispatch_counters import DispatchCounters
from .dispatch_link import Flight, Link, Part, Pending, Span, split_spans
from .errors import ExpertUnavailable
from .expert_frames import Kind
from .expert_map import Expert, ExpertMap
from .experts_config import ExpertsConfig
from .shard_links import ShardLinks
from .transport import Call, PeerLost, Reply

_BUSY_PAUSE_S = 0.005
"""How long a part rests that a shard had no room or time for and that nobody else hosts."""
_MAX_FAILURES = 3
"""Errors of shards after which a part's requests end."""
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
                self._wait(_LONGEST_WAIT_S)
        finally:
            self._finish(pending)
            self._counters.wait_s += self._clock() - began
        return pending.out_ND

    def abandon(self) -> None:
        """See `ExpertBackend.abandon`."""
        for pending in list(self._pendings):
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        pending.over = True
        self._pendings.discard(pending)

    # --- sending

    def _assign(
        self, pending: Pending, spans: list[Span], avoid: Collection[str] = (), last: Part | None = None
    ) -> None:
        """Send spans to the shards with the shortest queues, longest span first; those without a shard wait in
        `pending.homeless`. `last`: the part they were in before."""
        hosts, layer = self._links.hosts, pending.layer
        chosen: dict[Link, list[Span]] = {}
        extra: dict[Link, int] = {}
        for span in sorted(spans, key=_length, reverse=True):
            links = hosts[layer, span.expert]
            if len(links) > 1:
                allowed = [link for link in links if link.shard_id not in avoid] or links
                link = min(allowed, key=lambda link: link.order(extra.get(link, 0)))
            elif links:
                link = links[0]
            else:
                pending.homeless.append(span)
                continue
            chosen.setdefault(link, []).append(span)
            extra[link] = extra.get(link, 0) + _length(span)
        for link, mine in chosen.items():
            mine.sort(key=_start)
            for piece in split_spans(mine, link.channel.max_rows):
                part = Part(pending, piece, sum(map(_length, piece)))
                if last is not None:
                    part.attempt, part.failures = last.attempt + 1, last.failures
                self._send(link, part)

    def _send(self, link: Link, part: Part, hedge: bool = False) -> None:
        """Put a part on its way, or in line behind the calls under way."""
        if link not in self._links:  # broke a moment ago, under another part of the same layer
            self._assign(part.pending, part.spans, last=part)
            return
        part.flights += 1
        part.tried.add(link.shard_id)
        link.rows_out += part.num_rows
        if len(link.flights) >= link.channel.max_calls:
            link.backlog.append((part, hedge))
        else:
            self._submit(link, part, hedge)

    def _submit(self, link: Link, part: Part, hedge: bool) -> None:
        config, now, call_id, ranges = self._config, self._clock(), next(self._call_ids), part.ranges
        late_s = config.call_timeout_s
        look_s = late_s if hedge or config.hedge_after_s is None else min(late_s, config.hedge_after_s)
        link.flights[call_id] = Flight(part, link, ranges, now, now + look_s, hedge)
        # Where nobody else can take over, a shard shall rather be late than give up.
        patience_s = late_s * 2 ** min(part.attempt, 8) if self._others(link, part) else config.recovery_timeout_s
        self._counters.calls += 1
        self._counters.rows += part.num_rows
        pending, epoch, timeout_s = part.pending, self.epoch, max(patience_s, late_s)
        try:
            link.channel.submit(Call(call_id, epoch, pending.layer, timeout_s, part.groups, pending.rows_ND, ranges))
        except PeerLost as error:
            self._lose(link, str(error))
            return
        self._links.watch_writing(link)

    def _others(self, link: Link, part: Part) -> list[Link]:
        """Shards other than `link` that host all of a part and have not been tried with it."""
        layer, hosts = part.pending.layer, self._links.hosts
        return [
            other
            for other in hosts[layer, part.spans[0].expert]
            if other is not link
            and other.shard_id not in part.tried
            and all(other in hosts[layer, span.expert] for span in part.spans)
        ]

    # --- waiting

    def _wait(self, longest_s: float) -> None:
        """Take what has arrived, waiting for it no longer than `longest_s` or until something is late."""
        timeout_s = min(longest_s, max(0.0, self._next_check() - self._clock()))
        woken, events = self._links.ready(timeout_s)
        if woken:
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
            part, hedge = link.backlog.popleft()
            if part.is_over:
                self._land(link, part)
            else:
                self._submit(link, part, hedge)
        if link.retired and not link.flights and link in self._links:
            self._links.drop(link)

    def _take(self, link: Link, reply: Reply) -> None:
        flight = link.flights.pop(reply.call_id, None)
        link.suspect, link.load = False, reply.load
        if flight is None:
            link.channel.drop(reply)
            return
        part, pending = flight.part, flight.part.pending
        self._land(link, part)
        if part.is_over or reply.kind is not Kind.RESULT:
            link.channel.drop(reply)
            if not part.is_over:
                self._refused(link, part, reply)
            return
        link.channel.take(reply, pending.out_ND, flight.ranges)
        part.done = True
        pending.rows_left -= part.num_rows
        self._counters.hedge_wins += flight.hedge

    def _refused(self, link: Link, part: Part, reply: Reply) -> None:
        """A shard answered without computing: try elsewhere, or there again."""
        if reply.kind is Kind.STALE_MAP:
            self._counters.stale += 1
            link.refused.update((part.pending.layer, span.expert) for span in part.spans)
            self._links.find_hosts()
        elif reply.kind is Kind.BUSY:
            self._counters.busy += 1
            if not self._others(link, part):
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

    def _land(self, link: Link, part: Part) -> None:
        """A sending of `part` to `link` is over, one way or another."""
        part.flights -= 1
        link.rows_out -= part.num_rows

    def _send_again(self, part: Part) -> None:
        """Give a part that no shard works on any more to others, if there are any."""
        if part.is_over or part.flights:
            return
        part.done = True  # its spans live on in new parts
        self._counters.retries += 1
        self._assign(part.pending, part.spans, part.tried, last=part)

    # --- failures

    def _next_check(self) -> float:
        """When something may be late, rested or given up."""
        times = [flight.check_at for link in self._links for flight in link.flights.values()]
        times += [at for at, _ in self._resting]
        since, patience_s = self.missing_since, self._config.recovery_timeout_s
        for pending in self._pendings:
            keys = ((pending.layer, span.expert) for span in pending.homeless)
            times += [since[key] + patience_s for key in keys if key in since]
        return min(times, default=float("inf"))

    @property
    def missing_since(self) -> dict[Expert, float]:
        """Experts that no connected shard hosts, and since when."""
        return self._links.missing_since

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
        age_s = now - flight.sent_at
        late = age_s >= config.call_timeout_s
        flight.check_at = (now if late else flight.sent_at) + config.call_timeout_s
        if late and not link.suspect:
            link.suspect = True
            self._counters.late += 1
        if age_s >= config.recovery_timeout_s + config.call_timeout_s:
            self._lose(link, f"no answer for {age_s:.0f} s")
            return
        if part.is_over:
            return
        others = self._others(link, part)
        if others and (late or self._may_hedge()):
            self._counters.hedges += not late
            self._counters.retries += late
            self._send(min(others, key=lambda other: other.order(0)), part, hedge=not late)
        elif late and link.retired and part.flights == 1:
            # The router gave it up, too: let its experts count as missing, and wait for whoever replaces it.
            self._lose(link, "late, and no longer in the map")

    def _may_hedge(self) -> bool:
        return self._counters.hedges < self._config.hedge_share * self._counters.calls

    def _lose(self, link: Link, reason: str) -> None:
        """A connection broke: everything it carried goes elsewhere at once."""
        if link not in self._links:
            return
        self._counters.lost_shards += 1
        parts = [flight.part for flight in link.flights.values()] + [part for part, _ in link.backlog]
        self._links.lost(link, reason)
        for part in parts:
            part.flights -= 1
            self._send_again(part)

    def _give_up_expired(self, pending: Pending) -> None:
        """End the wait for experts that have been missing for too long."""
        since, oldest = self.missing_since, self._clock() - self._config.recovery_timeout_s
        expired = [span for span in pending.homeless if since.get((pending.layer, span.expert), oldest + 1) <= oldest]
        if expired:
            self._counters.failed_layers += 1
            raise ExpertsUnavailable(self._missing_text(self._config.recovery_timeout_s), _rows(expired))

    def _missing_text(self, waited_s: float) -> str:
        missing = sorted(self.missing_since)
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


def _length(span: Span) -> int:
    return span.end - span.start


def _start(span: Span) -> int:
    return span.start


def _rows(spans: Sequence[Span]) -> list[int]:
    return [row for span in spans for row in range(span.start, span.end)]
