"""Horovod's Compressor interface on the codec: ``compression=hvd_qgenx.Compression.qgenx(bits=4)``.

Stock Horovod sums whatever ``compress`` returns and tells it neither the tensor's name nor the operation. So
``compress`` only keeps the tensor and returns a small token for Horovod to reduce, see ``token``; the first
``decompress`` of a step, which Horovod calls when all tokens of all ranks are under way, sends everything that was kept
as one payload.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.backends import home, take_gpu
from hvd_qgenx.checks import check_choice, check_name, check_named_parameters, check_process_set
from hvd_qgenx.codec import can_be_coded, check_gradient
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.allgather import Arrived
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.gradients import as_real, is_expanded
from hvd_qgenx.identity import identify
from hvd_qgenx.levels import Levels
from hvd_qgenx.stock import describe, is_optimizer, optimizer_of, postpone
from hvd_qgenx.token import CALLS, Tokens, joined_of, numbers_of
from hvd_qgenx.transports import LostError


class NoneCompressor:
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: Tensor):
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx):
        return tensor


class FP16Compressor:
    """Sends floating-point tensors as float16."""

    @staticmethod
    def compress(tensor: Tensor):
        return (tensor.half(), tensor.dtype) if tensor.is_floating_point() else (tensor, None)

    @staticmethod
    def decompress(tensor: Tensor, ctx):
        return tensor if ctx is None else tensor.to(ctx)


_AGREEMENT_SECONDS = 5.0
_NOTHING = torch.zeros(0, dtype=torch.float32, device="cpu")


class _Batch:
    """The calls since the last exchange, and what came of them; ``first`` is the number of the first one.

    It holds contexts weakly: Horovod keeps those of a step until it asks for their means, so that a context that is
    gone belongs to a step that was given up, and its tensor is not sent.
    """

    def __init__(self, first: int):
        self.first = first
        #: How many ranks there are, and which this is; asked for once a step, since Horovod takes 10 us to answer.
        self.ranks: tuple[int, int] | None = None
        self.calls: list[weakref.ref[_Call]] = []
        self.arrived: Arrived | None = None
        #: Where each rank's calls begin, and whether they all begin with the same number.
        self.firsts: list[int] = []
        self.aligned = False
        #: The code that called ``compress`` last, and on whose behalf; what that may do holds for a whole step.
        self.caller: CodeType | None = None
        self.origin: CodeType | None = None
        self.is_gradient = False
        #: Why nothing came of them.
        self.failure: Exception | None = None

    def add(self, tensor: Tensor, real: Tensor) -> _Call:
        call = _Call(self, len(self.calls), tensor, real)
        self.calls.append(weakref.ref(call))
        return call

    def tensors(self) -> list[Tensor | None]:
        """Of all calls, in their order, real numbers; None for one that was given up."""
        return [None if (call := kept()) is None else call.real for kept in self.calls]

    def refusal(self) -> ValueError | None:
        """Why this rank cannot send what was kept."""
        return next((call.refusal for kept in self.calls if (call := kept()) is not None and call.refusal), None)

    def targets(self) -> list[Tensor]:
        """Where the mean of each call's tensor goes, contiguous float32."""
        return [_NOTHING if (call := kept()) is None else call.target for kept in self.calls]

    def take(self, arrived: Arrived) -> None:
        """From here on, means are those of these payloads."""
        self.arrived = arrived
        self.firsts = [envelope.first for envelope in arrived.envelopes]
        self.aligned = all(first == self.first for first in self.firsts)


