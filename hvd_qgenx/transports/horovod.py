"""Horovod's collectives on a process set."""

from __future__ import annotations

import contextlib
import itertools
import os
import urllib.request
from collections.abc import Callable, Sequence
from typing import NamedTuple

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor

from hvd_qgenx.transports import Board, LostError, Patience, Pending, Transport
from hvd_qgenx.transports.hosts import Place, check_hosts, group
from hvd_qgenx.transports.waiting import Watched, seconds

#: Horovod copies operations of one dtype that wait at the same time into one, which ends when its last byte is there;
#: parts could then not be decoded one by one. Bytes of different lanes travel as words of different types.
_LANES = (torch.uint8, torch.int64, torch.int32, torch.int16, torch.int8)


def start() -> int:
    """Connects this process with the others, unless it is; returns its rank among all."""
    hvd.init()
    return hvd.rank()


class HorovodLostError(LostError, HorovodInternalError):
    """``LostError``, of the class after which ``horovod.torch.elastic.run`` starts again from the last commit."""


class LauncherBoard(Board):
    """A board at ``horovodrun --gloo``, whose rendezvous server keeps words for its ranks while the job runs."""

    def __init__(self, address: str, port: str):
        self._url = f"http://{address}:{port}/hvd_qgenx.waiting"

    def write(self, text: str) -> None:
        request = urllib.request.Request(f"{self._url}/{hvd.rank()}", data=text.encode(), method="PUT")
        with contextlib.suppress(OSError, ValueError):
            urllib.request.urlopen(request, timeout=_BOARD_SECONDS).close()

    def read(self, rank: int) -> str:
        try:
            with urllib.request.urlopen(f"{self._url}/{rank}", timeout=_BOARD_SECONDS) as found:
                return found.read().decode()
        except (OSError, ValueError):
            return ""


_BOARD_SECONDS = 2.0


def launcher_board() -> LauncherBoard | None:
    """The board of the launcher that started this process; None if it has none, as under MPI."""
    address, port = (os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}") for name in ("ADDR", "PORT"))
    return LauncherBoard(address, port) if address and port else None


class _Handle(Pending):
    """A handle of Horovod's; its own wait spins, and takes the core that a slower rank needs to arrive."""

    def __init__(self, handle: int, key: tuple[int, str], dtype: torch.dtype | None = None):
        self.handle, self.key, self.dtype, self.epoch = handle, key, dtype, _epoch()

    def done(self) -> bool:
        # A handle of ranks that have parted says nothing any more.
        return self.epoch is not _epoch() or hvd.poll(self.handle)

    def wait(self) -> Tensor:
        if self.epoch is not _epoch():
            raise HorovodLostError("Horovod was initialized anew meanwhile")
        try:
            result = hvd.synchronize(self.handle)
        except HorovodInternalError as error:
            raise HorovodLostError(str(error)) from error
        finally:
            _UNDER_WAY.pop(self.key, None)
        result = result[0] if isinstance(result, tuple) else result  # alltoall adds the lengths
        return result if self.dtype is None else result.view(self.dtype)


class _Failed(Pending):
    """An operation that could not even be started."""

    def __init__(self, error: LostError):
        self.error = error

    def done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        raise self.error


def _epoch() -> object:
    """Horovod's table of handles: ``init`` makes another one, also where size and rank stay what they were."""
    return mpi_ops._handle_map


#: Operations that nobody has waited for yet, by process set and name, which Horovod takes only once at a time.
_UNDER_WAY: dict[tuple[int, str], _Handle] = {}


class HorovodTransport(Transport):
    """The ranks of a process set; None is all of them.

    Args:
        timeout: seconds after which a wait raises, see ``waiting.seconds``.
    """

    def __init__(self, process_set=None, timeout: float | None = None):
        self.process_set = hvd.global_process_set if process_set is None else process_set
        self.patience = Patience(seconds("timeout", timeout))
        self.board = launcher_board()

    @property
    def size(self) -> int:
        return self.process_set.size() if self.included else 1

    @property
    def rank(self) -> int:
        return self.process_set.rank()

    @property
    def global_rank(self) -> int:
        return hvd.rank()

    @property
    def members(self) -> list[int]:
        return list(self.process_set.ranks) if self.included else [self.global_rank]

    @property
    def included(self) -> bool:
        return self.process_set.included()

    @property
    def epoch(self) -> object:
        return _epoch()

    def lost(self, sentence: str) -> LostError:
        return HorovodLostError(sentence)

    def check_started(self) -> None:
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialized: call horovod.torch.init() first")

    def allgather(self, message: Tensor, name: str, lane: int = 0) -> Pending:
        words = message.view(_LANES[lane % len(_LANES)])
        return self._start(
            name, lambda: hvd.allgather_async(words, name=name, process_set=self.process_set), torch.uint8
        )

    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        return self._start(name, lambda: hvd.alltoall_async(messages, splits, name=name, process_set=self.process_set))

    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        return self._start(
            name,
            lambda: hvd.allreduce_async_(
                vector,
                name=name,
                op=hvd.Average if mean else hvd.Sum,
                prescale_factor=1.0 / predivide,
                postscale_factor=predivide,
                process_set=self.process_set,
            ),
        )

    def _start(self, name: str, begin: Callable[[], int], dtype: torch.dtype | None = None) -> Pending:
        key = self.process_set.process_set_id, name
        left = _UNDER_WAY.pop(key, None)
        if left is not None and left.epoch is _epoch():
            # Somebody interrupted the exchange that started it; the other ranks may not have come to it yet.
            Watched(left, self, lambda: f"an interrupted operation named {name}").wait()
        try:
            _UNDER_WAY[key] = handle = _Handle(begin(), key, dtype)
        except HorovodInternalError as error:  # some rank has ended the job already
            return _Failed(HorovodLostError(str(error)))
        return handle


