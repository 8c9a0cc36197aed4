"""Waiting for other ranks: ever more slowly, not in silence, and not for ever. Every transport's operations share it.

A collective does not say whom it waits for. So ranks that have waited for some seconds write on a board, beside the
collective, where they wait; whoever has written nothing there has not arrived, as far as can be known.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from hvd_qgenx.transports import LostError, Patience, Pending, Transport

VARIABLE = "HVD_QGENX_TIMEOUT"
Kept = TypeVar("Kept")

_LOG = logging.getLogger("hvd_qgenx")
#: A wait is looked at again after 1/32 of its length so far, so that it lasts 3 % longer at most; within these limits.
_SHORTEST, _SHARE, _LONGEST = 1e-4, 1 / 32, 0.05


def seconds(name: str, value: float | None) -> float:
    """``value``; where it is None what the environment says, else half an hour. 0 means without end.

    Raises:
        ValueError: naming the argument, or the variable, and what is allowed.
    """
    name, given = (VARIABLE, os.environ.get(VARIABLE, Patience.timeout)) if value is None else (name, value)
    try:
        number = -1.0 if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a number of seconds, 0 for no limit, got {given!r}")
    return number


class kept(Generic[Kept]):
    """A property that waits for other ranks when first asked, and is kept.

    Until Python 3.12 ``functools.cached_property`` holds one lock for all objects of a class meanwhile. Of two threads
    that wait in two exchanges one rank would let the first go on and another rank the second, and both for ever.
    """

    def __init__(self, find: Callable[[Any], Kept]):
        self._find, self._name = find, find.__name__

    def __get__(self, owner: object, kind: type | None = None) -> Kept:
        found = vars(owner)[self._name] = self._find(owner)
        return found


class Watched(Pending):
    """An operation whose wait is watched.

    Args:
        pending: the operation itself.
        what: says what it is part of, in words; asked only when there is something to tell.
    """

    def __init__(self, pending: Pending, transport: Transport, what: Callable[[], str]):
        self._pending, self._transport, self._what = pending, transport, what
        self._patience = transport.patience
        #: Whether its result, or its error, has been taken.
        self.taken = False

    def begin(self) -> None:
        self._pending.begin()

    @property
    def begun(self) -> bool:
        return self._pending.begun

    def done(self) -> bool:
        return self._pending.done()

    def wait(self) -> Tensor:
        if not self._pending.done():
            self._sleep_or_take_leave()
        self.taken = True
        try:
            return self._pending.wait()
        except LostError as error:
            raise self._transport.lost(self._obituary(error)) from error

    def _sleep_or_take_leave(self) -> None:
        """A rank that a signal takes away does not wait here any more; one that gave up was here, as the others say."""
        try:
            self._sleep()
        except LostError:
            raise
        except BaseException:
            self._write("")
            raise

    def _sleep(self) -> None:
        """Until it is done. Raises LostError after the time that was set."""
        start, waited = time.monotonic(), 0.0
        told = logged = False
        while not self._pending.done():
            time.sleep(min(max(waited * _SHARE, _SHORTEST), _LONGEST))
            waited = time.monotonic() - start
            if waited < self._patience.tell_after:
                continue
            told = told or self._tell()
            if waited >= self._patience.log_after and not logged:
                logged = True
                _LOG.warning("%s", self._sentence(waited))
            if 0 < self._patience.timeout <= waited:
                raise self._transport.lost(f"gave up: {self._sentence(waited)}")
        if told:
            self._write("")

    def _tell(self) -> bool:
        self._write(self._what())
        return True

    def _write(self, text: str) -> None:
        if board := self._transport.board:
            board.write(text)

    def _sentence(self, waited: float) -> str:
        return f"rank {self._transport.global_rank} has waited {waited:.0f} s in {self._what()}: {self._for_whom()}"

    def _for_whom(self) -> str:
        """Of the other ranks, as far as the board knows."""
        if self._transport.board is None:
            return "which ranks are missing cannot be known with this launcher, which has no place to leave a word"
        here, missing, elsewhere = self._roll_call()
        said = [f"{_ranks(here)} wait{'s' * (len(here) == 1)} there too"] if here else []
        said += [f"rank {rank} waits in {text}" for rank, text in elsewhere.items()]
        said += [f"{_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not arrived"] if missing else []
        if not missing and not elsewhere:
            said.append("nobody is missing, so one of them was stopped there or the network is cut")
        return ", ".join(said)

    def _roll_call(self) -> tuple[list[int], list[int], dict[int, str]]:
        """The other ranks that wait here, those that have written nothing, and those that wait elsewhere."""
        board, what = self._transport.board, self._what()
        others = [rank for rank in self._transport.members if rank != self._transport.global_rank]
        texts = {rank: board.read(rank) if board else "" for rank in others}
        here = [rank for rank, text in texts.items() if text == what]
        missing = [rank for rank, text in texts.items() if not text]
        return here, missing, {rank: text for rank, text in texts.items() if text not in ("", what)}

    def _obituary(self, error: LostError) -> str:
        """Who went silent: whoever does not tell the board that it has lost somebody, too."""
        sentence = f"rank {self._transport.global_rank} lost other ranks in {self._what()}"
        if self._transport.board is not None:
            self._write(self._what())
            end, missing = time.monotonic() + self._patience.grace, [0]
            while missing and time.monotonic() < end:
                time.sleep(self._patience.grace / 10)
                _, missing, _ = self._roll_call()
            silent = f"{_ranks(missing)} went silent" if missing else "all of them can still be heard"
            sentence = f"{sentence}: {silent}"
        return f"{sentence} ({error})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
