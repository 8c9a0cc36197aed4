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

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.backends import take_gpu
from hvd_qgenx.calls import Batch, Call
from hvd_qgenx.checks import check_choice, check_name, check_named_parameters, check_process_set
from hvd_qgenx.codec import check_gradient
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.allgather import Arrived
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.gradients import as_real
from hvd_qgenx.identity import identify
from hvd_qgenx.levels import Levels
from hvd_qgenx.stock import caller, check_call, check_horovod, describe, is_optimizer, optimizer_of, postpone
from hvd_qgenx.token import CALLS, Tokens, joined_of, numbers_of
from hvd_qgenx.transports import LostError

_AGREEMENT_SECONDS = 5.0


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
        self._open = Batch(0)
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

    def decompress(self, token: Tensor, ctx: Call | None):
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

    def _decompress(self, token: Tensor, ctx: Call) -> Tensor:
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
    def _sections(batch: Batch, numbers: list[int]) -> list[int]:
        """Where each rank put a tensor."""
        return [(number - 1 - first) % CALLS for number, first in zip(numbers, batch.firsts, strict=True)]

    def _meet(self) -> None:
        """Looks once a step at who calls, and among how many ranks; ranks that have not yet, agree."""
        frame, direct = caller(), sys._getframe(2)
        if self._epoch is not (epoch := self._exchange.transport.epoch):
            self._epoch, self._open, self._described = epoch, Batch(self._open.first), None
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

    def _numbers(self, entries: list[float], call: Call) -> list[int]:
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

    def _check_joined(self, entries: list[float], call: Call) -> None:
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

    def _send(self, batch: Batch, factor: float) -> Arrived:
        """Exchanges all tensors of a step, and decodes them as if all ranks had called in the same order."""
        with self._lock:
            self._open = Batch((batch.first + len(batch.calls)) % CALLS)
        with self._exchange.unbroken():
            return self._send_whole(batch, factor)

    def _send_whole(self, batch: Batch, factor: float) -> Arrived:
        exchange = self._exchange
        exchange.settle()
        with exchange.refusing():
            if refusal := batch.refusal():
                raise refusal
            fused = exchange.fuse(batch.tensors())
        exchange.adapt_if_due(fused)
        flight = exchange.start_allgather(fused, "step", first=batch.first)
        arrived = flight.arrived
        exchange.watch([flight], "step")
        with self._communication.measure("decode"):
            broken = arrived.decode_in_order(batch.targets(), factor)
        for kept, is_broken in zip(batch.calls, broken, strict=False):
            if (call := kept()) is not None:
                call.broken = is_broken
        return arrived

    def _name(self, call: Call) -> str:
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
        self._open = Batch(self._open.first)  # a step that was under way belongs to the state before


def _refusal(tensor: Tensor) -> ValueError | None:
    """Why a tensor cannot be sent."""
    try:
        if check_gradient(tensor).requires_grad:
            raise ValueError("gradient must not require a gradient itself: rounding has none")
    except ValueError as error:
        return error
    return None
