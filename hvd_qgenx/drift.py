"""Whether gradients still look as they did when levels were fitted: what every message tells, and what follows.

Every rank sums up the same numbers in the same order and does no more with them than +, -, * and /, so that all ranks
decide alike, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from hvd_qgenx.backends import Drawn
from hvd_qgenx.codec import Codec

GROUPS = 4  # of level indices
KINDS_SEEN = 8  # of exchanges that are told apart
STRIKES = 2  # exchanges of a kind, one after another, that must deviate
HIGHER, LOWER = 1.25, 0.6  # variance over what it was
UNLIKE = 0.03  # see ``_are_unlike``
#: Refits on account of drift: one in so many iterations in the long run, and so many at once.
INTERVAL, BURST = 50, 4


class Sums(NamedTuple):
    """What the roundings of one message came to.

    Attributes:
        error, norm: ||Q(v) - v||^2 and ||v||^2 over what is finite.
        groups: how many indices of each of ``GROUPS`` groups were drawn, see ``group_ends``.
        mean_error, mean_norm: as the first two, of the second rounding in a two-phase exchange.
    """

    error: float = 0.0
    norm: float = 0.0
    groups: tuple[int, ...] = (0,) * GROUPS
    mean_error: float = 0.0
    mean_norm: float = 0.0

    @classmethod
    def of(cls, codec: Codec, drawn: Drawn, mean: Drawn | None = None) -> Sums:
        """Of this rank's own vectors, and of the mean that it owns."""
        counts, ends = drawn.counts.tolist(), group_ends(codec.counts)
        groups = tuple(sum(counts[start:end]) for start, end in zip((0, *ends), (*ends, None), strict=True))
        second = (mean.squared_error, mean.squared_norm) if mean else (0.0, 0.0)
        return cls(drawn.squared_error, drawn.squared_norm, groups, *second)

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        """The sum, one after another."""
        total = cls()
        for part in parts:
            groups = tuple(a + b for a, b in zip(total.groups, part.groups, strict=True))
            total = cls(
                total.error + part.error, total.norm + part.norm, groups,
                total.mean_error + part.mean_error, total.mean_norm + part.mean_norm,
            )  # fmt: skip
        return total


@lru_cache(maxsize=64)
def group_ends(counts: tuple[int, ...] | None) -> tuple[int, ...]:
    """Where all groups but the last end: index 0 is one, the others are three with about equal ``counts``."""
    if counts is None:
        return (1, 2, 3)
    ends, before, target = [1], 0, sum(counts[1:])
    for index, count in enumerate(counts[1:], start=1):
        before += count
        while len(ends) < GROUPS - 1 and before * (GROUPS - 1) >= target * len(ends):
            ends.append(index + 1)
    return tuple(ends)


class Drift:
    """What exchanges are like since the last fit, by their kind, and whether levels are to be fitted again.

    What the first exchange of a kind was like is what later ones are compared with. Its kind is its half-step and how
    many coordinates it has: the gradients of two players, or of two half-steps, need not be alike.
    """

    def __init__(self) -> None:
        #: Whether levels, or those of the second rounding, are to be fitted at the next iteration.
        self.refit = self.refit_mean = False
        #: Whether a fit was due that found nothing to fit to.
        self.waits = False
        self._free_at = 0
        # Of every kind: the variances of both roundings, how often each deviated just now, shares of the groups.
        self._seen: dict[str, list[float]] = {}

    def start(self) -> None:
        """Levels have been fitted."""
        self.refit, self.waits, self._seen = False, False, {}

    def wait(self) -> None:
        """Levels were to be fitted, and there was nothing to fit them to: the next exchange that has something asks."""
        self.refit, self.waits = False, True

    def start_mean(self) -> None:
        """Those of the second rounding have been fitted."""
        self.refit_mean = False
        for seen in self._seen.values():
            seen[1], seen[3] = 0.0, 0

    def take(self, iteration: int) -> None:
        """Levels are fitted on account of drift: ``INTERVAL`` and ``BURST`` say how often that may be."""
        self._free_at = max(self._free_at, iteration) + INTERVAL

    def observe(self, kind: str, sums: Sums, codec: Codec, iteration: int, is_fitted: bool) -> None:
        """Looks at the sums of an exchange over ranks and parts; ``iteration`` is the one that comes next."""
        symbols = sum(sums.groups)
        if symbols == 0 or sums.norm == 0.0:
            return
        if not is_fitted:
            self.refit = self.waits
            return
        now, now_mean = _ratio(sums.error, sums.norm), _ratio(sums.mean_error, sums.mean_norm)
        shares = [count / symbols for count in sums.groups]
        seen = self._kept(kind, [now, now_mean, 0, 0, *shares])
        seen[1] = seen[1] or now_mean  # there is none in the exchange that fits its levels
        noise = _noise(codec, symbols)
        deviates = _is_another(now, seen[0], noise) or _are_unlike(shares, seen[4:], symbols, codec.bucket_size)
        seen[2] = seen[2] + 1 if deviates else 0
        seen[3] = seen[3] + 1 if now_mean and _is_another(now_mean, seen[1], noise) else 0
        may = self._free_at - (BURST - 1) * INTERVAL <= iteration
        self.refit = self.refit or (may and seen[2] >= STRIKES)
        self.refit_mean = self.refit_mean or (may and seen[3] >= STRIKES)

    def _kept(self, kind: str, now: list[float]) -> list[float]:
        """What is known of a kind; of a new one, how it is now."""
        if kind not in self._seen:
            if len(self._seen) == KINDS_SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[kind] = now
        return self._seen[kind]

    def state_dict(self) -> dict:
        """Plain numbers, equal on all ranks; it changes only when levels are fitted or gradients deviate."""
        seen = {kind: list(values) for kind, values in self._seen.items()}
        flags = {"refit": self.refit, "refit_mean": self.refit_mean, "waits": self.waits}
        return {**flags, "free_at": self._free_at, "seen": seen}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly."""
        self.refit, self.refit_mean, self.waits = state["refit"], state["refit_mean"], state["waits"]
        self._free_at = state["free_at"]
        self._seen = {kind: list(values) for kind, values in state["seen"].items()}


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0


def _noise(codec: Codec, symbols: int) -> float:
    """What a few coordinates that happen to be rounded over the widest gap add to a relative variance."""
    levels = codec.levels.values
    widest = max(high - low for low, high in pairwise(levels))
    return 4.0 * widest * widest * codec.bucket_size / symbols


def _is_another(now: float, then: float, noise: float) -> bool:
    return now > HIGHER * then + noise or now < LOWER * then - noise


def _are_unlike(now: Sequence[float], then: Sequence[float], symbols: int, bucket_size: int) -> bool:
    """Whether shares differ by sum (a - b)^2 / (a + b) more than by chance, of draws and of buckets.

    ``UNLIKE`` of 1 - sum b^2, so that where nearly all are in one group the others count.
    """
    distance, spread = 0.0, 1.0
    # Step by step: Python's own sum rounds otherwise from version 3.12 on.
    for a, b in zip(now, then, strict=True):
        distance += (a - b) * (a - b) / (a + b) if a + b else 0.0
        spread -= b * b
    return distance > UNLIKE * spread + (10.0 + bucket_size / 10.0) / symbols
