"""The shards that one engine can reach now: connections, the map they are seen through, and who hosts each expert.
Takes maps and channels from other threads; everything else belongs to the thread that dispatches. Knows no rows."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from .channel_pool import ChannelPool, Connect
from .dispatch_link import Link
from .expert_map import Expert, ExpertMap
from .transport import Channel


class ShardLinks:
    """Links by shard, and `hosts` by expert. `update` is for any thread."""

    def __init__(
        self,
        experts: Sequence[Expert],
        connect: Connect,
        on_failed: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._experts = tuple(experts)
        self._clock = clock
        self.map = ExpertMap(0, "", "")
        self.hosts: dict[Expert, tuple[Link, ...]] = dict.fromkeys(self._experts, ())
        self.missing_since = dict.fromkeys(self._experts, clock())
        """Experts that nobody connected hosts, and since when."""
        self._links: dict[str, Link] = {}
        self._by_fd: dict[int, Link] = {}
        self._news: deque[ExpertMap | tuple[str, Channel]] = deque()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._pool = ChannelPool(connect, on_channel=self._offer, on_failed=on_failed, clock=clock)

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def __contains__(self, link: Link) -> bool:
        return self._links.get(link.shard_id) is link

    @property
    def connect_faults(self) -> int:
        """Unexpected errors while connecting."""
        return self._pool.faults

    @property
    def has_news(self) -> bool:
        """Whether `take_news` would change anything."""
        return bool(self._news)

    def update(self, map: ExpertMap) -> None:
        """Follow another map, from any thread. Its channels are used as they get connected."""
        self._news.append(map)
        self._pool.update(map)
        self.wake()

    def wake(self) -> None:
        """End a `ready` that waits, from any thread."""
        os.eventfd_write(self._wake, 1)

    def ready(self, timeout_s: float) -> tuple[bool, list[tuple[Link, int]]]:
        """Wait for news or replies: (whether `wake` was called, links with their epoll events)."""
        woken, events = False, []
        for fd, mask in self._epoll.poll(timeout_s):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                woken = True
            elif fd in self._by_fd:
                events.append((self._by_fd[fd], mask))
        return woken, events

    def watch_writing(self, link: Link) -> None:
        """Report room in the link's socket as long as it has something to write."""
        writing = link.channel.wants_write()
        if writing != link.writing:
            link.writing = writing
            self._epoll.modify(link.channel.fileno(), select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    def take_news(self) -> None:
        """Take in the maps and channels that came since the last call."""
        while self._news:
            news = self._news.popleft()
            if isinstance(news, ExpertMap):
                self.map = news
            else:
                self._attach(*news)
        for link in self:
            hosted = self.map.hosted.get(link.shard_id)
            link.retired = hosted is None
            link.refused.clear()  # under the new map it may say yes
            if hosted is not None:
                link.hosted = frozenset(hosted)
            elif not link.flights:
                self._remove(link)
        self.find_hosts()

    def lost(self, link: Link, reason: str) -> None:
        """Drop a link that broke; it is connected again while the map has it."""
        self.drop(link)
        self._pool.lost(link.shard_id, reason)

    def drop(self, link: Link) -> None:
        """Close a link."""
        self._remove(link)
        self.find_hosts()

    def find_hosts(self) -> None:
        """Work out anew who can be asked for each expert."""
        found: dict[Expert, list[Link]] = {expert: [] for expert in self._experts}
        for link in self._links.values():
            if not link.retired:
                for expert in link.hosted - link.refused:
                    if expert in found:
                        found[expert].append(link)
        self.hosts = {expert: tuple(links) for expert, links in found.items()}
        since, now = self.missing_since, self._clock()
        self.missing_since = {expert: since.get(expert, now) for expert, links in found.items() if not links}

    def close(self) -> None:
        """Close every channel. From the dispatching thread, or after its end."""
        self._pool.close()
        for link in self:
            self._remove(link)
        while self._news:
            news = self._news.popleft()
            if isinstance(news, tuple):
                news[1].close()
        self._epoll.close()
        os.close(self._wake)

    def _offer(self, shard_id: str, channel: Channel) -> None:
        """The pool's thread."""
        self._news.append((shard_id, channel))
        self.wake()

    def _attach(self, shard_id: str, channel: Channel) -> None:
        endpoint = self.map.shards.get(shard_id)
        if endpoint is None or shard_id in self._links:
            channel.close()
            return
        link = Link(shard_id, endpoint.slot, channel, frozenset(self.map.hosted[shard_id]))
        self._links[shard_id] = self._by_fd[channel.fileno()] = link
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def _remove(self, link: Link) -> None:
        del self._links[link.shard_id]
        fd = link.channel.fileno()
        del self._by_fd[fd]
        self._epoll.unregister(fd)
        link.channel.close()
