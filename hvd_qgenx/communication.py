"""What was sent, measured where it is handed to a collective."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

PHASES = ("encode", "wait", "decode")
_COUNTING = threading.Lock()  # two threads may send for one optimizer


@dataclass
class Communication:
    """Totals of one rank's optimizer or compressor since the start of the process.

    Attributes:
        number: which one it is, see ``identity``; by it ranks notice that they use different ones.
        exchanges: how many averages were made.
        collectives: how many operations they took.
        bytes_sent: bytes of the tensors handed to collectives, agreements, statistics and padding included. What a
            collective makes of them (an allgather passes on all ranks' bytes) is its own affair.
        second_phase_bytes: the part of ``bytes_sent`` that carried means of shards, in two-phase exchanges.
        host_bytes: under ``hierarchical``, what was handed to collectives of one host's ranks; not in ``bytes_sent``.
        coordinates: gradient coordinates exchanged.
        squared_error, squared_norm: sums of ||Q(v) - v||^2 and ||v||^2 over the finite gradients of this rank.
        mean_squared_error, mean_squared_norm: the same of the second rounding, of the means that this rank owned.
        codebook_version: how often levels have been fitted, also before this process started.
        adaptations: how often ranks shared statistics to fit levels, in this process.
        adaptation_seconds, adaptation_bytes: what that took: wall time, waiting for the other ranks included, and
            the part of ``bytes_sent`` that statistics are.
        measurement_bytes: what was sent to measure the network, before "auto" chose; not in ``bytes_sent``.
        seconds: wall time by phase: in "encode" and "decode", at work on vectors; in "wait", for messages of other
            ranks. The same ranges are in torch's profiler, see ``measure``.
    """

    number: int = 0
    exchanges: int = 0
    collectives: int = 0
    bytes_sent: int = 0
    second_phase_bytes: int = 0
    host_bytes: int = 0
    coordinates: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    mean_squared_error: float = 0.0
    mean_squared_norm: float = 0.0
    codebook_version: int = 0
    adaptations: int = 0
    adaptation_seconds: float = 0.0
    adaptation_bytes: int = 0
    measurement_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _symbols: Tensor = field(default_factory=lambda: torch.zeros(128, dtype=torch.int64, device="cpu"), repr=False)
    _earlier_symbols: int = 0  # those under earlier codebooks
    _earlier_bits: float = 0.0

    def count(self, tensor: Tensor, phase: int = 0) -> Tensor:
        """Counts a tensor that is about to be handed to a collective, and returns it."""
        with _COUNTING:
            self.collectives += 1
            self.bytes_sent += tensor.numel() * tensor.element_size()
            if phase:
                self.second_phase_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def count_symbols(self, counts: Tensor) -> None:
        """Counts how often each magnitude's index, int64[s + 1], is about to be sent under the codebook in use."""
        self._symbols[: len(counts)] += counts

    def start_codebook(self, version: int) -> None:
        """Another codebook is in use from here on: symbols mean other values."""
        self._earlier_bits += _entropy_bits(self._symbols)
        self._earlier_symbols += int(self._symbols.sum())
        self._symbols.zero_()
        self.codebook_version = version

    def measure(self, phase: str) -> _Range:
        """A context whose time is added to ``seconds[phase]``; "hvd_qgenx.encode" and so on in torch's profiler.

        ``with torch.profiler.profile() as profile: ...`` and ``profile.export_chrome_trace(path)`` show the ranges.
        """
        return _Range(self.seconds, phase)

    @contextlib.contextmanager
    def adaptation(self):
        """Counts what happens inside as one adaptation."""
        start, sent = time.perf_counter(), self.bytes_sent
        yield
        self.adaptations += 1
        self.adaptation_seconds += time.perf_counter() - start
        self.adaptation_bytes += self.bytes_sent - sent

    @property
    def entropy(self) -> float | None:
        """Bits per coded coordinate that the best code for single symbols would take; None before any.

        -sum_m f_m log2 f_m over the frequencies f_m of the level indices m sent under one codebook, plus a bit for the
        sign of each that is not 0; the mean over codebooks, weighted by their symbols. Norms, lengths, headers and
        small parameters, which have no symbols, are not in it.
        """
        symbols = self._earlier_symbols + int(self._symbols.sum())
        return (self._earlier_bits + _entropy_bits(self._symbols)) / symbols if symbols else None

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

    @property
    def mean_variance(self) -> float | None:
        """Measured E||Q(m) - m||^2 / ||m||^2 of the second rounding; None if there was none."""
        return self.mean_squared_error / self.mean_squared_norm if self.mean_squared_norm else None

    def __str__(self) -> str:
        if not self.bytes_sent:
            return f"{self.exchanges} exchanges, no bytes sent"
        parts = [
            f"{self.exchanges} exchanges",
            f"{self.bytes_sent:,} bytes sent",
            f"{self.bits_per_coordinate:.2f} bits per coordinate",
            f"{self.ratio:.1f}x less than float32",
        ]
        if self.measurement_bytes:
            parts.append(f"{self.measurement_bytes:,} more to measure the network")
        if self.host_bytes:
            parts.append(f"{self.host_bytes:,} bytes within the host")
        if self.variance is not None:
            parts.append(f"relative variance {self.variance:.3g}")
        if self.entropy is not None:
            parts.append(f"entropy of symbols {self.entropy:.2f} bits")
        if self.adaptations:
            parts.append(
                f"codebook {self.codebook_version} ({self.adaptations} adaptations: "
                f"{self.adaptation_bytes:,} bytes, {self.adaptation_seconds:.2g} s)"
            )
        return ", ".join(parts)


class _Range:
    """Adds the time inside it to ``seconds[phase]``, and is a range of torch's profiler if that is running."""

    __slots__ = ("phase", "profiled", "seconds", "start")

    def __init__(self, seconds: dict[str, float], phase: str):
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        # Asked first, since a range that nobody records costs ten times as much as the rest of this.
        is_recorded = torch.autograd.profiler._is_profiler_enabled
        self.profiled = torch.profiler.record_function(f"hvd_qgenx.{self.phase}") if is_recorded else None
        if self.profiled:
            self.profiled.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.phase] += time.perf_counter() - self.start
        if self.profiled:
            self.profiled.__exit__(*error)


def _entropy_bits(counts: Tensor) -> float:
    """sum_m c_m (log2(C / c_m) + [m > 0]), C the sum of the counts c_m."""
    total = int(counts.sum())
    return sum(c * (math.log2(total / c) + (m > 0)) for m, c in enumerate(counts.tolist()) if c)
