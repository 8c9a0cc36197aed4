"""How a vector is cut: segments (parameters), buckets, parts, shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from torch import Tensor

from hvd_qgenx.checks import check_integer, check_integers

MAX_BUCKET_SIZE = 16384  # at most 20 bits a symbol, so that a bucket's length in bytes fits 16 bits
_BYTES = 4  # of a coordinate


class Slice(NamedTuple):
    """Coordinates ``start`` to ``stop`` of a segment."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """How a vector is cut into segments, and these into buckets.

    Args:
        sizes: coordinates of each segment, in their order; 0 is a segment that is not there.
        min_numel: segments with fewer coordinates have no buckets and travel as float32.
        bucket_size: coordinates of a bucket, 1 to 16384. Buckets never span two segments; a segment's last bucket has
            what is left.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    sizes: tuple[int, ...]
    min_numel: int = 0
    bucket_size: int = 1024

    def __post_init__(self):
        object.__setattr__(self, "sizes", check_integers("sizes", self.sizes, 0))
        check_integer("min_numel", self.min_numel, 0, 2**32 - 1)
        check_integer("bucket_size", self.bucket_size, 1, MAX_BUCKET_SIZE)

    @cached_property
    def numel(self) -> int:
        """All coordinates."""
        return sum(self.sizes)

    @cached_property
    def coded_sizes(self) -> tuple[int, ...]:
        """Coordinates of the segments that have buckets."""
        return tuple(size for size in self.sizes if size >= self.min_numel)

    @cached_property
    def raw_sizes(self) -> tuple[int, ...]:
        """Coordinates of the segments that travel as float32."""
        return tuple(size for size in self.sizes if size < self.min_numel)

    @property
    def coded_numel(self) -> int:
        return sum(self.coded_sizes)

    @property
    def raw_numel(self) -> int:
        return sum(self.raw_sizes)

    @cached_property
    def num_buckets(self) -> int:
        return sum(-(-size // self.bucket_size) for size in self.coded_sizes)

    def bucket_lengths(self) -> list[int]:
        """Coordinates of each bucket."""
        lengths = []
        for size in self.coded_sizes:
            whole, rest = divmod(size, self.bucket_size)
            lengths += [self.bucket_size] * whole + [rest] * (rest > 0)
        return lengths

    def of(self, sizes: Sequence[int]) -> Layout:
        """The same rule of cutting, for other segments."""
        return layout_of(tuple(sizes), self.min_numel, self.bucket_size)

    @lru_cache(maxsize=16)  # noqa: B019 - an exchange cuts the same few layouts for ever
    def parts(self, num_bytes: int) -> tuple[Part, ...]:
        """Parts of about ``num_bytes`` bytes of float32 each, in the vector's order; at least one.

        Segments stay whole where they fit; larger ones are cut at buckets. No piece of a segment is so small that it
        would travel as float32 where the segment does not.
        """
        # At least one coordinate, or no part would ever be full.
        most = max(check_integer("num_bytes", num_bytes, 1) // _BYTES, 1)
        return tuple(self._gather(self._pieces(most), most))

    @lru_cache(maxsize=16)  # noqa: B019
    def shards(self, ranks: int) -> tuple[Part, ...]:
        """One part for each of ``ranks`` owners, in the vector's order, as even as whole buckets allow; some may be
        empty."""
        check_integer("ranks", ranks, 1)
        shards: list[list[Slice]] = [[] for _ in range(ranks)]
        before = 0
        # Pieces of a 32nd of a shard: even shards, and few slices.
        for piece in self._pieces(max(self._unit, -(-self.numel // (32 * ranks)))):
            # A piece goes to the owner of its middle, so that sizes err in both directions.
            middle = before + (piece.stop - piece.start) / 2
            shards[min(int(middle * ranks / max(self.numel, 1)), ranks - 1)].append(piece)
            before += piece.stop - piece.start
        return tuple(self._part(_joined(pieces)) for pieces in shards)

    @property
    def _unit(self) -> int:
        """The least whole number of buckets that is not below ``min_numel``."""
        return -(-max(self.min_numel, 1) // self.bucket_size) * self.bucket_size

    def _pieces(self, most: int) -> Iterator[Slice]:
        """Every segment in pieces of up to ``most`` coordinates, or of a unit."""
        step = max(most // self._unit, 1) * self._unit
        for segment, size in enumerate(self.sizes):
            start = 0
            # The rest must be long enough to be coded, as the segment it belongs to is.
            while size - start > max(most, step) and size - start - step >= self._unit:
                yield Slice(segment, start, start + step)
                start += step
            yield Slice(segment, start, size)

    def _gather(self, pieces: Iterator[Slice], most: int) -> list[Part]:
        groups: list[list[Slice]] = [[]]
        held = 0
        for piece in pieces:
            numel = piece.stop - piece.start
            # A piece that is too large by itself still needs a part.
            if held and held + numel > most:
                groups.append([])
                held = 0
            groups[-1].append(piece)
            held += numel
        return [self._part(group) for group in groups]

    def _part(self, slices: Sequence[Slice]) -> Part:
        return Part(tuple(slices), self.of([piece.stop - piece.start for piece in slices]))


@lru_cache(maxsize=64)
def layout_of(sizes: tuple[int, ...], min_numel: int, bucket_size: int) -> Layout:
    """A layout, kept: an exchange asks for the same few, and checking hundreds of sizes takes long."""
    return Layout(sizes, min_numel, bucket_size)


def _joined(pieces: Sequence[Slice]) -> list[Slice]:
    """Neighbouring pieces of one segment as one."""
    joined: list[Slice] = []
    for piece in pieces:
        if joined and joined[-1].segment == piece.segment and joined[-1].stop == piece.start:
            piece = Slice(piece.segment, joined.pop().start, piece.stop)
        joined.append(piece)
    return joined


@dataclass(frozen=True)
class Part:
    """Some slices of a vector, which travel together, and their layout."""

    slices: tuple[Slice, ...]
    layout: Layout

    def cut(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Views of contiguous segments, one for each slice; of a whole segment itself, of an empty one an empty one."""
        return [_slice(segments[piece.segment], piece) for piece in self.slices]


def _slice(segment: Tensor, piece: Slice) -> Tensor:
    whole = piece.start == 0 and piece.stop >= segment.numel()
    return segment if whole else segment.view(-1)[piece.start : piece.stop]
