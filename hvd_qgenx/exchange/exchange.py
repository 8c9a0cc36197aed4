"""The verbs of an exchange, declared once: the mean of a list of tensors over ranks.

A caller says ``fuse``, ``settle``, ``adapt_if_due``, ``submit`` and ``collect``, in this order. A parameter may be
absent (None) on some ranks, which counts as zero, or on all, which stays None. Before them it may ``start`` some of the
``parts``, each as soon as its tensors are known; what of it no longer holds it must ``give_up``.

Algorithm 1 needs a rank's own vector again, in the next exchange. ``submit(keep=True)`` keeps it, and those of all
ranks, so that ``state_dict`` is equal on all of them.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_qgenx.backends import DeviceError, failures_of
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange import agreement
from hvd_qgenx.exchange.agreement import agree, compare_replicas, leader_of, share_state
from hvd_qgenx.exchange.message import DisagreementError, Envelope, Messenger, WithdrawnError
from hvd_qgenx.layout import Part
from hvd_qgenx.transports import Pending, Transport

OPERATIONS = ("mean", "sum")
_POLL_SECONDS = 1e-3

#: This rank's term of a sum over ranks, made from its own vectors as all ranks will receive them.
Term = Callable[[list["Tensor | None"]], float]


@dataclass(frozen=True)
class Fused:
    """A rank's tensors, contiguous, where they lie: ``present`` says which exist; those that do not are empty."""

    present: tuple[bool, ...]
    segments: tuple[Tensor, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each tensor; 0 for one that is absent."""
        return tuple(map(Tensor.numel, self.segments))

    def pick(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """The vectors of the tensors that exist, and None for the others."""
        return [vector if there else None for vector, there in zip(vectors, self.present, strict=True)]


def fuse(tensors: Sequence[Tensor | None], prepare: Callable[[Tensor], Tensor]) -> Fused:
    """``prepare`` makes of a tensor what can be sent, without a copy if it can."""
    nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
    segments = tuple(nothing if tensor is None else prepare(tensor) for tensor in tensors)
    return Fused(tuple(tensor is not None for tensor in tensors), segments)


class Collected(NamedTuple):
    """The means, of any shape, None where no rank had the tensor; and all ranks' terms."""

    means: list[Tensor | None]
    terms: list[float]
    #: Whether no rank had data: all of them said "joined".
    all_joined: bool = False


class Exchange(ABC):
    """What all kinds share: the ranks, the count of exchanges, the agreement before the first of them.

    Args:
        transport: the ranks that exchange.
        op: "mean" or "sum".
        communication: where to count; None is a new count.
    """

    #: What a mean that is not finite does, see ``Compression.qgenx``.
    nonfinite = "nan"
    #: Whether it is told of here; not in an exchange inside another one.
    reports = True

    def __init__(self, transport: Transport, op: str = "mean", communication: Communication | None = None):
        if op not in OPERATIONS:
            raise ValueError("op must be hvd.Average or hvd.Sum: no other is defined for what is exchanged here")
        self.op = op
        self.transport = transport
        self.messenger = Messenger(transport, communication or Communication())
        self.step = 0
        self.iteration = 0
        self.description: list[str] = []
        self.sizes: tuple[int, ...] = ()
        #: What every rank sent in the last exchange, if it was to be kept.
        self.kept: list[Tensor] | None = None
        self._agreed = False
        # One that was started and is not over.
        self._agreement: Pending | None = None
        # Whether an exception ended an exchange that other ranks may have made.
        self._interrupted = False
        self._epoch = transport.epoch

    @property
    def communication(self) -> Communication:
        """What this rank has handed to collectives, and what came of it."""
        return self.messenger.communication

    # ---- the verbs, in the order in which they are called ------------------------------------------------------------

    @abstractmethod
    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        """A rank's tensors as vectors that can be sent; not copied where they are of the right kind already."""

    def settle(self) -> None:
        """Agrees with all ranks on settings and parameters, before the first exchange and after ``describe``.

        Ranks that joined late take over the state of the one that is furthest.

        Raises:
            DisagreementError: on every rank, naming what differs.
        """
        self.transport.check_started()
        self._follow_epoch()
        if self._interrupted:
            self._resume()
        if not self._agreed:
            started, self._agreement = self._agreement or self._start_agreement(), None
            self._catch_up(agree(self.messenger, started))
            self._agreed = True

    def settle_within(self, seconds: float) -> bool:
        """``settle``, unless some rank has not come after so long; says whether it is done, or is left to ``settle``.

        For a caller who must not wait here, since a rank that will never come is found out elsewhere.
        """
        self.transport.check_started()
        self._follow_epoch()
        if not (self._agreed or self._interrupted):
            self._agreement = self._agreement or self._start_agreement()
            end = time.monotonic() + seconds
            while not self._agreement.done():
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_SECONDS)
        self.settle()
        return True

    def _start_agreement(self) -> Pending:
        return agreement.start(self.messenger, [*self.settings_lines(), *self.description], self._position())

    def _follow_epoch(self) -> None:
        """Where ranks have been connected anew all agree anew, and what was under way is gone with the old ones."""
        if self._epoch is not self.transport.epoch:
            self._epoch, self._agreed, self._interrupted = self.transport.epoch, False, False
            self._agreement = None
        # What an earlier process of this rank may have left there.
        if not self._agreed and self.transport.board:
            self.transport.board.write("")

    def _resume(self) -> None:
        """After an interrupted exchange: all ranks were interrupted and repeat it, or all of them raise."""
        self._interrupted = False  # it is told once; ranks that have parted have other counters
        self._agreement = None
        self.messenger.drain()
        nothing = torch.zeros(0, dtype=torch.uint8, device="cpu")
        self.messenger.gather(self.envelope("interrupted"), nothing)

    def adapt_if_due(self, fused: Fused, starts_iteration: bool = True) -> None:
        """Counts an iteration that starts here; where levels are due, all ranks fit new ones first.

        Raises:
            WithdrawnError: if this rank's device failed; no rank waits for it, the others get a refusal.
        """
        try:
            self._fit_if_due(fused, starts_iteration)
        except DeviceError as error:
            self.refuse(starts_iteration)
            raise WithdrawnError(str(error)) from error
        self.iteration += starts_iteration

    def _fit_if_due(self, fused: Fused, starts_iteration: bool) -> None:  # noqa: B027 - not every kind has levels
        """Fits levels where an iteration starts that they are due in."""

    @abstractmethod
    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Any:
        """Sends this rank's vectors and returns at once, with what ``collect`` takes.

        Args:
            fused: what ``fuse`` made. It must not change before ``collect``.
            stage: which half-step this is, "extrapolation" or "step"; "joined" from a rank that has no data and takes
                part in whatever the others do. A mean is then that of the ranks that have data.
            term: makes this rank's term of a sum, which travels along.
            keep: whether ``last_as_received`` will be asked for.
        """

    @abstractmethod
    def collect(self, submitted: Any, names: Sequence[str]) -> Collected:
        """Waits for all ranks and returns the mean, or sum, of each tensor.

        The vectors of ``fused`` are overwritten where they can take the result; the means are then views of them. A
        tensor that is not finite on some rank has NaN throughout, on all ranks, with one warning.

        Args:
            names: of the tensors, for messages.

        Raises:
            DisagreementError: on every rank, if ranks are not at the same exchange.
            PayloadError: if what another rank sent is damaged.
            FloatingPointError: on every rank, under nonfinite="raise".
        """

    # ---- before them, where a vector need not be whole to be sent ----------------------------------------------------

    def parts(self) -> Sequence[Part]:
        """What ``start`` takes, cut from all tensors that were described; none where everything starts at once."""
        return ()

    def start(self, part: int, tensors: Sequence[Tensor | None], stage: str, starts_iteration: bool = True) -> bool:
        """Sends one part of the coming exchange ahead of ``submit``, if that can be; says whether it did.

        Ranks need not start the same parts, nor at the same time. It cannot be before ranks have settled, when levels
        are due to be fitted, and for part 0, which always starts in ``submit``.

        Args:
            part: index into ``parts``.
            tensors: whole, one for each slice of the part; None for one that is absent.
            stage, starts_iteration: as ``submit`` and ``adapt_if_due`` will be told.
        """
        return False

    def give_up(self) -> None:  # noqa: B027 - nothing was started
        """What was started is no longer what this rank means to send. The exchange then takes a second round."""

    # ---- around them -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Everything from ``settle`` to the use of the means happens in this context, so that it counts once or never.

        An error that all ranks raise leaves counters where they were. Any other exception, as KeyboardInterrupt, or
        what a signal raises, may leave the other ranks with an exchange that this one has not made: the next one then
        asks all ranks.
        """
        before = self.counters
        try:
            yield
        except FloatingPointError:  # under nonfinite="raise": the exchange was made
            raise
        except (DisagreementError, ValueError, WithdrawnError):
            # All ranks got it, or one refused and the others learnt of it. They agree anew, wherever they go on from.
            self.counters, self._agreed = before, False
            raise
        except BaseException:
            self.counters, self._interrupted = before, True
            raise

    @property
    def counters(self) -> tuple[int, int]:
        """How many exchanges were made and iterations started."""
        return self.step, self.iteration

    @counters.setter
    def counters(self, value: tuple[int, int]) -> None:
        self.step, self.iteration = value

    def weight(self, envelopes: Sequence[Envelope]) -> float:
        """What a mean over all ranks is multiplied by, to be one over those that have data."""
        joined = sum(envelope.stage == "joined" for envelope in envelopes)
        return 1.0 if self.op == "sum" or joined in (0, len(envelopes)) else len(envelopes) / (len(envelopes) - joined)

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        """What ranks must have in common, beside the exchange's own settings; compared before the next exchange.

        Args:
            lines: words that must be equal on all ranks.
            dtypes, sizes: of all tensors, those included that a rank may lack in some exchanges.
        """
        self.description, self.sizes, self._agreed = list(lines), tuple(sizes), False

    def identify(self, number: int) -> None:
        """From here on, messages say that they belong to the optimizer of this number."""
        self.communication.number = number

    def settings_lines(self) -> list[str]:
        """The exchange's own settings, a line each."""
        return []

    @contextlib.contextmanager
    def refusing(self, starts_iteration: bool = True, whole: bool = False) -> Iterator[None]:
        """In which this rank makes ready what it will send. No rank waits for what cannot be sent: it is refused.

        Args:
            starts_iteration, whole: as of ``refuse``.

        Raises:
            WithdrawnError: if this rank's device failed.
            ValueError: what the body raised of a tensor.
        """
        try:
            with failures_of("the gradients' device", falls_back=False):
                yield
        except (ValueError, DeviceError) as error:
            self.refuse(starts_iteration, whole)
            if isinstance(error, DeviceError):
                raise WithdrawnError(str(error)) from error
            raise

    def refuse(self, starts_iteration: bool = True, whole: bool = False) -> None:
        """Takes the place of an exchange on a rank that cannot make it, so that the others learn it and do not wait.

        Args:
            starts_iteration, whole: as in that exchange; ``whole`` if it has a term or keeps vectors.
        """
        with contextlib.suppress(DisagreementError):
            self.meet("refusal", starts_iteration, whole)

    def meet(self, stage: str, starts_iteration: bool = True, whole: bool = False) -> None:
        """Sends an envelope alone, in the way in which ranks wait that begin an exchange.

        Args:
            stage: what it says.
            starts_iteration, whole: as of ``refuse``.

        Raises:
            DisagreementError: on every rank, unless all do the same.
        """
        self.messenger.gather(self.envelope(stage), torch.zeros(0, dtype=torch.uint8, device="cpu"))

    def compare_replicas(self, fingerprints: Sequence[bytes], names: Sequence[str]) -> None:
        """Raises DisagreementError on all ranks unless they hold the same tensors, by ``fingerprint`` of each."""
        self.settle()
        compare_replicas(self.messenger, self.envelope("replicas"), fingerprints, names)

    def envelope(self, stage: str, term: float = 0.0, first: int = 0, part: int = 0, phase: int = 0) -> Envelope:
        """Of a message that belongs to the coming exchange."""
        return Envelope(self.communication.number, self.step, stage, term, first, part, phase)

    def last_as_received(self) -> list[Tensor | None] | None:
        """This rank's vectors of the last exchange as all ranks received them; None if they were not kept."""
        return None

    def state_dict(self) -> dict:
        """All memory, equal on all ranks."""
        kept = None if self.kept is None else [sent.clone() for sent in self.kept]
        return {"step": self.step, "iteration": self.iteration, "settings": self.settings_lines(), "kept": kept}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly; what was kept by another number of ranks or under other settings is dropped.

        Ranks agree again if it moves this one; to another point than the others' it is an error at the next exchange.
        """
        self._agreed = self._agreed and (state["step"], state["iteration"]) == self.counters
        self._interrupted = False
        self.step, self.iteration = state["step"], state["iteration"]
        kept = state["kept"] if state["settings"] == self.settings_lines() else None
        self.kept = kept if kept is not None and len(kept) == self.transport.size else None

    def _catch_up(self, positions: list[list[int]]) -> None:
        if all(position == positions[0] for position in positions):
            return
        leader = leader_of(positions)
        state = share_state(self.messenger, leader, self.state_dict())
        if positions[self.transport.rank] != positions[leader]:
            self.load_state_dict(state)

    def _position(self) -> list[int]:
        """How far this rank is: exchanges, iterations, codebooks, and what else two ranks may differ by."""
        return [self.step, self.iteration, 0]

    def _count(self, fused: Fused) -> None:
        self.communication.exchanges += 1
        self.communication.coordinates += sum(fused.sizes)

    def report_broken(self, broken: Sequence[bool], names: Sequence[str]) -> None:
        """Warns once of the means that are not finite, or raises, naming them."""
        if not self.reports or not any(broken):
            return
        found = ", ".join(name for name, is_broken in zip(names, broken, strict=True) if is_broken)
        message = f"the gradient of {found} is not finite on some rank: its mean is NaN on all ranks"
        if self.nonfinite == "raise":
            raise FloatingPointError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class Alone(Exchange):
    """One rank alone: nothing is sent and nothing is rounded. What it was told of codebooks it keeps for others."""

    _inherited: dict | None = None

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        return fuse(tensors, lambda tensor: tensor.detach().reshape(-1))

    def settle(self) -> None:
        self.transport.check_started()

    def compare_replicas(self, fingerprints: Sequence[bytes], names: Sequence[str]) -> None:
        """There are no others."""

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Fused:
        self.step += 1
        return fused

    def collect(self, submitted: Fused, names: Sequence[str]) -> Collected:
        return Collected(submitted.pick(submitted.segments), [])

    def state_dict(self) -> dict:
        return {**super().state_dict(), **(self._inherited or {}), "step": self.step, "iteration": self.iteration}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._inherited = {**state, "kept": None}
