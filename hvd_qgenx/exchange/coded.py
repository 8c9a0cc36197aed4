"""The coded kind: which codec, whose codebook, when to adapt; a plan does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.codec import Codec, as_vector
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.allgather import Allgather, AllgatherFlight, Arrived
from hvd_qgenx.exchange.exchange import Collected, Exchange, Fused, Term, fuse
from hvd_qgenx.exchange.plan import Buffers, Outgoing, Plan
from hvd_qgenx.key import Key
from hvd_qgenx.levels import Levels
from hvd_qgenx.transports import Transport

PLANS: dict[str, type[Plan]] = {"allgather": Allgather}


@dataclass(frozen=True)
class Submitted:
    """A rank's vectors under way."""

    fused: Fused
    flight: AllgatherFlight
    keep: bool


class CodedExchange(Exchange):
    """The mean of coded vectors, decoded and added on every rank in the same order.

    Args:
        settings: what ``Compression.qgenx`` was told.
        plan: a key of ``PLANS``.
    """

    def __init__(
        self, settings: Settings, transport: Transport, op: str = "mean", plan: str = "allgather",
        communication: Communication | None = None,
    ):  # fmt: skip
        super().__init__(transport, op, communication)
        self.settings, self.nonfinite = settings, settings.nonfinite
        self.codec = settings.codec()
        self.plan = PLANS[plan](self.messenger, Buffers())
        self.version = 0
        self.next_fit_at = 0

    def settings_lines(self) -> list[str]:
        return self.settings.describe()

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        return fuse(tensors, as_vector)

    # ---- levels ------------------------------------------------------------------------------------------------------

    def adapt_if_due(self, fused: Fused, starts_iteration: bool = True) -> None:
        """At the start of an iteration that the schedule names, all ranks fit levels to all ranks' vectors."""
        if starts_iteration and self._is_due():
            with self.communication.adaptation():
                self._adapt(fused)
        super().adapt_if_due(fused, starts_iteration)

    def _is_due(self) -> bool:
        """By the schedule, or because earlier gradients had nothing to fit to; then at ever longer intervals."""
        late = self.settings.levels == "adaptive" and self.version == 0 and 0 < self.next_fit_at <= self.iteration
        return late or self.settings.adapts(self.iteration)

    def _adapt(self, fused: Fused) -> None:
        layout, form = self.codec.layout(fused.sizes), self.settings.statistics
        message = Statistics.measure(self.codec, fused.segments, layout, form).to_message()
        _, bodies = self.messenger.gather(self.envelope("adaptation"), message.view(torch.uint8))
        parts = [Statistics.from_message(body.clone().view(torch.int64)) for body in bodies]
        if fitted := fit(Statistics.merged(parts), self.settings.bits, self.settings.rate_weight):
            self._use(self.settings.codec(*fitted), self.version + 1)
        else:
            self.next_fit_at = 2 * self.iteration + 1

    def _use(self, codec: Codec, version: int) -> None:
        self.codec, self.version = codec, version
        self.communication.start_codebook(version)

    # ---- sending and receiving ---------------------------------------------------------------------------------------

    def submit(
        self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False, first: int = 0
    ) -> Submitted:
        """See ``Exchange.submit``; ``first`` is the number of the first tensor under the drop-in."""
        self._count(fused)
        key = Key(self.settings.seed, self.transport.global_rank, self.step)
        outgoing = Outgoing(
            fused.segments,
            self.codec.layout(fused.sizes),
            key,
            self.envelope(stage, first=first),
            None if term is None else lambda payload: term(fused.pick(self._sections(payload))),
        )
        flight = self.plan.start(self.codec, outgoing)
        self._measure(flight)
        self.step += 1
        return Submitted(fused, flight, keep)

    def _measure(self, flight: AllgatherFlight) -> None:
        self.communication.squared_error += flight.drawn.squared_error
        self.communication.squared_norm += flight.drawn.squared_norm
        self.communication.count_symbols(flight.drawn.counts)

    def collect(self, submitted: Submitted, names: Sequence[str]) -> Collected:
        arrived = self.receive(submitted)
        self.kept = arrived.payloads if submitted.keep else None
        common = arrived.common_sizes()
        targets = [
            segment if len(segment) == size else torch.zeros(size, dtype=torch.float32, device="cpu")
            for segment, size in zip(submitted.fused.segments, common, strict=True)
        ]
        broken = arrived.mean_into(targets, self._factor)
        for target, is_broken in zip(targets, broken, strict=True):
            if is_broken:
                target.fill_(torch.nan)
        self.report_broken(broken, names)
        return Collected([target if len(target) else None for target in targets], arrived.terms)

    @property
    def _factor(self) -> float:
        """What a mean is multiplied by."""
        return float(self.transport.size) if self.op == "sum" else 1.0

    def receive(self, submitted: Submitted) -> Arrived:
        """All ranks' payloads."""
        submitted.flight.advance()
        return submitted.flight.arrived

    def _sections(self, payload: Tensor) -> list[Tensor]:
        """What a payload decodes to."""
        sizes = list(self.codec.parse(payload).layout.sizes)
        return list(self.codec.decode_mean([payload]).split(sizes))

    def last_as_received(self) -> list[Tensor | None] | None:
        if self.kept is None:
            return None
        sections: list[Tensor | None] = [*self._sections(self.kept[self.transport.rank])]
        return sections

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _position(self) -> list[int]:
        return [self.step, self.iteration, self.version, self.next_fit_at, self.codec.codebook.hash]

    def state_dict(self) -> dict:
        """Counters, the codebook in use and what it belongs to: plain numbers and words."""
        counts = None if self.codec.counts is None else list(self.codec.counts)
        return {
            **super().state_dict(),
            "version": self.version,
            "first_fit_at": self.next_fit_at,
            "levels": list(self.codec.levels.values),
            "counts": counts,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly; from a state of other settings, with the counters alone and levels fitted anew."""
        super().load_state_dict(state)
        if state["settings"] != self.settings_lines():
            self.next_fit_at = max(self.iteration, 1)
            return
        self.next_fit_at = state["first_fit_at"]
        self._use(self.settings.codec(Levels(tuple(state["levels"])), state["counts"]), state["version"])
