"""Adaptive levels (QAda): settings, the statistics that ranks share, and the fit that all of them make alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from hvd_qgenx.backends.backend import FORMS
from hvd_qgenx.checks import check_choice, check_integer, check_integers, check_non_negative
from hvd_qgenx.codec import Codec
from hvd_qgenx.fitting import (
    BIN_EDGES,
    NUM_BINS,
    Distribution,
    companded,
    coordinate_descent,
    normal_distribution,
    spread,
    truncated_normal,
)
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import Levels, num_positive

LEVELS = ("adaptive", "uniform", "exponential")
NONFINITE = ("nan", "raise")
_COUNT_SCALE = 2**20


@dataclass(frozen=True)
class Settings:
    """What ``Compression.qgenx(...)`` was told, checked; equal on all ranks. See there for the meaning."""

    bits: int = 4
    levels: str | Levels = "adaptive"
    coder: str = "huffman"
    norm: str = "l2"
    bucket_size: int = 1024
    rounding: str = "stochastic"
    min_numel: int = 1024
    adapt_at: tuple[int, ...] = (0, 200, 1000, 5000)
    adapt_every: int = 10000
    seed: int = 0
    nonfinite: str = "nan"
    statistics: str = "histogram"
    rate_weight: float = 0.0

    def __post_init__(self):
        num_positive(self.bits)
        if not isinstance(self.levels, Levels):
            _check_levels(self.levels)
        elif self.levels.num_levels > num_positive(self.bits):
            most = num_positive(self.bits)
            raise ValueError(f"levels must be at most {most} for bits={self.bits}, got {self.levels.num_levels}")
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_integer("adapt_every", self.adapt_every, 0)
        check_choice("nonfinite", self.nonfinite, NONFINITE)
        check_choice("statistics", self.statistics, FORMS)
        object.__setattr__(self, "rate_weight", check_non_negative("rate_weight", self.rate_weight))
        object.__setattr__(self, "adapt_at", check_integers("adapt_at", self.adapt_at, 0))
        # What the codec refuses is refused when settings are made, not at the first exchange.
        self.codec()

    def codec(self, levels: Levels | None = None, counts: tuple[int, ...] | None = None) -> Codec:
        """The codec of these settings with fitted levels and counts, or with those before any fit."""
        levels = levels or self._first_levels()
        return Codec(levels, self.coder, self.bucket_size, self.norm, self.rounding, counts, self.min_numel)

    def _first_levels(self) -> Levels:
        if isinstance(self.levels, Levels):
            return self.levels
        return Levels.uniform(self.bits) if self.levels == "uniform" else Levels.exponential(self.bits)

    def adapts(self, iteration: int) -> bool:
        """Whether levels are fitted at the start of this iteration (counted from 0)."""
        if self.levels != "adaptive":
            return False
        return iteration in self.adapt_at or (
            self.adapt_every > 0 and iteration > 0 and not iteration % self.adapt_every
        )

    @property
    def follows_drift(self) -> bool:
        """Whether levels are fitted again when gradients are no longer like those that they were fitted to."""
        return self.levels == "adaptive" and bool(self.adapt_at or self.adapt_every)

    def describe(self) -> list[str]:
        """One line for each setting, for ranks to compare."""
        return [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)]

    def typical_codec(self) -> Codec:
        """About the codec that adaptation finds for normal coordinates: in a few milliseconds, and without a vector."""
        if self.levels != "adaptive":
            return self.codec()
        return self.codec(_typical_levels(self.bits, self.norm, self.bucket_size))


@lru_cache(maxsize=64)
def _typical_levels(bits: int, norm: str, bucket_size: int) -> Levels:
    """The fit itself, where levels are few; it takes a second for 127 of them, and companding comes near."""
    search = coordinate_descent if num_positive(bits) <= 7 else companded
    return Levels(tuple(spread(search(normal_distribution(norm, bucket_size), num_positive(bits))))).short()


def _check_levels(levels: str) -> None:
    if not (isinstance(levels, str) and levels in LEVELS):
        raise ValueError(f"levels must be one of {', '.join(map(repr, LEVELS))} or a Levels, got {levels!r}")


@dataclass(frozen=True)
class Statistics:
    """What ranks share of their normalised coordinates r = v_i / norm, all integers, of a size that is always the same.

    "histogram": two histograms of |r|, ``NUM_BINS`` integers each; a message of 8,216 bytes. "normal": two times the
    sums of w, w r and w r^2, to which a truncated normal distribution is fitted; a message of 56 bytes. Behind its
    envelope and padded, 8,448 and 176 bytes are handed to the allgather, whatever the gradient's length.

    ``weighted`` weighs coordinates by the squared norm of their bucket, in units of 2**exponent; ``plain`` counts them
    (in units of 2**-16 under "normal"). The first decides levels (the variance that they cause is proportional to it),
    the second code lengths.
    """

    exponent: int
    weighted: Tensor
    plain: Tensor

    @classmethod
    def measure(cls, codec: Codec, segments: Sequence[Tensor], layout: Layout, form: str = "histogram") -> Statistics:
        """Of the segments that are coded; buckets that are zero or not finite do not count."""
        return cls(*codec.statistics(segments, layout, form))

    def to_message(self) -> Tensor:
        """int64[1 + 2 NUM_BINS] or int64[7]."""
        return torch.cat((torch.tensor([self.exponent], dtype=torch.int64, device="cpu"), self.weighted, self.plain))

    @classmethod
    def from_message(cls, message: Tensor) -> Statistics:
        return cls(int(message[0]), *message[1:].chunk(2))

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """The sum over ranks, each shifted to the largest exponent first."""
        exponent = max(part.exponent for part in parts)
        # Shifts of integers: ranks whose gradients are tiny count for what they weigh.
        weighted = [part.weighted >> min(exponent - part.exponent, 62) for part in parts]
        return cls(exponent, torch.stack(weighted).sum(dim=0), torch.stack([part.plain for part in parts]).sum(dim=0))


def fit(statistics: Statistics, bits: int, rate_weight: float = 0.0) -> tuple[Levels, tuple[int, ...]] | None:
    """Levels, and how often each magnitude then occurs; None if the statistics have no weight.

    A function of integers in float64 and in a fixed order: equal statistics give equal results on all ranks. See
    ``Levels.fitted`` for ``rate_weight``; up to 4 bits, levels are ``short``, which rounds a coordinate faster.
    """
    if not statistics.weighted.any():
        return None
    counts, plain = _counts(statistics.weighted), _counts(statistics.plain)
    # Levels for what may still come, code words for what was seen.
    seen = _with_one_more(counts, sum(plain))
    levels = Levels.fitted(seen, bits, rate_weight=rate_weight, plain_counts=plain).short()
    shares = Distribution(plain).symbol_probabilities(levels.values)
    return levels, tuple(round(share * _COUNT_SCALE) for share in shares)


def _with_one_more(counts: list[int], coordinates: int) -> list[float]:
    """A histogram with one more coordinate, of the mean weight, spread evenly over [0, 1].

    Without it 127 levels leave wide gaps where no coordinate happened to be, and the first one there is costly.
    """
    weight = sum(counts) / coordinates
    return [count + weight * (high - low) for count, (low, high) in zip(counts, pairwise(BIN_EDGES), strict=True)]


def _counts(part: Tensor) -> list[int]:
    """A histogram, or that of the truncated normal distribution with these moments."""
    return part.tolist() if len(part) == NUM_BINS else truncated_normal(part.tolist())
