"""The coded kind, whose parts may start before the whole vector is known: while backward still makes the rest.

Ranks start parts as they can and need not start the same ones. Part 0 always starts in ``submit``, and says whether its
sender still means what it started. It does not if tensors have changed since: a step was given up, a gradient was
changed in place, a state was loaded. Nobody could know before. So where one rank does not, all ranks wait for what is
under way, drop it undecoded, and send everything again under the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.backends import DeviceError, failures_of
from hvd_qgenx.exchange.coded import CodedExchange, Submitted
from hvd_qgenx.exchange.exchange import Fused, Term
from hvd_qgenx.exchange.plan import Flight
from hvd_qgenx.layout import Part, Slice


class AheadExchange(CodedExchange):
    """``CodedExchange``, with the same bits; arguments as there, ``part_bytes`` not 0."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # Parts that were started for the coming exchange, and for which half-step; and whether they are to be dropped.
        self._flights: dict[int, Flight] = {}
        self._stage = ""
        self._void = False

    def parts(self) -> Sequence[Part]:
        return self._parts()

    def start(self, part: int, tensors: Sequence[Tensor | None], stage: str, starts_iteration: bool = True) -> bool:
        if not self._can_start(stage, starts_iteration):
            return False
        pieces = zip(tensors, self.parts()[part].slices, strict=True)
        try:
            with failures_of("the gradients' device", falls_back=False):
                fused = self.fuse([None if tensor is None else _piece(tensor, where) for tensor, where in pieces])
                self._flights[part] = self._send(fused.segments, part, stage)
        except DeviceError:
            return False  # ``submit`` meets it again, where the other ranks can learn of it
        self._stage = stage
        return True

    def _can_start(self, stage: str, starts_iteration: bool) -> bool:
        needs_whole = self._fits_mean or (starts_iteration and self._is_due())
        is_other_half = bool(self._flights) and stage != self._stage
        return self._agreed and not (self._interrupted or self._void or needs_whole or is_other_half)

    def _resume(self) -> None:
        if self._flights:
            raise RuntimeError(
                "an exchange with overlap=True was interrupted while parts were under way that other ranks may never "
                "start: start the processes again"
            )
        super()._resume()

    def give_up(self) -> None:
        self._void = bool(self._flights)

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        self.give_up()
        super().describe(lines, dtypes, sizes)

    def load_state_dict(self, state: dict) -> None:
        self.give_up()
        super().load_state_dict(state)

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Submitted:
        if stage != self._stage or self._fits_mean:
            self.give_up()
        if term or keep or self._fits_mean:
            # These travel by another plan, in which nobody waits for what was started: the next exchange does.
            return super().submit(fused, stage, term, keep)
        flights = self._send_rest(fused, stage)
        if any(envelope.stage == "void" for envelope in flights[0].landed()):
            for flight in flights:
                flight.landed()
            # The same draws again: nothing was decoded of what they made.
            flights = self._send_rest(fused, stage)
        self._count(fused)
        self._departed(flights)
        return Submitted(fused, self.parts(), flights)

    def _send_rest(self, fused: Fused, stage: str) -> list[Flight]:
        """All flights, the last part first; a rank that gave up what it had started sends nothing in the others."""
        vectors = self.fuse([None] * len(self.sizes)) if self._void else fused
        said = "void" if self._void else stage
        flights, self._flights, self._void = self._flights, {}, False
        missing = [(index, part) for index, part in reversed(list(enumerate(self.parts()))) if index not in flights]
        cuts = [part.cut(vectors.segments) for _, part in missing]
        with self._or_withdrawn(self.plan, flights), self._announced(self.plan, cuts, [part for _, part in missing]):
            for (index, _), cut in zip(missing, cuts, strict=True):
                flights[index] = self._send(cut, index, said)
        return [flights[index] for index in range(len(self.parts()))]

    def _send(self, segments: Sequence[Tensor], index: int, stage: str) -> Flight:
        return self.plan.start(self._codecs, self._outgoing(segments, self.parts()[index], index, stage))


def _piece(tensor: Tensor, where: Slice) -> Tensor:
    """The coordinates of a slice; of a whole tensor itself."""
    whole = where.stop - where.start == tensor.numel()
    return tensor if whole else tensor.detach().reshape(-1)[where.start : where.stop]
