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


class _Operation(Pending):
    """One of Horovod's, under a name that it takes again only once this one has ended.

    Args:
        transport: whose ranks take part.
        name: of the operation.
        verb: "allgather", "alltoall" or "allreduce", by the names of Horovod's core.
        tensor: what it takes first.
        arguments: what else it takes, with ``result`` in its place, which it fills.
        dtype: as what the result is seen; None leaves it as it is.
    """

    def __init__(
        self, transport: HorovodTransport, name: str, verb: str, tensor: Tensor, arguments: tuple, result: Tensor,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.transport, self.name, self.result, self.dtype = transport, name, result, dtype
        self.key, self.epoch = (transport.process_set.process_set_id, name), _epoch()
        self.function = getattr(mpi_ops.mpi_lib, f"horovod_torch_{verb}_async_{tensor.type().replace('.', '_')}")
        self.arguments = (tensor, *arguments, transport.process_set.process_set_id)
        self.numbers: list[int] = []
        self.failure: HorovodLostError | None = None

    def begin(self) -> None:
        left = _UNDER_WAY.get(self.key)
        if left is not None and left.begun and left.epoch is _epoch():
            # Somebody interrupted the exchange that started it; the other ranks may not have come to it yet.
            Watched(left, self.transport, lambda: f"an interrupted operation named {self.name}").wait()
        _UNDER_WAY[self.key] = self
        try:
            keep(self.numbers, self.function, self.arguments)
        except RuntimeError as error:  # some rank has ended the job already
            self.failure = HorovodLostError(str(error))

    @property
    def begun(self) -> bool:
        return bool(self.numbers)

    def done(self) -> bool:
        # A number of ranks that have parted says nothing any more.
        return bool(self.failure) or self.epoch is not _epoch() or hvd.poll(self.numbers[0])

    def wait(self) -> Tensor:
        if self.epoch is not _epoch():
            raise HorovodLostError("Horovod was initialized anew meanwhile")
        if self.failure:
            raise self.failure
        try:
            mpi_ops.mpi_lib.horovod_torch_wait_and_clear(self.numbers[0])  # it spins, so ``done`` is asked before
        except RuntimeError as error:
            raise HorovodLostError(str(error)) from error
        finally:
            if _UNDER_WAY.get(self.key) is self:
                del _UNDER_WAY[self.key]
        return self.result if self.dtype is None else self.result.view(self.dtype)


def keep(numbers: list[int], function: Callable[..., int], arguments: Sequence[object]) -> None:
    """Calls a function of C and appends what it returns, so that no signal can come in between.

    Python hears signals only between its own instructions, and there is none here from the call to the list. Starting
    an operation may take half a second, in which a signal is likely, where Horovod holds its lock of process sets.
    """
    numbers.extend(map(function, *([argument] for argument in arguments)))


def _epoch() -> object:
    """Horovod's table of handles: ``init`` makes another one, also where size and rank stay what they were."""
    return mpi_ops._handle_map


#: Operations that nobody has waited for yet, by process set and name.
_UNDER_WAY: dict[tuple[int, str], _Operation] = {}


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
        result = words.new_empty(0)
        return _Operation(self, name, "allgather", words, (result, name.encode()), result, torch.uint8)

    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        result, lengths = messages.new_empty(0), splits.new_empty(0)
        return _Operation(self, name, "alltoall", messages, (splits, result, lengths, name.encode()), result)

    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        factors = 1.0 / predivide, predivide
        divisor, op = 1, hvd.Average if mean else hvd.Sum
        return _Operation(self, name, "allreduce", vector, (vector, divisor, name.encode(), op, *factors), vector)


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
