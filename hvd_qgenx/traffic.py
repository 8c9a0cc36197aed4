"""What was sent, measured where it is handed to a collective."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor

_NUMBERS = itertools.count(1)


@dataclass
class Communication:
    """Totals of one rank's optimizer or compressor since the start of the process.

    Attributes:
        number: which one it is, in the order in which they were made; by it ranks notice that they use different ones.
        exchanges: how many averages were made.
        collectives: how many operations they took.
        bytes_sent: bytes of the tensors handed to collectives, agreements, statistics and padding included. What a
            collective makes of them (an allgather passes on all ranks' bytes) is its own affair.
        coordinates: gradient coordinates exchanged.
        squared_error, squared_norm: sums of ||Q(v) - v||^2 and ||v||^2 over the finite gradients of this rank.
        codebook_version: how often levels have been fitted.
    """

    number: int = field(default_factory=lambda: next(_NUMBERS))
    exchanges: int = 0
    collectives: int = 0
    bytes_sent: int = 0
    coordinates: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    codebook_version: int = 0

    def count(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that is about to be handed to a collective, and returns it."""
        self.collectives += 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return tensor

    @property
    def bits_per_coordinate(self) -> float:
        """8 bytes_sent / coordinates; 0 before the first exchange."""
        return 8.0 * self.bytes_sent / self.coordinates if self.coordinates else 0.0

    @property
    def ratio(self) -> float:
        """Bytes that float32 would have taken, over bytes sent; infinite if nothing was sent."""
        return 4.0 * self.coordinates / self.bytes_sent if self.bytes_sent else float("inf")

    @property
    def variance(self) -> float | None:
        """Measured E||Q(v) - v||^2 / ||v||^2 of this rank; None if nothing was quantised."""
        return self.squared_error / self.squared_norm if self.squared_norm else None

    def __str__(self) -> str:
        if not self.bytes_sent:
            return f"{self.exchanges} exchanges, no bytes sent"
        variance = f", relative variance {self.variance:.3g}" if self.variance is not None else ""
        return (
            f"{self.exchanges} exchanges, {self.bytes_sent:,} bytes sent, "
            f"{self.bits_per_coordinate:.2f} bits per coordinate, {self.ratio:.1f}x less than float32{variance}"
        )
