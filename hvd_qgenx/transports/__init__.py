"""Bytes without meaning: collectives on a group of ranks, each begun at once and waited for later.

A transport is a room beside ``horovod``; only that room imports its framework.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class LostError(RuntimeError):
    """Ranks that were waited for did not come, or are gone."""


class Pending(ABC):
    """An operation. It is kept first, and begun then.

    What a signal's handler raises, as KeyboardInterrupt, Python raises as soon as a call returns. Of an operation that
    was begun first nobody might know, and its name would be taken for ever.
    """

    @property
    def begun(self) -> bool:
        """Whether other ranks may have it already."""
        return True

    def begin(self) -> None:  # noqa: B027 - nothing travels
        """Starts it and returns at once."""

    @abstractmethod
    def done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The result; sleeps meanwhile, so that slower ranks have the core.

        Raises:
            LostError: if other ranks are gone.
        """


class Board(ABC):
    """Where ranks leave a word for each other beside their collectives. Neither verb raises, whatever is broken."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Replaces what this rank has written."""

    @abstractmethod
    def read(self, rank: int) -> str:
        """What global rank ``rank`` has written last; empty if nothing, or if it cannot be known."""


@dataclass(frozen=True)
class Patience:
    """How long a rank waits, see ``waiting``.

    Args:
        timeout: seconds after which a wait raises; 0 is never.
        tell_after: seconds after which the board is told.
        log_after: seconds after which a wait is logged, once.
        grace: seconds in which other ranks may tell the board that they have lost somebody, too.
    """

    timeout: float = 1800.0
    tell_after: float = 2.0
    log_after: float = 10.0
    grace: float = 1.0


class Transport(ABC):
    """The ranks that exchange. A verb makes an operation; several may be in flight, each under its name.

    All ranks must begin operations of equal names; their order is free. A tensor that was handed over must not change
    until its operation is done.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """How many ranks take part; 1 on a rank that does not."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank's place among them, from 0."""

    @property
    @abstractmethod
    def global_rank(self) -> int:
        """This rank's place among all ranks of the job."""

    @property
    def members(self) -> list[int]:
        """The places of all that take part among all ranks of the job, in their order."""
        return list(range(self.size))

    @property
    @abstractmethod
    def included(self) -> bool:
        """Whether this rank takes part."""

    @property
    def epoch(self) -> object:
        """Another object, or an unequal one, once ranks have been connected anew: then others may take part."""
        return None

    #: How long a rank waits for others.
    patience = Patience()
    #: Where ranks leave a word for each other; None where there is no such place.
    board: Board | None = None

    def lost(self, sentence: str) -> LostError:
        """What to raise when ranks are gone, of a class that the framework's own recovery knows."""
        return LostError(sentence)

    @abstractmethod
    def check_started(self) -> None:
        """Raises RuntimeError, saying what to call first, if ranks are not connected."""

    @abstractmethod
    def allgather(self, message: Tensor, name: str, lane: int = 0) -> Pending:
        """The messages of all ranks, one after another in rank order.

        Args:
            message: uint8[n]; lengths may differ between ranks; beyond lane 0 they are multiples of 8.
            lane: the same on all ranks. Operations of neighbouring lanes end one by one: they are not joined into one
                where a framework joins what waits at the same time.
        """

    @abstractmethod
    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        """What all ranks have for this one, one after another in rank order.

        Args:
            messages: uint8[n], this rank's messages to ranks 0, 1, ... one after another.
            splits: int32[size], their lengths.
        """

    @abstractmethod
    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        """The sum over ranks of equal vectors, or their mean; overwrites ``vector``.

        Args:
            vector: floats, contiguous.
            mean: whether the sum is divided by ``size``.
            predivide: splits that division: 1 / predivide before the sum, predivide / size after it.
        """