class _Leaders(HorovodTransport):
    """The first ranks of all hosts; of as many ranks also as seen from those that it does not include."""

    def __init__(self, process_set, hosts: int):
        super().__init__(process_set)
        self.hosts = hosts

    @property
    def size(self) -> int:
        return self.hosts

    @property
    def members(self) -> list[int]:
        return list(self.process_set.ranks)


class Hosts(NamedTuple):
    """The ranks of this rank's host, and the first ranks of all hosts."""

    within: HorovodTransport
    leaders: HorovodTransport


#: Process sets made here, by their ranks: Horovod makes none twice and does not give one back.
_MADE: dict[tuple[int, ...], hvd.ProcessSet] = {}
_CALLS = itertools.count()


def hosts_of(process_set, sets=None) -> Hosts | None:
    """The hosts of a process set, found by Horovod's local ranks; to be called by all ranks of the job, in one order.

    Args:
        process_set: whose ranks are divided. A rank outside it gets None.
        sets: the two process sets themselves, where they exist already; only the ranks of ``process_set`` then call.

    Raises:
        ValueError: saying what to do, if hosts cannot be told apart or process sets cannot be made.
    """
    if sets is not None:
        return _given_hosts(process_set, sets)
    place = Place(hvd.local_rank(), hvd.local_size(), hvd.cross_rank())
    places = [Place(*other) for other in hvd.allgather_object(tuple(place), name=f"hvd_qgenx.hosts.{next(_CALLS)}")]
    ranks = process_set.ranks
    hosts = [[rank for rank in host if rank in ranks] for host in group(places)]
    hosts = [host for host in hosts if host]
    made = [_process_set(host, process_set) for host in hosts]
    # One host alone has nothing to exchange with others.
    leaders = _process_set([host[0] for host in hosts], process_set) if len(hosts) > 1 else made[0]
    own = [one for one, host in zip(made, hosts, strict=True) if hvd.rank() in host]
    return Hosts(HorovodTransport(own[0]), _Leaders(leaders, len(hosts))) if own else None


def _given_hosts(process_set, sets) -> Hosts | None:
    if not process_set.included():
        return None
    described = [_gathered(one.ranks, process_set) for one in sets]
    check_hosts(process_set.ranks, list(zip(*described, strict=True)))
    return Hosts(HorovodTransport(sets[0]), _Leaders(sets[1], len(sets[1].ranks)))


def _gathered(numbers: Sequence[int], process_set) -> list[list[int]]:
    """The numbers of all ranks of a process set."""
    own = torch.tensor([len(numbers), *numbers], dtype=torch.int64, device="cpu")
    flat = hvd.allgather(own, name="hvd_qgenx.given_hosts", process_set=process_set).tolist()
    found = []
    while flat:
        found.append(flat[1 : 1 + flat[0]])
        flat = flat[1 + flat[0] :]
    return found


def _process_set(ranks: list[int], whole):
    """The process set of these ranks; made only if it must be, and on all ranks of the job alike."""
    if ranks == list(whole.ranks):
        return whole
    key = tuple(ranks)
    if key not in _MADE or _MADE[key].process_set_id is None:
        try:
            _MADE[key] = hvd.add_process_set(ranks)
        except ValueError as error:
            raise ValueError(
                f"hierarchical=True could not make the process set of ranks {ranks}: run with "
                "HOROVOD_DYNAMIC_PROCESS_SETS=1, or make two sets for each rank and give them, "
                f"hierarchical=(host, leaders); Horovod says: {error}"
            ) from error
    return _MADE[key]
