"""The coded kind: which codec, whose codebook, when to adapt, in which parts; a plan does the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.backends import DeviceError, announced, device_of
from hvd_qgenx.codec import Codec, as_segment
from hvd_qgenx.communication import Communication
from hvd_qgenx.drift import Drift, Sums
from hvd_qgenx.exchange.allgather import Allgather, AllgatherFlight, spoil
from hvd_qgenx.exchange.cost import Way, Work, needs_no_measurement
from hvd_qgenx.exchange.exchange import Collected, Exchange, Fused, Term, fuse
from hvd_qgenx.exchange.measurement import measure_and_choose
from hvd_qgenx.exchange.message import DisagreementError, WithdrawnError
from hvd_qgenx.exchange.plan import Buffers, Codecs, Flight, Outgoing, Plan
from hvd_qgenx.exchange.rehearsal import CODED, Rehearsal, rehearse
from hvd_qgenx.exchange.two_phase import TwoPhase, fine_bits
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Part
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import PayloadError
from hvd_qgenx.transports import Transport

PLANS: dict[str, type[Plan]] = {"allgather": Allgather, "two_phase": TwoPhase}
_WHOLE = 2**62  # more bytes than any vector has
#: float32 bytes of a part: while one travels the next is encoded and the last decoded. At 4 bits a coordinate these are
#: 2 MB, which take 14 ms on a link of 1 Gbit/s, several times what starting a collective takes.
PART_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Submitted:
    """A rank's vectors under way, in parts; ``keep`` is the flight that all ranks' own vectors are kept from."""

    fused: Fused
    parts: Sequence[Part]
    flights: Sequence[Flight]
    keep: AllgatherFlight | None = None


class CodedExchange(Exchange):
    """The mean of coded vectors, decoded and added on every rank in the same order.

    Args:
        settings: what ``Compression.qgenx`` was told.
        plan: a key of ``PLANS``, or "auto": all ranks choose one before the first exchange.
        part_bytes: of float32 coordinates that travel in one message; 0 sends all in one, and None
            is ``PART_BYTES``, or chosen with the plan.
    """

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        op: str = "mean",
        plan: str = "allgather",
        part_bytes: int | None = None,
        communication: Communication | None = None,
    ):
        super().__init__(transport, op, communication)
        self.settings, self.nonfinite = settings, settings.nonfinite
        self.part_bytes = PART_BYTES if part_bytes is None else part_bytes
        self.codec = settings.codec()
        self.buffers = Buffers()
        self.plan = PLANS["allgather" if plan == "auto" else plan](self.messenger, self.buffers)
        self._chooses, self._chooses_parts = plan == "auto", plan == "auto" and part_bytes is None
        #: What was chosen: plan, part_bytes, and among how many ranks.
        self.chosen: dict | None = None
        # What needs every rank's own vector takes this one, whatever the plan.
        self.allgather = Allgather(self.messenger, self.buffers)
        self.version = 0
        self.next_fit_at = 0
        self.drift = Drift()
        # The codec of means of shards, where the plan rounds twice; and whether it awaits a mean to be fitted to.
        self.mean_settings = _mean_settings(settings, transport.size)
        self.mean_codec = self.mean_settings.codec()
        self._fits_mean = False

    def settings_lines(self) -> list[str]:
        return self.settings.describe()

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        fused = fuse(tensors, as_segment)
        devices = {segment.device for segment in fused.segments if segment.numel()}
        # One message is coded in one place: parameters on several devices meet on the CPU.
        return fused if len(devices) < 2 else Fused(fused.present, tuple(one.cpu() for one in fused.segments))

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        super().describe(lines, dtypes, sizes)
        self.buffers.clear()  # they are cut for other sizes

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        super().settle()
        if self._chooses and self.chosen is None:
            self._choose()

    def _choose(self) -> None:
        """All ranks take the same plan and part size, by a measurement where there is something to choose."""
        ranks, numel = self.transport.size, sum(self.sizes)
        plans = tuple(PLANS) if ranks > 2 else ("allgather",)
        if needs_no_measurement(plans, ranks, numel):
            self._use_plan("allgather", 0)
            return
        ways = {
            Way("qgenx", self.settings.bits, plan): partial(rehearse_coded, self.settings, ranks, plan)
            for plan in plans
        }
        choice = measure_and_choose(self.messenger, self.step, ways, numel)
        self._use_plan(choice.way.plan, choice.part_bytes(numel))

    def _use_plan(self, plan: str, part_bytes: int) -> None:
        self.plan = PLANS[plan](self.messenger, self.buffers)
        if self._chooses_parts:
            self.part_bytes = part_bytes
        self.chosen = {"plan": plan, "part_bytes": part_bytes, "ranks": self.transport.size}

    # ---- levels ------------------------------------------------------------------------------------------------------

    def _fit_if_due(self, fused: Fused, starts_iteration: bool) -> None:
        """At the start of an iteration that the schedule names, to all ranks' vectors."""
        if starts_iteration and self._is_due():
            with self.communication.adaptation():
                self._adapt(fused)

    def _is_due(self) -> bool:
        """By the schedule, because gradients drifted, or because a state of other settings was loaded."""
        late = self.settings.levels == "adaptive" and self.version == 0 and 0 < self.next_fit_at <= self.iteration
        return late or self.drift.refit or self.settings.adapts(self.iteration)

    def _adapt(self, fused: Fused) -> None:
        layout, form = self.codec.layout(fused.sizes), self.settings.statistics
        message = Statistics.measure(self.codec, fused.segments, layout, form).to_message()
        _, bodies = self.messenger.gather(self.envelope("adaptation"), message.view(torch.uint8))
        parts = [Statistics.from_message(body.clone().view(torch.int64)) for body in bodies]
        if self.version and not self.settings.adapts(self.iteration):
            self.drift.take(self.iteration)
        self.next_fit_at = 0
        self.drift.wait()
        if fitted := fit(Statistics.merged(parts), self.settings.bits, self.settings.rate_weight):
            self._use(self.settings.codec(*fitted), self.version + 1)
            self.drift.start()
            self._fits_mean = isinstance(self.plan, TwoPhase)

    def watch(self, flights: Sequence[Flight], stage: str) -> None:
        """Looks at what all ranks' roundings came to, and asks for other levels at the next iteration if need be."""
        if not self.settings.follows_drift:
            return
        kind = f"{stage} {sum(flight.coordinates() for flight in flights)}"
        sums = Sums.total(sums for flight in flights for sums in flight.sums())
        self.drift.observe(kind, sums, self.codec, self.iteration, self.version > 0)
        if self.drift.refit_mean and isinstance(self.plan, TwoPhase):
            self.drift.take(self.iteration)
            self.drift.start_mean()
            self._fits_mean = True

    def _adapt_mean(self, means: Sequence[Tensor]) -> None:
        """Fits the second codec to a mean that all ranks hold to the bit: nothing needs to be sent."""
        layout, settings = self.mean_codec.layout(list(map(Tensor.numel, means))), self.mean_settings
        statistics = Statistics.measure(self.mean_codec, means, layout, settings.statistics)
        if fitted := fit(statistics, settings.bits, settings.rate_weight):
            self.mean_codec = settings.codec(*fitted)
        self._fits_mean = False

    def _use(self, codec: Codec, version: int) -> None:
        self.codec, self.version = codec, version
        self.communication.start_codebook(version)

    # ---- sending and receiving ---------------------------------------------------------------------------------------

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Submitted:
        if term or keep:
            return self._submit_whole(fused, stage, term, keep)
        self._count(fused)
        parts = self._parts()
        # Levels of the mean are fitted to one that all ranks know to the bit, before they are used.
        plan = self.allgather if self._fits_mean else self.plan
        flights: dict[int, Flight] = {}
        cuts = [part.cut(fused.segments) for part in parts]
        with self._or_withdrawn(plan, flights), self._announced(plan, cuts, parts):
            for index, part in enumerate(parts):
                flights[index] = plan.start(self._codecs, self._outgoing(cuts[index], part, index, stage))
        self._departed(list(flights.values()))
        return Submitted(fused, parts, list(flights.values()))

    def _announced(
        self, plan: Plan, cuts: Sequence[Sequence[Tensor]], parts: Sequence[Part]
    ) -> AbstractContextManager[None]:
        """In which these parts are encoded: where they lie on a device, the next is fetched meanwhile."""
        return announced(
            [group for cut, part in zip(cuts, parts, strict=True) for group in plan.groups(cut, part.layout)]
        )

    @contextmanager
    def _or_withdrawn(self, plan: Plan, flights: dict[int, Flight]) -> Iterator[None]:
        """What starts the flights of all parts. A device that fails keeps no rank waiting: in place of what is missing
        the others get a refusal; and in the second phase of the parts before, which they begin until they see that."""
        try:
            yield
        except DeviceError as error:
            missing = [index for index in range(len(self._parts())) if index not in flights]
            for index in range(missing[0]):
                plan.withdraw(self.envelope("refusal", part=index, phase=1))
            for index in missing:
                plan.withdraw(self.envelope("refusal", part=index))
            with suppress(DisagreementError):
                self.messenger.drain()
            raise WithdrawnError(str(error)) from error

    def _parts(self) -> Sequence[Part]:
        """All ranks cut alike: by the sizes of all parameters, those included that this rank lacks now."""
        return self.codec.layout(self.sizes).parts(self.part_bytes or _WHOLE)

    def _outgoing(self, segments: Sequence[Tensor], part: Part, index: int, stage: str) -> Outgoing:
        return Outgoing(
            segments,
            part.layout,
            self._key().within(part=index),
            self.envelope(stage, part=index),
        )

    @property
    def _codecs(self) -> Codecs:
        return Codecs(self.codec, self.mean_codec)

    def _key(self) -> Key:
        return Key(self.settings.seed, self.transport.global_rank, self.step)

    def _departed(self, flights: Sequence[Flight]) -> None:
        """Counts what was drawn; the next exchange has the next number."""
        for flight in flights:
            self.communication.squared_error += flight.drawn.squared_error
            self.communication.squared_norm += flight.drawn.squared_norm
            self.communication.count_symbols(flight.drawn.counts)
        self.step += 1

    def _submit_whole(self, fused: Fused, stage: str, term: Term | None, keep: bool) -> Submitted:
        """In one message by allgather, after which every rank knows every other's own vector."""
        flight = self.start_allgather(fused, stage, term)
        return Submitted(fused, self.codec.layout(self.sizes).parts(_WHOLE), [flight], flight if keep else None)

    def start_allgather(self, fused: Fused, stage: str, term: Term | None = None, first: int = 0) -> AllgatherFlight:
        """All vectors in one message; ``first`` is the number of the first tensor under the drop-in."""
        self._count(fused)
        own_term = None if term is None else lambda payload: term(fused.pick(self._sections(payload)))
        layout, envelope = self.codec.layout(fused.sizes), self.envelope(stage, first=first)
        outgoing = Outgoing(fused.segments, layout, self._key(), envelope, own_term)
        try:
            flight = self.allgather.start(self._codecs, outgoing)
        except DeviceError as error:
            with suppress(DisagreementError):
                self.allgather.meet(self.envelope("refusal"))
            raise WithdrawnError(str(error)) from error
        self._departed([flight])
        return flight

    def collect(self, submitted: Submitted, names: Sequence[str]) -> Collected:
        self._advance(submitted.flights)
        self.kept = submitted.keep.arrived.payloads if submitted.keep else None
        means = list(submitted.fused.segments)
        broken = [False] * len(means)
        envelopes = submitted.flights[0].landed()
        factor = self._factor * self.weight(envelopes)
        for part, flight in zip(submitted.parts, submitted.flights, strict=True):
            self._make_room(means, part, flight.sizes())
            flags = flight.collect(part.cut(means), factor)
            for piece, flag in zip(part.slices, flags, strict=True):
                broken[piece.segment] = broken[piece.segment] or flag
        for flight in submitted.flights:
            self._landed(flight)
        if self._fits_mean:
            self._adapt_mean(means)
        # A rank without data does not know which half-step this is; those that have some say it to all alike.
        stage = next((envelope.stage for envelope in envelopes if envelope.stage != "joined"), "joined")
        self.watch(submitted.flights, stage)
        spoil(means, tuple(broken))
        self.report_broken(broken, names)
        found = [mean if mean.numel() else None for mean in means]
        return Collected(found, submitted.flights[0].terms(), stage == "joined")

    def _advance(self, flights: Sequence[Flight]) -> None:
        """Starts what comes after the first phase. A device that fails there keeps no rank waiting either."""
        advanced = 0
        try:
            for flight in flights:
                flight.advance()
                advanced += 1
        except DeviceError as error:
            self.step -= 1  # which the refusals belong to
            for index in range(advanced, len(flights)):
                self.plan.withdraw(self.envelope("refusal", part=index, phase=1))
            with suppress(DisagreementError):
                self.messenger.drain()
            raise WithdrawnError(str(error)) from error

    def meet(self, stage: str, starts_iteration: bool = True, whole: bool = False) -> None:
        comes_first = not self._agreed or (starts_iteration and self._is_due())  # an agreement, or statistics
        plan = self.allgather if comes_first or whole else self.plan
        plan.meet(self.envelope(stage))

    def _landed(self, flight: Flight) -> None:
        """Counts what the second rounding did, where there was one."""
        if flight.mean_drawn is not None:
            self.communication.mean_squared_error += flight.mean_drawn.squared_error
            self.communication.mean_squared_norm += flight.mean_drawn.squared_norm

    def _make_room(self, means: list[Tensor], part: Part, sizes: Sequence[int]) -> None:
        """A vector of zeros for each tensor that another rank has and this one does not."""
        device = device_of(means, torch.device("cpu"))
        for piece, size in zip(part.slices, sizes, strict=True):
            if size and not means[piece.segment].numel():
                means[piece.segment] = torch.zeros(self.sizes[piece.segment], dtype=torch.float32, device=device)

    @property
    def _factor(self) -> float:
        """What a mean is multiplied by."""
        return float(self.transport.size) if self.op == "sum" else 1.0

    def _sections(self, payload: Tensor) -> list[Tensor]:
        """What a payload of all tensors decodes to."""
        sizes = list(self.codec.parse(payload).layout.sizes)
        # Known here, so that no payload is believed that asks for more.
        if sum(sizes) > sum(self.sizes):
            raise PayloadError(f"payload: numel is {sum(sizes)}, of at most {sum(self.sizes)}")
        return list(self.codec.decode_mean([payload], sum(sizes)).split(sizes))

    def last_as_received(self) -> list[Tensor | None] | None:
        if self.kept is None:
            return None
        sections: list[Tensor | None] = [*self._sections(self.kept[self.transport.rank])]
        return sections

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _position(self) -> list[int]:
        plan = 1 + list(PLANS).index(self.chosen["plan"]) if self.chosen else 0
        return [self.step, self.iteration, self.version, self.next_fit_at, self.codec.codebook.hash, plan]

    def state_dict(self) -> dict:
        """Counters, the codebook in use and what it belongs to: plain numbers and words."""
        counts = None if self.codec.counts is None else list(self.codec.counts)
        return {
            **super().state_dict(),
            "chosen": self.chosen,
            "version": self.version,
            "first_fit_at": self.next_fit_at,
            "drift": self.drift.state_dict(),
            "fits_mean": self._fits_mean,
            "levels": list(self.codec.levels.values),
            "counts": counts,
            "mean_levels": list(self.mean_codec.levels.values),
            "mean_counts": None if self.mean_codec.counts is None else list(self.mean_codec.counts),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly; from a state of other settings, with the counters alone and levels fitted anew."""
        super().load_state_dict(state)
        if state["settings"] != self.settings_lines():
            self.next_fit_at = max(self.iteration, 1)
            return
        chosen = state.get("chosen")  # by another number of ranks it would be another one
        if self._chooses and chosen and chosen["ranks"] == self.transport.size:
            self._use_plan(chosen["plan"], chosen["part_bytes"])
        self.next_fit_at = state["first_fit_at"]
        self._fits_mean = state.get("fits_mean", False)  # this and drift earlier releases did not have
        self.drift = Drift()
        if "drift" in state:
            self.drift.load_state_dict(state["drift"])
        self._use(_codec(self.settings, state["levels"], state["counts"]), state["version"])
        levels = state.get("mean_levels")  # which earlier releases did not have
        if levels and len(levels) == self.mean_codec.levels.num_levels + 1:
            self.mean_codec = _codec(self.mean_settings, levels, state["mean_counts"])


def rehearse_coded(settings: Settings, ranks: int, plan: str, keep: bool = False) -> Work:
    """What a rank sends and computes by this plan, with levels about as they will be fitted."""
    exchange = CodedExchange(settings, Rehearsal(ranks), plan=plan, part_bytes=0)
    exchange.codec, exchange.mean_codec = settings.typical_codec(), exchange.mean_settings.typical_codec()
    unit = -(-max(settings.min_numel, 1) // settings.bucket_size) * settings.bucket_size
    return rehearse(exchange, CODED, unit, keep)


def _codec(settings: Settings, levels: Sequence[float], counts: Sequence[int] | None) -> Codec:
    return settings.codec(Levels(tuple(levels)), None if counts is None else tuple(counts))


def _mean_settings(settings: Settings, ranks: int) -> Settings:
    """Of the second rounding: finer, and with levels of its own."""
    bits = fine_bits(settings.bits, ranks)
    levels = Levels.uniform(bits) if isinstance(settings.levels, Levels) else settings.levels
    return replace(settings, bits=bits, levels=levels)
