"""Exchanges: the mean of a list of tensors over ranks.

An exchange averages a list of tensors over ranks. Every kind has the same three verbs: ``prepare`` makes of a rank's
tensors what it will send, ``values`` are what the others will see of it, ``deliver`` sends it and returns the means. A
parameter may be absent (None) on some ranks, which counts as zero, or on all, which stays None.

Algorithm 1 needs a rank's own vector again, in the next exchange. ``deliver(keep=True)`` keeps it, and keeps those of
all ranks, so that ``state_dict`` is equal on all of them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.codec import Codec
from hvd_qgenx.collective import DisagreementError, Group, Record, hvd
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import codebook_of
from hvd_qgenx.quantize import Key, as_vector, squared_error
from hvd_qgenx.traffic import Communication


@dataclass(frozen=True)
class Outgoing:
    """A rank's tensors on their way: ``present`` says which exist, ``vector`` holds these one behind another."""

    present: tuple[bool, ...]
    sizes: tuple[int, ...]  # of the present ones; 0 elsewhere
    vector: Tensor
    payload: Tensor | None = None
    decoded: Tensor | None = None


def _cut(vector: Tensor, sizes: Sequence[int], present: Sequence[bool]) -> list[Tensor | None]:
    parts = vector.split(list(sizes))
    return [part if there else None for part, there in zip(parts, present, strict=True)]


def _outgoing(tensors: Sequence[Tensor | None], vectors: list[Tensor]) -> Outgoing:
    present = tuple(tensor is not None for tensor in tensors)
    sizes = tuple(0 if tensor is None else tensor.numel() for tensor in tensors)
    return Outgoing(present, sizes, torch.cat(vectors) if vectors else torch.zeros(0))


