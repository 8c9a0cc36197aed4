"""Adaptive levels (QAda): settings, the statistics that ranks share, and the fit that all of them make alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hvd_qgenx.checks import check_choice, check_integer, check_integers
from hvd_qgenx.codec import Codec
from hvd_qgenx.distribution import NUM_BINS, Distribution
from hvd_qgenx.levels import Levels, num_positive

LEVELS = ("adaptive", "uniform", "exponential")
NONFINITE = ("nan", "raise")
_NOTHING = -(2**15)  # exponent of statistics without weight
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
        object.__setattr__(self, "adapt_at", check_integers("adapt_at", self.adapt_at, 0))
        self.codec()

    def codec(self, levels: Levels | None = None, counts: Sequence[int] | None = None) -> Codec:
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

    def describe(self) -> list[str]:
        """One line for each setting, for ranks to compare."""
        return [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)]


def _check_levels(levels: str) -> None:
    if not (isinstance(levels, str) and levels in LEVELS):
        raise ValueError(f"levels must be one of {', '.join(map(repr, LEVELS))} or a Levels, got {levels!r}")


@dataclass(frozen=True)
class Statistics:
    """Histograms of a rank's normalised magnitudes, all integers, of a size that does not depend on the gradient's.

    ``weighted`` counts magnitudes by the squared norm of their bucket, in units of 2**exponent; ``plain`` counts them.
    The first decides levels (the variance that they cause is proportional to it), the second code lengths.
    """

    exponent: int
    weighted: Tensor
    plain: Tensor

    @classmethod
    def measure(cls, codec: Codec, vector: Tensor, sizes: Sequence[int]) -> Statistics:
        """Of the segments of a vector that are coded; buckets that are zero or not finite do not count."""
        return cls(*codec.statistics(vector, sizes, _NOTHING))

    def to_message(self) -> Tensor:
        """int64[1 + 2 NUM_BINS]."""
        return torch.cat((torch.tensor([self.exponent]), self.weighted, self.plain))

    @classmethod
    def from_message(cls, message: Tensor) -> Statistics:
        return cls(int(message[0]), message[1 : 1 + NUM_BINS], message[1 + NUM_BINS :])

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """The sum over ranks, each shifted to the largest exponent first."""
        exponent = max(part.exponent for part in parts)
        weighted = sum(part.weighted >> min(exponent - part.exponent, 62) for part in parts)
        return cls(exponent, weighted, sum(part.plain for part in parts))


def fit(statistics: Statistics, bits: int) -> tuple[Levels, tuple[int, ...]] | None:
    """Levels, and how often each magnitude then occurs; None if the statistics have no weight.

    A function of integers in float64 and in a fixed order: equal statistics give equal results on all ranks.
    """
    if int(statistics.weighted.sum()) == 0:
        return None
    levels = Levels.fitted(statistics.weighted.tolist(), bits)
    shares = Distribution(statistics.plain.tolist()).symbol_probabilities(levels.values)
    return levels, tuple(round(share * _COUNT_SCALE) for share in shares)
