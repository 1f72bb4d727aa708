"""Which engine should get a request: the one that most probably holds its prefix in cache, unless it is overloaded,
else the least loaded. Knows replicas by name only; knows nothing of Ray, HTTP or how a request is sent.

Counts are this caller's own: what it has assigned and not yet released."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

CHUNK_TOKENS = 64
MAX_CHUNKS = 64


def prefix_hashes(
    token_ids: Sequence[int], salt: str = "", *, chunk: int = CHUNK_TOKENS, limit: int = MAX_CHUNKS
) -> list[bytes]:
    """Chain hash over the first `limit` whole chunks of `chunk` tokens: two prompts share their first k hashes exactly
    if they share their first k chunks (and the salt). Empty for a prompt shorter than a chunk."""
    hashes: list[bytes] = []
    digest = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=8)
    for start in range(0, min(len(token_ids) // chunk, limit) * chunk, chunk):
        digest.update(array("q", islice(token_ids, start, start + chunk)).tobytes())
        hashes.append(digest.copy().digest())
    return hashes


class PrefixAffinity:
    """Remembers which replica was last given which prefix, in a bounded least-recently-used table."""

    def __init__(self, *, spill: int = 4, capacity: int = 65536) -> None:
        """`spill`: how many more requests in flight than the least loaded replica has a replica may have and still be
        chosen for its prefix. `capacity`: prefixes remembered."""
        if spill < 0 or capacity < 1:
            raise ValueError("spill must be >= 0 and capacity >= 1")
        self._spill = spill
        self._capacity = capacity
        self._owner_of: OrderedDict[bytes, str] = OrderedDict()
        self._in_flight: dict[str, int] = {}
        self._assigned: dict[str, str] = {}
        self._last_turn: dict[str, int] = {}
        self._turns = 0

    def rank(self, hashes: Sequence[bytes], candidates: Collection[str]) -> list[str]:
        """All `candidates`, best first. The head is the owner of the longest known prefix if it is not overloaded;
        the rest follow by load, of equals the one that has waited longest first."""
        by_load = sorted(candidates, key=lambda name: (self.in_flight(name), self._last_turn.get(name, 0)))
        if not by_load:
            return []
        allowed = self.in_flight(by_load[0]) + self._spill
        for owner in self._owners(hashes):
            if owner in candidates and self.in_flight(owner) <= allowed:
                by_load.remove(owner)
                return [owner, *by_load]
        return by_load

    def assign(self, request_id: str, replica: str, hashes: Sequence[bytes]) -> None:
        """Count the request against `replica` and remember its prefix there. Assigning again moves it."""
        self.release(request_id)
        self._assigned[request_id] = replica
        self._in_flight[replica] = self.in_flight(replica) + 1
        self._turns += 1
        self._last_turn[replica] = self._turns
        for key in hashes:
            self._owner_of[key] = replica
            self._owner_of.move_to_end(key)
        while len(self._owner_of) > self._capacity:
            self._owner_of.popitem(last=False)

    def release(self, request_id: str, replica: str | None = None) -> None:
        """The request is over. Given a replica, only if it is still assigned there; unknown ids are no error."""
        owner = self._assigned.get(request_id)
        if owner is None or (replica is not None and replica != owner):
            return
        del self._assigned[request_id]
        left = self._in_flight.get(owner, 0) - 1
        if left > 0:
            self._in_flight[owner] = left
        else:
            self._in_flight.pop(owner, None)

    def retain(self, replicas: Collection[str]) -> None:
        """Forget everything about replicas other than these."""
        for key in [key for key, owner in self._owner_of.items() if owner not in replicas]:
            del self._owner_of[key]
        for request_id in [r for r, owner in self._assigned.items() if owner not in replicas]:
            self.release(request_id)
        self._last_turn = {name: turn for name, turn in self._last_turn.items() if name in replicas}

    def replica_of(self, request_id: str) -> str | None:
        """Where a request that is not over was assigned."""
        return self._assigned.get(request_id)

    def in_flight(self, replica: str) -> int:
        return self._in_flight.get(replica, 0)

    def _owners(self, hashes: Sequence[bytes]) -> Iterator[str]:
        """Owners from the longest known prefix to the shortest."""
        return (self._owner_of[key] for key in reversed(hashes) if key in self._owner_of)
