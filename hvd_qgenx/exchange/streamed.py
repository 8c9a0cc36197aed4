"""The coded kind for gradients that arrive bit by bit, each part sent and its mean given back as early as can be.

Where ``settled`` is true an iteration is ``send`` for every part, in an order that is the same on all ranks,
``advance`` and ``land`` for each of them, and ``finish``. Where it is not, ranks agree or fit levels first, and the
verbs of ``Exchange`` do.
The bits are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from hvd_qgenx.backends import DeviceError
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.exchange.message import WithdrawnError
from hvd_qgenx.exchange.plan import Flight
from hvd_qgenx.layout import Part

STAGE = "step"


class StreamedExchange(CodedExchange):
    """``CodedExchange``; arguments as there. ``send`` and ``land`` may be called on different threads."""

    @property
    def settled(self) -> bool:
        """Whether nothing is due before parts can be sent; the same on all ranks."""
        return self._agreed and not (self._fits_mean or self._is_due())

    def parts(self) -> Sequence[Part]:
        return self._parts()

    def send(self, part: int, tensors: Sequence[Tensor]) -> Flight:
        """Encodes and sends a part; ``tensors``, what ``fuse`` makes of one for each slice, whole.

        Raises:
            DeviceError: if this rank's device failed; the caller knows what to ``withdraw``.
        """
        own = [tensor.view(-1)[where.start : where.stop] for tensor, where in self._pair(part, tensors)]
        return self.plan.start(self._codecs, self._outgoing(own, self.parts()[part], part, STAGE))

    def withdraw(self, parts: Iterable[int], phase: int = 0) -> None:
        """Refuses parts that this rank cannot send, so that no rank waits for them; they learn it where they land."""
        for part in parts:
            self.plan.withdraw(self.envelope("refusal", part=part, phase=phase))

    def advance(self, flight: Flight, part: int) -> None:
        """Starts what comes after a part's first phase.

        Raises:
            WithdrawnError: if this rank's device failed; the second phase is refused then.
        """
        try:
            flight.advance()
        except DeviceError as error:
            self.withdraw([part], phase=1)
            raise WithdrawnError(str(error)) from error

    def land(self, flight: Flight, part: int, tensors: Sequence[Tensor]) -> tuple[bool, ...]:
        """Waits for a part and overwrites the same coordinates by their mean; says which are NaN throughout."""
        own = [tensor.view(-1)[where.start : where.stop] for tensor, where in self._pair(part, tensors)]
        return flight.collect(own, self._factor)

    def finish(self, flights: Sequence[Flight]) -> None:
        """Ends the iteration, whose flights have all landed: counts it, and the next has the next number."""
        self.iteration += 1
        self.communication.exchanges += 1
        self.communication.coordinates += sum(self.sizes)
        for flight in flights:
            self._landed(flight)
        self.watch(flights, STAGE)
        self._departed(flights)

    def _pair(self, part: int, tensors: Sequence[Tensor]):
        return zip(tensors, self.parts()[part].slices, strict=True)