class _Call:
    """What ``compress`` gives Horovod to hand to ``decompress``: a tensor, and its place among those of its step."""

    __slots__ = (
        "__weakref__", "_target", "batch", "broken", "index", "is_gradient", "number", "real", "refusal", "tensor",
    )  # fmt: skip

    def __init__(self, batch: _Batch, index: int, tensor: Tensor, real: Tensor):
        self.batch, self.index, self.tensor, self.is_gradient = batch, index, tensor, batch.is_gradient
        #: 1 to ``CALLS``, counted through the life of the compressor.
        self.number = (batch.first + index) % CALLS + 1
        #: The same memory as numbers that can be coded: of a complex one, real and imaginary part.
        self.real = real
        self.broken = False
        #: Why this tensor cannot be sent.
        self.refusal: ValueError | None = None
        is_own = self.is_gradient and real.dtype is torch.float32 and can_be_coded(real)
        self._target = real if is_own else None

    @property
    def target(self) -> Tensor:
        """The gradient itself if it can take the mean as it comes; else a new vector."""
        if self._target is None:
            self._target = torch.empty(self.real.numel(), dtype=torch.float32, device=home(self.real.device))
        return self._target

    def result(self) -> Tensor:
        """The tensor with the mean in it: a gradient itself, overwritten where it lies, so that views of it see it."""
        if self.target is self.real:
            return self.tensor
        mean = self.target.view(self.real.shape)
        # What is expanded has one number for several coordinates.
        if self.is_gradient and not is_expanded(self.real) and not self.tensor.is_conj():
            self.real.copy_(mean)
            return self.tensor
        mean = mean.to(device=self.real.device, dtype=self.real.dtype)
        return torch.view_as_complex(mean) if self.tensor.is_complex() else mean


