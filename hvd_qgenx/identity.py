"""Which optimizer a message belongs to: a number made of what it exchanges, not of when it was made.

Ranks need not make the same optimizers. Two whose words are equal (names, shapes, process set) are told apart by a
place among those that are alive in this process.
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Sequence
from typing import NamedTuple

#: By words: those that are alive, each at its place.
_ALIVE: dict[str, list[weakref.ref]] = {}
_LABELS: dict[int, str] = {}


class Identity(NamedTuple):
    """What tells an optimizer or compressor from others.

    Attributes:
        number: 32 bits, the same on all ranks.
        line: for the description that ranks compare.
    """

    number: int
    line: str


def identify(owner: object, words: Sequence[str], label: str) -> Identity:
    """The identity of ``owner`` among those with the same words; asked again with the same words it stays the same.

    Args:
        owner: held weakly: its place is free again when it is gone.
        words: what it exchanges, and with whom.
        label: for messages.
    """
    joined = "\n".join(words)
    place = _place(_ALIVE.setdefault(joined, []), owner)
    digest = hashlib.blake2b(f"{place}\n{joined}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    which = label if place == 0 else f"{label} (number {place + 1} of those with its names and shapes)"
    _LABELS[number] = which
    return Identity(number, f"the exchange of {which}")


def label_of(number: int) -> str:
    """What this process knows of a number that another rank sent."""
    return _LABELS.get(number, f"one that is not known here ({number:08x})")


def _place(kept: list[weakref.ref], owner: object) -> int:
    """The place that ``owner`` has, or else the lowest that is free."""
    alive = _alive(kept)
    if not any(other is owner for other in alive) and any(other is not None for other in alive):
        # What is garbage would else count on one rank and not on another, as collections happen to fall.
        gc.collect()
        alive = _alive(kept)
    for index, other in enumerate(alive):
        if other is owner:
            return index
    free = next((index for index, other in enumerate(alive) if other is None), len(alive))
    kept[free : free + 1] = [weakref.ref(owner)]
    return free


def _alive(kept: list[weakref.ref]) -> list[object | None]:
    return [one() for one in kept]
