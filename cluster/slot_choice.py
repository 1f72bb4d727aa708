"""Which slot of a placement a newcomer gets: one where it does most good. Pure; knows nothing of how a placement is
made or of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from .errors import PlacementError
from .expert_map import Expert
from .leases import Lease
from .sizes import format_size
from .waiting_room import Asker


def choose_slot(
    asker: Asker,
    slots: Sequence[Sequence[Expert]],
    num_bytes: Callable[[Iterable[Expert]], int],
    leases: Collection[Lease],
    *,
    may_mirror: bool,
) -> int | None:
    """In this order: the slot whose experts the asker still holds, unless another shard serves it; a vacant slot; where
    `may_mirror`, beside the fewest others. Vacant slots whose experts nobody has come first, then those with few copies
    of theirs on the asker's node, then large ones. `num_bytes`: what experts take. None: nothing is vacant. Raises
    PlacementError."""
    holders = Counter(lease.slot for lease in leases)
    serving = {lease.slot for lease in leases if lease.is_serving}
    same = [slot for slot, experts in enumerate(slots) if asker.hosted and tuple(experts) == asker.hosted]
    unserved = [slot for slot in same if slot not in serving]
    if unserved:  # It can serve at once, even where another one is loading.
        return min(unserved, key=lambda slot: (holders[slot], slot))
    held = {expert for lease in leases for expert in lease.experts}
    nearby = {expert for lease in leases if lease.node_id == asker.node_id for expert in lease.experts}

    def vacant_rank(slot: int) -> tuple[float, int, int, int]:
        experts = frozenset(slots[slot])
        return (-len(experts - held) / max(len(experts), 1), len(experts & nearby), -len(experts), slot)

    def mirror_rank(slot: int) -> tuple[int, int, int]:
        return (holders[slot], len(nearby.intersection(slots[slot])), slot)

    taken = {slot: num_bytes(experts) for slot, experts in enumerate(slots)}
    vacant = [slot for slot in taken if not holders[slot]]
    if vacant:
        return min(_fitting(vacant, taken, asker), key=vacant_rank)
    if may_mirror:
        return min(_fitting(same or taken, taken, asker), key=mirror_rank)
    return None


def _fitting(slots: Iterable[int], taken: dict[int, int], asker: Asker) -> list[int]:
    """Those of `slots` that the asker has room for. Raises PlacementError when there are none."""
    room = asker.capacity_bytes
    if room is None:
        return list(slots)
    fitting = [slot for slot in slots if taken[slot] <= room]
    if not fitting:
        least = min(taken[slot] for slot in slots)
        raise PlacementError(
            f"shard {asker.shard_id} has room for {format_size(room)} of experts; the smallest share that it could "
            f"take needs {format_size(least)}, {format_size(least - room)} more"
        )
    return fitting
