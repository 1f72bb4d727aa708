"""Which rows of a layer go to which shard, in which calls. Pure functions of queues as they are now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .dispatch_link import Link, Span
from .expert_map import Expert


def choose_links(
    hosts: Mapping[Expert, Sequence[Link]], layer: int, spans: Sequence[Span], avoid: Collection[str]
) -> tuple[dict[Link, list[Span]], list[Span]]:
    """Each span to the host with the shortest queue, longest span first, shards of `avoid` only where there is no
    other: (spans in row order by link, spans that nobody hosts)."""
    chosen: dict[Link, list[Span]] = {}
    extra: dict[Link, int] = {}
    homeless = []
    for span in sorted(spans, key=lambda span: span.start - span.end):
        links = hosts[layer, span.expert]
        if len(links) > 1:
            links = [link for link in links if link.shard_id not in avoid] or links
            link = min(links, key=lambda link: link.order(extra.get(link, 0)))
        elif links:
            link = links[0]
        else:
            homeless.append(span)
            continue
        chosen.setdefault(link, []).append(span)
        extra[link] = extra.get(link, 0) + span.num_rows
    for mine in chosen.values():
        mine.sort(key=lambda span: span.start)
    return chosen, homeless


def split_spans(spans: list[Span], max_rows: int) -> list[list[Span]]:
    """Cut ascending spans into lists of at most `max_rows` rows."""
    lists: list[list[Span]] = []
    room = 0
    for expert, start, end in spans:
        while start < end:
            if room == 0:
                lists.append([])
                room = max_rows
            count = min(room, end - start)
            lists[-1].append(Span(expert, start, start + count))
            start, room = start + count, room - count
    return lists
