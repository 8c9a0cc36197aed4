"""The dense kind: one fused vector under any of Horovod's own compressors (none, fp16)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.cost import Work
from hvd_qgenx.exchange.exchange import Collected, Exchange, Fused, Term, fuse
from hvd_qgenx.exchange.rehearsal import COPIED, Rehearsal, rehearse
from hvd_qgenx.transports import Pending, Transport


@dataclass(frozen=True)
class Announced:
    """Vectors of which the other ranks have been told; they travel once it is known who has what."""

    fused: Fused
    pending: Pending
    keep: bool


class DenseExchange(Exchange):
    """The mean by allreduce of one fused vector.

    A small allgather goes first: it says which parameters each rank has, so that no rank sends a parameter that none
    of them has, and carries the ranks' terms. Where vectors are kept the vector travels by allgather, too.

    Args:
        compression: any of Horovod's compressors: ``compress`` makes a tensor and a context, ``decompress`` undoes it.
        predivide: splits the division of a mean before and after the sum.
    """

    def __init__(
        self, compression, transport: Transport, op: str = "mean", predivide: float = 1.0,
        communication: Communication | None = None,
    ):  # fmt: skip
        super().__init__(transport, op, communication)
        self.compression, self.predivide = compression, predivide
        self.dtype = torch.float32
        self.kept_sizes: list[int] = []
        self._vector = torch.empty(0, dtype=self.dtype, device="cpu")

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        """All parameters travel in one vector, of a type that holds them all and that Horovod can reduce."""
        super().describe(lines, dtypes, sizes)
        dtype = functools.reduce(torch.promote_types, dtypes)
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype

    def settings_lines(self) -> list[str]:
        return [f"compression={getattr(self.compression, '__name__', type(self.compression).__name__)}"]

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        return fuse(tensors, lambda tensor: tensor.detach().to(device="cpu", dtype=self.dtype).reshape(-1))

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Announced:
        self._count(fused)
        own = term(self._as_received(fused)) if term else 0.0
        present = torch.tensor([fused.present, fused.sizes], dtype=torch.int64, device="cpu")
        pending = self.messenger.start_body(self.envelope(stage, own), present.view(torch.uint8).view(-1))
        self.step += 1
        return Announced(fused, pending, keep)

    def collect(self, submitted: Announced, names: Sequence[str]) -> Collected:
        envelopes, bodies = self.messenger.finish(submitted.pending)
        others = torch.stack([body.clone().view(torch.int64).view(2, -1) for body in bodies])
        present, common = others[:, 0].amax(dim=0).bool().tolist(), others[:, 1].amax(dim=0).tolist()
        self.kept = None
        with self.communication.measure("encode"):
            vector = self._joined(submitted.fused, common)
        mean = (self._allgather if submitted.keep else self._allreduce)(vector)
        if (weight := self.weight(envelopes)) != 1.0:
            mean.mul_(weight)
        self.kept_sizes = common
        parts = mean.split(common)
        with self.communication.measure("decode"):
            self._spoil(mean, parts, names)
        means = [part if there else None for part, there in zip(parts, present, strict=True)]
        all_joined = all(envelope.stage == "joined" for envelope in envelopes)
        return Collected(means, [envelope.term for envelope in envelopes], all_joined)

    def _as_received(self, fused: Fused) -> list[Tensor | None]:
        vector = self._joined(fused, fused.sizes)
        rounded = self.compression.decompress(*self.compression.compress(vector))
        return fused.pick(rounded.split(list(fused.sizes)))

    def _joined(self, fused: Fused, sizes: Sequence[int]) -> Tensor:
        """One vector, kept for the next exchange, with zeros for what other ranks have and this one does not."""
        if len(self._vector) != sum(sizes) or self._vector.dtype != self.dtype:
            # Fresh memory costs a page fault for every 4 kB: five times as long as the copy itself.
            self._vector = torch.empty(sum(sizes), dtype=self.dtype, device="cpu")
        if fused.segments and fused.sizes == tuple(sizes):
            return torch.cat(fused.segments, out=self._vector)  # all at once: a copy for each takes 2 us more
        for part, segment in zip(self._vector.split(list(sizes)), fused.segments, strict=True):
            part.copy_(segment) if segment.numel() else part.zero_()
        return self._vector

    def _spoil(self, mean: Tensor, parts: Sequence[Tensor], names: Sequence[str]) -> None:
        """A parameter with one coordinate that is not finite is NaN throughout, as under any other kind."""
        # One pass over all that only looks: a tenth of what `isfinite`, which makes a tensor, takes.
        if not len(mean) or all(map(math.isfinite, torch.stack(mean.aminmax()).tolist())):
            return
        broken = [not bool(part.isfinite().all()) for part in parts]
        self.report_broken(broken, names)
        for part, is_broken in zip(parts, broken, strict=True):
            if is_broken:
                part.fill_(torch.nan)

    def _allgather(self, vector: Tensor) -> Tensor:
        with self.communication.measure("encode"):
            compressed, context = self.compression.compress(vector)
        _, bodies = self.messenger.gather(self.envelope("vectors"), compressed.view(torch.uint8))
        received = [body.clone().view(compressed.dtype) for body in bodies]
        with self.communication.measure("decode"):
            self.kept = [self.compression.decompress(one, context) for one in received]
            total = self.kept[0].clone()
            for other in self.kept[1:]:
                total.add_(other)
        return total if self.op == "sum" else total.div_(len(self.kept))

    def _allreduce(self, vector: Tensor) -> Tensor:
        with self.communication.measure("encode"):
            compressed, context = self.compression.compress(vector)
        if len(compressed) == 0:
            return vector
        envelope = self.envelope("vectors")
        reduced = self.messenger.wait(
            self.messenger.start_allreduce(compressed, envelope, self.op == "mean", self.predivide)
        )
        with self.communication.measure("decode"):
            return self.compression.decompress(reduced, context)

    def last_as_received(self) -> list[Tensor | None] | None:
        return None if self.kept is None else list(self.kept[self.transport.rank].split(self.kept_sizes))

    def state_dict(self) -> dict:
        return {**super().state_dict(), "kept_sizes": self.kept_sizes}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.kept_sizes = state.get("kept_sizes", [])


def rehearse_dense(compression, ranks: int, keep: bool = False) -> Work:
    """What a rank sends and computes beside the sum itself."""
    return rehearse(DenseExchange(compression, Rehearsal(ranks)), COPIED, keep=keep)
