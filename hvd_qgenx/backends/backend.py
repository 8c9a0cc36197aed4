"""What every backend does, declared once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_qgenx.codebook import Codebook
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.payload import Header

FORMS = ("histogram", "normal")  # of statistics


class DeviceError(RuntimeError):
    """A device that cannot do what was asked of it; the message says what failed."""


@dataclass(frozen=True)
class Drawn:
    """What one encoding was like.

    Attributes:
        size: bytes of the payload.
        counts: int64[s + 1], how often each magnitude's index was drawn.
        squared_error, squared_norm: ||Q(v) - v||^2 and ||v||^2 over the segments that are finite, in float64.
        spoiled: for each segment, whether it is sent as NaN throughout since a coordinate or a norm is not finite.
    """

    size: int
    counts: Tensor
    squared_error: float
    squared_norm: float
    spoiled: tuple[bool, ...]


class Backend(ABC):
    """Encodes, decodes and measures vectors of one kind of device, with the bytes of docs/wire_format.md.

    A vector is a list of *segments*, contiguous float32 tensors that need not lie together; ``layout.sizes`` are their
    lengths. Payloads are uint8[n], contiguous, and lie on the CPU.
    """

    name: str

    def announced(self, groups: Sequence[Sequence[Tensor]]) -> AbstractContextManager[None]:
        """A context in which these groups of segments are encoded, in this order, so that one can be fetched early."""
        return nullcontext()

    @abstractmethod
    def encode(
        self, codebook: Codebook, norm: str, layout: Layout, key: Key, segments: Sequence[Tensor], out: Tensor,
        inline: bool,
    ) -> Drawn:  # fmt: skip
        """Writes one payload to the start of ``out``, uint8 of at least ``payload.bound`` bytes."""

    @abstractmethod
    def decode_mean(
        self, codebook: Codebook, payloads: Sequence[Tensor], targets: Sequence[Tensor],
        sections: Sequence[Sequence[int]] | None = None, factor: float = 1.0,
    ) -> tuple[bool, ...]:  # fmt: skip
        """Overwrites every target with (sum over payloads of one section each) / len(payloads) * factor.

        Float32 sums in the payloads' order, then the division, then the product, each rounded.

        Args:
            codebook: of payloads that bring none.
            payloads: one or more.
            targets: contiguous float32 vectors.
            sections: for each payload and each target the section that belongs to it, -1 for one that the payload
                lacks; None means each target's own number, of as many sections. What is lacking, or has no
                coordinates, counts as zero. A target that no payload has is left as it is.
            factor: of the mean.

        Returns:
            For each target whether it is not finite: a payload said NaN of the whole section, or a sum was too large.

        Raises:
            PayloadError: naming the field of a payload that is damaged, of other sizes than the targets', or made with
                another codebook. What targets hold is then undefined.
            MemoryError, ValueError: if no payload is to blame.
        """

    @abstractmethod
    def parse(self, payload: Tensor, numel: int | None = None) -> Header:
        """The header of a payload whose sizes and checksum have been compared with its bytes; raises PayloadError.

        Code words alone are left to ``decode_mean``. ``numel`` is what the caller expects, checked before all else.
        """

    @abstractmethod
    def statistics(
        self, norm: str, layout: Layout, segments: Sequence[Tensor], form: str
    ) -> tuple[int, Tensor, Tensor]:
        """(exponent, weighted, plain) of ``adaptation.Statistics``, of the coded segments; ``form`` of ``FORMS``."""

    @abstractmethod
    def squared_error(self, vector: Tensor, decoded: Tensor) -> tuple[float, float]:
        """Sums of (decoded - vector)^2 and of vector^2 in float64, over coordinates whose ``decoded`` is finite."""


def no_counts(codebook: Codebook) -> Tensor:
    """int64[s + 1] of zeros."""
    return torch.zeros(codebook.levels.num_levels + 1, dtype=torch.int64, device="cpu")


def device_of(segments: Sequence[Tensor], otherwise: torch.device) -> torch.device:
    """Where segments lie that are there: one of no coordinates may lie anywhere."""
    return next((segment.device for segment in segments if segment.numel()), otherwise)