class QGenXCompressor:
    """Quantises without bias, entropy codes and exchanges exactly those bytes, on an unmodified Horovod.

    Calling an instance returns a new one that is configured; ``Compression.qgenx`` itself is one process-wide instance
    with the defaults. State (exchange counter, levels) belongs to the instance: two optimizers should each get a called
    one with its own ``seed``. Right for ``op`` Average and Sum; any other raises at the first exchange.
    """

    def __init__(
        self, settings: Settings | None = None, named_parameters: Iterable | None = None, process_set=None,
        exchange: CodedExchange | None = None, name: str | None = None,
    ):  # fmt: skip
        self.settings = settings or Settings()
        self.name = check_name(name)
        # All ranks by no object, so that a copy means them wherever it is made.
        is_given = process_set is not None and check_process_set(process_set).process_set_id != 0
        self.process_set = process_set if is_given else None
        self._named = check_named_parameters(named_parameters) if named_parameters is not None else []
        self._communication = exchange.communication if exchange else Communication()
        self._made = exchange
        self._inherited: dict | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._open = _Batch(0)
        self._tokens: Tokens | None = None
        self._epoch: object = None
        self._described: weakref.ref | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        """All that a copy takes along: what is under way, and the connection, stay behind."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_open", "_tokens", "_lock")}
        return {**kept, "_made": None, "_inherited": self._made.state_dict() if self._made else self._inherited}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start_over()

    def __call__(
        self,
        bits: int = 4,
        levels: str | Levels = "adaptive",
        coder: str = "huffman",
        norm: str = "l2",
        bucket_size: int = 1024,
        rounding: str = "stochastic",
        min_numel: int = 1024,
        adapt_at: tuple[int, ...] = (0, 200, 1000, 5000),
        adapt_every: int = 10000,
        seed: int = 0,
        named_parameters: Iterable | None = None,
        process_set=None,
        nonfinite: str = "nan",
        statistics: str = "histogram",
        rate_weight: float = 0.0,
        name: str | None = None,
        device: str = "cpu",
    ) -> QGenXCompressor:
        """A configured compressor.

        Args:
            bits: width of a symbol before entropy coding, sign included, 2 to 8: 2**(bits - 1) - 1 positive levels.
            levels: "adaptive" (fitted to the gradients of all ranks, see ``adapt_at``), "uniform", "exponential", or
                a ``Levels``.
            coder: "huffman", "elias_gamma", "elias_delta", "elias_omega" or "fixed".
            norm: of a bucket, "l2" or "linf".
            bucket_size: coordinates that share a norm, 1 to 16384; buckets never span two parameters.
            rounding: "stochastic".
            min_numel: parameters with fewer coordinates travel as float32 in the same payload.
            adapt_at, adapt_every: iterations, from 0, at whose start adaptive levels are fitted anew; ``adapt_every``
                adds its multiples, 0 adds none.
            seed: of the random draws; the same on all ranks.
            named_parameters: only for messages that name a parameter.
            process_set: the ranks to exchange with, if they are not all; must be the optimizer's.
            nonfinite: what a gradient with NaN or infinity does: "nan" makes that parameter's mean NaN on all ranks,
                with a warning; "raise" raises FloatingPointError on all ranks.
            statistics: what adaptive levels are fitted to: "histogram" of the magnitudes (no model; ranks share 8,448
                bytes each at an adaptation), or the "normal" distribution with their moments, cut off outside [-1, 1]
                (the paper's form, 176 bytes); neither grows with the gradient.
            rate_weight: lambda of the objective that adaptive levels minimise, relative variance + lambda * bits per
                coordinate; 0 is the paper's, 2 ln(2) times the relative variance a good start. See ``Levels.fitted``.
            name: by which ranks know it; needed only if they use several compressors, and not all ranks the same ones.
            device: where gradients on a GPU are coded: "cpu", to which they are copied, or "cuda", by kernels that
                have not yet been run on a GPU (see docs/gpu.md), from then on for the whole process. The bytes are
                the same: ranks may differ. Where kernels cannot run one warning says why, and it is the CPU.

        Raises:
            ValueError: naming the argument and what is allowed.
        """
        if check_choice("device", device, ("cpu", "cuda")) == "cuda":
            take_gpu()
        settings = Settings(
            bits=bits, levels=levels, coder=coder, norm=norm, bucket_size=bucket_size, rounding=rounding,
            min_numel=min_numel, adapt_at=adapt_at, adapt_every=adapt_every, seed=seed, nonfinite=nonfinite,
            statistics=statistics, rate_weight=rate_weight,
        )  # fmt: skip
        return QGenXCompressor(settings, named_parameters, process_set, name=name)

    def __repr__(self) -> str:
        return f"Compression.qgenx({', '.join(self.settings.describe())})"

    @property
    def _exchange(self) -> CodedExchange:
        """What this instance's tensors go through; needs Horovod."""
        if self._made is None:
            check_horovod()
            from hvd_qgenx.transports.horovod import HorovodTransport

            transport = HorovodTransport(self.process_set)
            self._made = CodedExchange(self.settings, transport, communication=self._communication)
            self._introduce(self._made)
            if self._inherited:
                self._made.load_state_dict(self._inherited)
                self._inherited = None
        return self._made

    def _introduce(self, exchange: CodedExchange) -> None:
        """Gives the exchange the identity by which other ranks know it."""
        shapes = [f"{name} {tuple(p.shape)}" for name, p in self._named]
        words = ["compressor", str(exchange.transport.members), *([self.name] if self.name else shapes)]
        number, line = identify(self, words, f"the compressor {self.name!r}" if self.name else "a compressor")
        exchange.identify(number)
        self._line = line
        exchange.describe([line], [], [])

    @property
    def communication(self):
        """What was sent, its entropy and variance, what adaptation cost: a ``communication.Communication``."""
        return self._communication

    def compress(self, tensor: Tensor):
        """Keeps ``tensor`` for the next exchange. Returns the token that Horovod reduces, and a context."""
        with self._lock:
            if self._open.caller is not sys._getframe(1).f_code:
                self._meet()
            real = as_real(tensor)
            refusal = _refusal(real)
            if refusal and not self._open.is_gradient:
                raise refusal
            call = self._open.add(tensor, real)
            call.refusal = refusal
            assert self._tokens is not None
            token = self._tokens.take(call.number)
        return self._communication.count(token), call

    def decompress(self, token: Tensor, ctx: _Call | None):
        """The mean over ranks of the tensor that ``ctx`` stands for, times the factor that Horovod applied.

        Raises:
            DisagreementError, PayloadError, FloatingPointError, ValueError: as an exchange does; where Horovod's
                optimizer calls, its ``step`` raises, and the gradient is NaN until then.
        """
        if ctx is None:  # a sparse gradient, which Horovod sends by itself
            return token
        try:
            return self._decompress(token, ctx)
        except LostError:  # nothing can be repeated with these ranks
            raise
        except Exception as error:
            optimizer = optimizer_of(caller())
            if optimizer is None:
                raise
            if ctx.batch.failure is not error:
                ctx.batch.failure = ctx.batch.failure or error
                postpone(error, optimizer)
            return torch.full_like(ctx.tensor, torch.nan) if ctx.refusal is None else ctx.tensor

    def _decompress(self, token: Tensor, ctx: _Call) -> Tensor:
        batch, entries = ctx.batch, token.tolist()
        if batch.failure:
            raise batch.failure
        numbers = self._numbers(entries, ctx)
        if batch.arrived is None:
            batch.take(self._send(batch, entries[0]))
        # The rule: all ranks called in the same order. Where not, tokens tell.
        in_order = batch.aligned and numbers.count(ctx.number) == len(numbers)
        sections = [ctx.index] * len(numbers) if in_order else self._sections(batch, numbers)
        assert batch.arrived is not None
        if not batch.arrived.decoded_as(ctx.index, sections, entries[0]):
            ctx.broken = batch.arrived.mean_of(sections, ctx.target, entries[0])
        if ctx.broken:
            self._exchange.report_broken([True], [self._name(ctx)])
        return ctx.result()

    @staticmethod
    def _sections(batch: _Batch, numbers: list[int]) -> list[int]:
        """Where each rank put a tensor."""
        return [(number - 1 - first) % CALLS for number, first in zip(numbers, batch.firsts, strict=True)]

    def _meet(self) -> None:
        """Looks once a step at who calls, and among how many ranks; ranks that have not yet, agree."""
        frame, direct = caller(), sys._getframe(2)
        if self._epoch is not (epoch := self._exchange.transport.epoch):
            self._epoch, self._open, self._described = epoch, _Batch(self._open.first), None
            self._introduce(self._exchange)  # among other ranks it has another number
        batch = self._open
        # Who calls through another of our compressors may be somebody else the next time.
        batch.caller = None if direct.f_globals.get("__name__", "").startswith("hvd_qgenx.") else direct.f_code
        if batch.origin is frame.f_code:
            return
        transport = self._exchange.transport
        if not transport.included:
            raise ValueError("process_set of Compression.qgenx(process_set=...) does not include this rank")
        check_call(frame, transport)
        batch.ranks = transport.size, transport.rank
        if self._tokens is None or (self._tokens.size, self._tokens.rank) != batch.ranks:
            self._tokens = Tokens(*batch.ranks)
        batch.origin, batch.is_gradient = frame.f_code, is_optimizer(frame)
        if not batch.calls and transport.size > 1:
            self._agree(optimizer_of(frame))

    def _agree(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Before the first token of an optimizer, and where ranks have changed, they compare what they will send.

        Otherwise a rank with more parameters than the others would wait for tokens that never come.
        """
        if optimizer is not None and (self._described is None or self._described() is not optimizer):
            lines, dtypes, sizes = describe(optimizer)
            self._exchange.describe([self._line, *lines], dtypes, sizes)
            self._described = weakref.ref(optimizer)
        with self._exchange.unbroken():
            # A rank without this compression never comes: Horovod then finds its gradients unlike the others' tokens.
            self._exchange.settle_within(_AGREEMENT_SECONDS)

    def _numbers(self, entries: list[float], call: _Call) -> list[int]:
        """For every rank, the number under which it kept the tensor that this token belongs to."""
        assert call.batch.ranks is not None
        size, rank = call.batch.ranks
        numbers = numbers_of(entries, rank, call.number) if len(entries) == 2 + size else None
        if numbers is None:
            self._check_joined(entries, call)
            raise ValueError(
                "Compression.qgenx got its token back changed as neither hvd.Average nor hvd.Sum would: op must be one "
                "of them, in an allreduce over the compressor's process_set with the same compression on all ranks"
            )
        return numbers

    def _check_joined(self, entries: list[float], call: _Call) -> None:
        """Raises ValueError if ranks have called ``hvd.join()``."""
        assert call.batch.ranks is not None
        size, rank = call.batch.ranks
        if len(entries) == 2 + size and (joined := joined_of(entries, rank, call.number)):
            members = self._exchange.transport.members
            raise ValueError(
                f"rank {', '.join(str(members[other]) for other in joined)} has called hvd.join(), which has no "
                "allgather: for uneven data use hvd_qgenx.DistributedOptimizer, whose own join() takes part in the "
                "exchanges of the others"
            )

    def _send(self, batch: _Batch, factor: float) -> Arrived:
        """Exchanges all tensors of a step, and decodes them as if all ranks had called in the same order."""
        with self._lock:
            self._open = _Batch((batch.first + len(batch.calls)) % CALLS)
        with self._exchange.unbroken():
            return self._send_whole(batch, factor)

    def _send_whole(self, batch: _Batch, factor: float) -> Arrived:
        exchange = self._exchange
        exchange.settle()
        if refusal := batch.refusal():
            exchange.refuse()
            raise refusal
        fused = exchange.fuse(batch.tensors())
        exchange.adapt_or_withdraw(fused)
        flight = exchange.start_allgather(fused, "step", first=batch.first)
        arrived = flight.arrived
        exchange.watch([flight], "step")
        with self._communication.measure("decode"):
            broken = arrived.decode_in_order(batch.targets(), factor)
        for kept, is_broken in zip(batch.calls, broken, strict=False):
            if (call := kept()) is not None:
                call.broken = is_broken
        return arrived

    def _name(self, call: _Call) -> str:
        for name, parameter in self._named:
            if parameter.grad is call.tensor:
                return name
        return f"tensor {call.index} of shape {tuple(call.tensor.shape)}"

    def state_dict(self) -> dict:
        """Exchange counter, schedule position and codebook, equal on all ranks, as plain numbers."""
        return self._exchange.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly from a ``state_dict``; ranks that load none take over the state of those that do."""
        self._exchange.load_state_dict(state)
        self._open = _Batch(self._open.first)  # a step that was under way belongs to the state before


def check_horovod() -> None:
    """Raises ImportError, saying how to get Horovod, if it is not there."""
    try:
        import horovod.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exchanging gradients needs Horovod with PyTorch: pip install --no-build-isolation horovod "
            "(see hvd_qgenx's README for a build that works with today's torch)"
        ) from error


def _refusal(tensor: Tensor) -> ValueError | None:
    """Why a tensor cannot be sent."""
    try:
        if check_gradient(tensor).requires_grad:
            raise ValueError("gradient must not require a gradient itself: rounding has none")
    except ValueError as error:
        return error
    return None


def caller() -> FrameType:
    """Who called ``compress``: the innermost frame outside of this package that is no comprehension."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_globals.get("__name__", "").startswith("hvd_qgenx.") or frame.f_code.co_name.startswith("<")
    ):
        frame = frame.f_back
    return frame


def check_call(frame: FrameType, transport: Any) -> None:
    """Refuses what cannot be right, by the name of what was called, before anything is sent.

    Args:
        frame: who called ``compress``. One that is not Horovod's own says nothing, and only the token will tell.
        transport: the ranks that the compressor exchanges with.
    """
    module, called = frame.f_globals.get("__name__"), f"hvd.{frame.f_code.co_name}"
    if module == "horovod.torch.mpi_ops":
        values = frame.f_locals
        op, process_set = values.get("op"), values.get("process_set")
    elif module == "horovod.torch.optimizer":
        called, optimizer = "hvd.DistributedOptimizer", frame.f_locals["self"]
        op = getattr(optimizer, "op", "hvd.Adasum")  # whose class has no such attribute
        process_set = getattr(optimizer, "process_set", None)
    else:
        return
    if called.endswith("reducescatter"):
        raise ValueError(f"{called} cannot take Compression.qgenx, which returns whole tensors: use hvd.allreduce")
    _check_operation(called, op)
    ranks = transport.members if process_set is None else process_set.ranks
    if list(ranks) != transport.members:
        raise ValueError(
            f"{called} was given the process set of ranks {list(ranks)}, and its Compression.qgenx that of ranks "
            f"{transport.members}: give both the same process_set"
        )


def _check_operation(called: str, op: Any) -> None:
    import horovod.torch as hvd

    names = {hvd.Min: "hvd.Min", hvd.Max: "hvd.Max", hvd.Product: "hvd.Product", hvd.Adasum: "hvd.Adasum"}
    if op is not None and op not in (hvd.Average, hvd.Sum):
        given = names.get(op, op)
        raise ValueError(f"op must be hvd.Average or hvd.Sum for Compression.qgenx, {called} was given {given}")