class Exchange:
    """What all kinds share: the group, the count of exchanges, the first agreement.

    Args:
        process_set: Horovod's; None is all ranks.
        op: ``hvd.Average`` or ``hvd.Sum``.
        communication: where to count; None is a new count.
    """

    #: What a mean that is not finite does, see ``Compression.qgenx``.
    nonfinite = "nan"

    def __init__(self, process_set=None, op=hvd.Average, communication: Communication | None = None):
        if op not in (hvd.Average, hvd.Sum):
            raise ValueError("op must be hvd.Average or hvd.Sum: no other is defined for what is exchanged here")
        self.op = op
        self.group = Group(process_set, communication)
        self.step = 0
        self.iteration = 0
        self.description: list[str] = []
        #: What every rank sent in the last exchange, if it was to be kept.
        self.kept: list[Tensor] | None = None
        self._agreed = False

    @property
    def communication(self) -> Communication:
        return self.group.communication

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
        """What ranks must have in common, beside the exchange's own settings; compared before the next exchange."""
        self.description, self._agreed = list(lines), False

    def _begin(self, tensors: Sequence[Tensor | None]) -> None:
        self.group.check_started()
        if not self._agreed:
            self._catch_up(self.group.agree([*self.settings_lines(), *self.description], self._position()))
            self._agreed = True
        self.communication.exchanges += 1
        self.communication.coordinates += sum(tensor.numel() for tensor in tensors if tensor is not None)

    def _catch_up(self, positions: list[list[int]]) -> None:
        """Ranks that joined late take over the state of the one with the most exchanges, the lowest of these ranks."""
        if all(position == positions[0] for position in positions):
            return
        leader = max(range(len(positions)), key=lambda rank: (positions[rank][:3], -rank))
        state = self.group.share_state(leader, self.state_dict())
        if positions[self.group.rank] != positions[leader]:
            self.load_state_dict(state)

    def _position(self) -> list[int]:
        """How far this rank is: exchanges, iterations, codebooks, and what else two ranks may differ by."""
        return [self.step, self.iteration, 0]

    def settings_lines(self) -> list[str]:
        return []

    def record(self, stage: str, term: float = 0.0, first: int = 0) -> Record:
        return Record(self.communication.number, self.step, stage, term, first)

    def refuse(self) -> None:
        """Takes the place of an exchange on a rank that cannot make it, so that the others learn it and do not wait."""
        with contextlib.suppress(DisagreementError):
            self.group.gather_records(self.record("refusal"), torch.zeros(0, dtype=torch.uint8))

    def check_finite(self, means: Sequence[Tensor | None], names: Sequence[str]) -> list[Tensor | None]:
        """The means, NaN throughout where one is not finite; warns once, or raises, naming those parameters."""
        broken = [mean is not None and not bool(mean.isfinite().all()) for mean in means]
        if not any(broken):
            return list(means)
        found = ", ".join(name for name, is_broken in zip(names, broken, strict=True) if is_broken)
        message = f"the gradient of {found} is not finite on some rank: its mean is NaN on all ranks"
        if self.nonfinite == "raise":
            raise FloatingPointError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return [torch.full_like(m, torch.nan) if b else m for m, b in zip(means, broken, strict=True)]

    def values(self, outgoing: Outgoing) -> list[Tensor | None]:
        """What the other ranks will see of this rank's tensors, as float vectors."""
        return _cut(outgoing.vector, outgoing.sizes, outgoing.present)

    def kept_values(self) -> list[Tensor | None] | None:
        """What ``values`` was in the last exchange; None if it was not kept, as on one rank alone."""
        return None

    def state_dict(self) -> dict:
        """Equal on all ranks."""
        kept = None if self.kept is None else [sent.clone() for sent in self.kept]
        return {"step": self.step, "iteration": self.iteration, "settings": self.settings_lines(), "kept": kept}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly; what was kept by another number of ranks or under other settings is dropped."""
        self.step, self.iteration = state["step"], state["iteration"]
        kept = state["kept"] if state["settings"] == self.settings_lines() else None
        self.kept = kept if kept is not None and len(kept) == self.group.size else None


class NoExchange(Exchange):
    """One rank alone: nothing is sent and nothing is rounded."""

    def prepare(self, tensors: Sequence[Tensor | None], starts_iteration: bool = True) -> Outgoing:
        self.iteration += starts_iteration
        return _outgoing(tensors, [tensor.detach().reshape(-1) for tensor in tensors if tensor is not None])

    def deliver(self, outgoing: Outgoing, stage: str, names: Sequence[str], term: float = 0.0, keep: bool = False):
        self.step += 1
        return self.values(outgoing), [term]


class DenseExchange(Exchange):
    """The mean by allreduce of one fused vector under any of Horovod's own compressors (none, fp16).

    A small allgather goes first: it says which parameters each rank has, so that no rank sends a parameter that none
    of them has, and carries the ranks' terms. Where vectors are kept it is an allgather instead.
    """

    def __init__(self, compression, process_set=None, op=hvd.Average, predivide: float = 1.0):
        super().__init__(process_set, op)
        self.compression, self.predivide = compression, predivide
        self.dtype = torch.float32
        self.kept_sizes: list[int] = []

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
        """All parameters travel in one vector, of a type that holds them all and that Horovod can reduce."""
        super().describe(lines, dtypes)
        dtype = functools.reduce(torch.promote_types, dtypes)
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype

    def settings_lines(self) -> list[str]:
        return [f"compression={getattr(self.compression, '__name__', type(self.compression).__name__)}"]

    def prepare(self, tensors: Sequence[Tensor | None], starts_iteration: bool = True) -> Outgoing:
        self._begin(tensors)
        self.iteration += starts_iteration
        vectors = [tensor.detach().cpu().to(self.dtype).reshape(-1) for tensor in tensors if tensor is not None]
        return _outgoing(tensors, vectors)

    def values(self, outgoing: Outgoing) -> list[Tensor | None]:
        rounded = self.compression.decompress(*self.compression.compress(outgoing.vector))
        return _cut(rounded, outgoing.sizes, outgoing.present)

    def deliver(self, outgoing: Outgoing, stage: str, names: Sequence[str], term: float = 0.0, keep: bool = False):
        sizes = torch.tensor(outgoing.sizes, dtype=torch.int64)
        here = torch.tensor(outgoing.present, dtype=torch.int64)
        body = torch.stack((here, sizes)).view(torch.uint8).view(-1)
        records, bodies = self.group.gather_records(self.record(stage, term), body)
        others = torch.stack([other.clone().view(torch.int64).view(2, -1) for other in bodies])
        present, common = others[:, 0].amax(dim=0).bool().tolist(), others[:, 1].amax(dim=0).tolist()
        self.kept = None
        mean = (self._allgather if keep else self._allreduce)(self._filled(outgoing, common))
        self.kept_sizes = common
        self.step += 1
        means = self.check_finite(_cut(mean, common, present), names)
        return means, [record.term for record in records]

    def _filled(self, outgoing: Outgoing, common: Sequence[int]) -> Tensor:
        """The vector with zeros for those parameters that other ranks have and this one does not."""
        parts = zip(outgoing.vector.split(list(outgoing.sizes)), common, strict=True)
        vectors = [part if len(part) else torch.zeros(size, dtype=self.dtype) for part, size in parts]
        return torch.cat(vectors) if vectors else outgoing.vector

    def _allgather(self, vector: Tensor) -> Tensor:
        compressed, context = self.compression.compress(vector)
        _, bodies = self.group.gather_records(self.record("vectors"), compressed.view(torch.uint8))
        received = [body.clone().view(compressed.dtype) for body in bodies]
        self.kept = [self.compression.decompress(one, context) for one in received]
        return _mean(self.kept, 1 if self.op == hvd.Sum else len(self.kept))

    def kept_values(self) -> list[Tensor | None] | None:
        return None if self.kept is None else list(self.kept[self.group.rank].split(self.kept_sizes))

    def state_dict(self) -> dict:
        return {**super().state_dict(), "kept_sizes": self.kept_sizes}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.kept_sizes = state.get("kept_sizes", [])

    def _allreduce(self, vector: Tensor) -> Tensor:
        compressed, context = self.compression.compress(vector)
        if len(compressed) == 0:
            return vector
        mean = self.group.allreduce(compressed, self.op, self.predivide)
        return self.compression.decompress(mean, context)


class PayloadExchange(Exchange):
    """The mean by allgather of coded payloads, decoded and added on every rank in rank order."""

    def __init__(self, settings: Settings, process_set=None, op=hvd.Average, communication=None):
        super().__init__(process_set, op, communication)
        self.settings, self.nonfinite = settings, settings.nonfinite
        self.codec = settings.codec()
        self.version = 0
        self.first_fit_at = 0

    def settings_lines(self) -> list[str]:
        return self.settings.describe()

    def prepare(self, tensors: Sequence[Tensor | None], starts_iteration: bool = True) -> Outgoing:
        """Quantises; at the start of an iteration that the schedule names, after all ranks have fitted new levels."""
        self._begin(tensors)
        outgoing = _outgoing(tensors, [as_vector(tensor) for tensor in tensors if tensor is not None])
        if starts_iteration:
            if self._is_due():
                with self.communication.adaptation():
                    self._adapt(outgoing)
            self.iteration += 1
        counts = torch.zeros(self.codec.levels.num_levels + 1, dtype=torch.int64)
        key = Key(self.settings.seed, hvd.rank(), self.step)
        payload = self.codec.encode(outgoing.vector, key, sizes=outgoing.sizes, inline=False, counts=counts)
        decoded = self.codec.decode_mean([payload], len(outgoing.vector))
        self._measure(outgoing.vector, decoded)
        self.communication.count_symbols(counts)
        return Outgoing(outgoing.present, outgoing.sizes, outgoing.vector, payload, decoded)

    def _position(self) -> list[int]:
        return [self.step, self.iteration, self.version, self.first_fit_at, self.codec.codebook_hash]

    def _is_due(self) -> bool:
        """By the schedule, or because earlier gradients had nothing to fit to; then at ever longer intervals."""
        late = self.settings.levels == "adaptive" and self.version == 0 and 0 < self.first_fit_at <= self.iteration
        return late or self.settings.adapts(self.iteration)

    def _adapt(self, outgoing: Outgoing) -> None:
        codec, form = self.codec, self.settings.statistics
        message = Statistics.measure(codec, outgoing.vector, outgoing.sizes, form).to_message()
        _, bodies = self.group.gather_records(self.record("adaptation"), message.view(torch.uint8))
        parts = [Statistics.from_message(body.clone().view(torch.int64)) for body in bodies]
        if fitted := fit(Statistics.merged(parts), self.settings.bits, self.settings.rate_weight):
            self._use(self.settings.codec(*fitted), self.version + 1)
        else:
            self.first_fit_at = 2 * self.iteration + 1

    def _use(self, codec: Codec, version: int) -> None:
        self.codec, self.version = codec, version
        self.communication.start_codebook(version)

    def _measure(self, vector: Tensor, decoded: Tensor) -> None:
        error, norm = squared_error(vector, decoded)
        self.communication.squared_error += error
        self.communication.squared_norm += norm

    def values(self, outgoing: Outgoing) -> list[Tensor | None]:
        return _cut(outgoing.decoded, outgoing.sizes, outgoing.present)

    def gather(self, outgoing: Outgoing, record: Record) -> Gathered:
        """All ranks' records and payloads."""
        records, payloads = self.group.gather_records(record, outgoing.payload)
        self.step += 1
        return Gathered(self.codec, records, payloads)

    def kept_values(self) -> list[Tensor | None] | None:
        if self.kept is None:
            return None
        sent = self.kept[self.group.rank]
        return list(self.codec.decode_mean([sent]).split(list(self.codec.sizes_of(sent))))

    def deliver(self, outgoing: Outgoing, stage: str, names: Sequence[str], term: float = 0.0, keep: bool = False):
        gathered = self.gather(outgoing, self.record(stage, term))
        self.kept = gathered.payloads if keep else None
        means = [gathered.mean_of_present(index) for index in range(len(outgoing.sizes))]
        scale = self.group.size if self.op == hvd.Sum else 1
        means = self.check_finite([mean if mean is None else mean * scale for mean in means], names)
        return means, [record.term for record in gathered.records]

    def state_dict(self) -> dict:
        """Counters, the codebook in use and what it belongs to: plain numbers and words."""
        counts = None if self.codec.counts is None else list(self.codec.counts)
        return {
            **super().state_dict(),
            "version": self.version,
            "first_fit_at": self.first_fit_at,
            "levels": list(self.codec.levels.values),
            "counts": counts,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly; from a state of other settings, with the counters alone and levels fitted anew."""
        super().load_state_dict(state)
        if state["settings"] != self.settings_lines():
            self.first_fit_at = max(self.iteration, 1)
            return
        self.first_fit_at = state["first_fit_at"]
        self._use(self.settings.codec(Levels(tuple(state["levels"])), state["counts"]), state["version"])


class Gathered:
    """All ranks' payloads of one exchange, decoded once, when first asked for a mean."""

    def __init__(self, codec: Codec, records: list[Record], payloads: list[Tensor]):
        self.codec, self.records, self.payloads = codec, records, payloads
        self.sizes = [codec.sizes_of(payload) for payload in payloads]
        books = [codebook_of(payload) for payload in payloads]
        for rank, book in enumerate(books):
            if book != books[0]:
                raise DisagreementError(
                    f"ranks disagree: rank 0 coded with codebook {books[0]:016x}, rank {rank} with codebook "
                    f"{book:016x}; one of them has a stale state: load the same one on all ranks"
                )

    @cached_property
    def fused(self) -> tuple[Tensor, ...]:
        """Means of sections that are the same on all ranks."""
        return self.codec.decode_mean(self.payloads).split(list(self.sizes[0]))

    @cached_property
    def parts(self) -> list[tuple[Tensor, ...]]:
        """Each rank's own sections."""
        decoded = [self.codec.decode_mean([payload]) for payload in self.payloads]
        return [vector.split(list(sizes)) for vector, sizes in zip(decoded, self.sizes, strict=True)]

    @cached_property
    def aligned(self) -> bool:
        return all(sizes == self.sizes[0] for sizes in self.sizes)

    def mean_of_present(self, index: int) -> Tensor | None:
        """Of section ``index`` of all ranks; one that a rank lacks counts as zero, one that all lack is None."""
        if not any(sizes[index] for sizes in self.sizes):
            return None
        if self.aligned:
            return self.fused[index]
        return _mean([parts[index] for parts in self.parts if len(parts[index])], len(self.parts))

    def mean_of(self, sections: Sequence[int]) -> Tensor:
        """Of section ``sections[rank]`` of every rank."""
        found = [sizes[section : section + 1] for sizes, section in zip(self.sizes, sections, strict=True)]
        if any(size != found[0] or not size for size in found):
            seen = ", ".join(f"rank {rank} has {size[0] if size else 'none'}" for rank, size in enumerate(found))
            raise DisagreementError(f"ranks disagree on the coordinates of one tensor: {seen}")
        if self.aligned and len(set(sections)) == 1:
            return self.fused[sections[0]]
        parts = [parts[section] for parts, section in zip(self.parts, sections, strict=True)]
        return _mean(parts, len(parts))


def _mean(parts: Sequence[Tensor], count: int) -> Tensor:
    """The float32 sum in the given order, divided by ``count``: what ``decode_mean`` does."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total.div_(count)
