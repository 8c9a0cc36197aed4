"""Which ranks share a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """What a rank knows of its host: its number there, how many ranks are there, and its number among hosts.

    The last one counts, of each local number, only the hosts that have it: it names a host where all have equally many.
    """

    local_rank: int
    local_size: int
    cross_rank: int


def group(places: Sequence[Place]) -> list[list[int]]:
    """The ranks of each host, from the places of all ranks in rank order.

    Raises:
        ValueError: if places do not say, since hosts have different numbers of ranks, not numbered host by host.
    """
    for groups in (_consecutive(places), _by_number(places)):
        if all(_is_host([places[rank] for rank in ranks]) for ranks in groups):
            return groups
    raise ValueError(
        "hierarchical=True cannot tell which ranks share a host: hosts have different numbers of ranks and these are "
        "not numbered host by host; give this rank's two process sets, hierarchical=(host, leaders)"
    )


def _consecutive(places: Sequence[Place]) -> list[list[int]]:
    groups: list[list[int]] = []
    for rank, place in enumerate(places):
        if place.local_rank == 0 or not groups:
            groups.append([])
        groups[-1].append(rank)
    return groups


def _by_number(places: Sequence[Place]) -> list[list[int]]:
    numbers = sorted({place.cross_rank for place in places})
    return [[rank for rank, place in enumerate(places) if place.cross_rank == number] for number in numbers]


def _is_host(places: Sequence[Place]) -> bool:
    """Whether they are all ranks of one host, in order."""
    is_whole = all(place.local_size == len(places) for place in places)
    return is_whole and [place.local_rank for place in places] == list(range(len(places)))


def check_hosts(ranks: Sequence[int], described: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raises ValueError unless the (host, leaders) that each of ``ranks`` gave are a division of them into hosts."""
    hosts = [list(host) for host, _ in described]
    leaders = sorted({host[0] for host in hosts if host})
    for rank, (host, led) in zip(ranks, described, strict=True):
        same = all(hosts[ranks.index(other)] == list(host) for other in host if other in ranks)
        if rank not in host or not set(host) <= set(ranks) or not same or list(led) != leaders:
            raise ValueError(
                "hierarchical must be two process sets, this rank's host and the first ranks of all hosts, whose hosts "
                f"hold every rank once: rank {rank} gave {list(host)} and {list(led)}"
            )
