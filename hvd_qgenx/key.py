"""What random draws are a function of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvd_qgenx.checks import check_integer

_MASK_64 = 2**64 - 1
PHASES, PARTS, SHARDS = 2**4, 2**12, 2**16


@dataclass(frozen=True)
class Key:
    """What the random draws of one encoding are a function of, beside the position in the vector.

    Args:
        seed: of the run, the same on all ranks; 0 to 2**64 - 1.
        rank: global rank of the sender, so that ranks draw independently; 0 to 2**32 - 1.
        step: number of the exchange (not of the iteration); 0 to 2**64 - 1.
        stream: separates encodings that share a step, see ``stream_of``; 0 to 2**32 - 1.
    """

    seed: int
    rank: int
    step: int
    stream: int = 0

    def __post_init__(self):
        check_integer("seed", self.seed, 0, _MASK_64)
        check_integer("rank", self.rank, 0, 2**32 - 1)
        check_integer("step", self.step, 0, _MASK_64)
        check_integer("stream", self.stream, 0, 2**32 - 1)

    @property
    def pair(self) -> tuple[int, int]:
        """Two 32-bit numbers, every field mixed in turn by splitmix64's finaliser (Steele et al., 2014)."""
        state = 0
        # Mixed one by one: XORed, equal differences in two of them would cancel.
        for part in (self.seed, self.rank, self.step, self.stream):
            state = _mix(state * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15)
        return state & 0xFFFFFFFF, state >> 32

    def within(self, phase: int = 0, part: int = 0, shard: int = 0) -> Key:
        """The key of one payload of an exchange of several."""
        return replace(self, stream=stream_of(phase, part, shard))


def stream_of(phase: int = 0, part: int = 0, shard: int = 0) -> int:
    """``Key.stream`` of one payload of an exchange: phase + 2**4 part + 2**16 shard.

    Positions start at 0 in every payload. Parts and shards of one exchange share seed, rank and step, so the stream
    alone keeps their draws independent.

    Args:
        phase: 0, or 1 for the second phase of a two-phase exchange; below 16.
        part: of a vector that travels in parts; below 4096.
        shard: of a part that is sent to its owner; below 65536.
    """
    check_integer("phase", phase, 0, PHASES - 1)
    check_integer("part", part, 0, PARTS - 1)
    check_integer("shard", shard, 0, SHARDS - 1)
    # The phase lowest, so that a vector in one message has streams 0 and 1.
    return phase + PHASES * (part + PARTS * shard)


def _mix(x: int) -> int:
    x &= _MASK_64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)
