"""Horovod's Compressor interface on the codec: ``compression=hvd_qgenx.Compression.qgenx(bits=4)``.

Stock Horovod sums whatever ``compress`` returns and tells it neither the tensor's name nor the operation. So
``compress`` only keeps the tensor and returns a small token for Horovod to reduce; the first ``decompress`` of a step,
which Horovod calls when all tokens of all ranks are under way, sends everything that was kept as one payload. Token
entry 0 is a one, so its reduced value is the factor that Horovod applied. Entry 1 + rank is this call's number and zero
on the other ranks, so reduced under the parameter's own name it tells where each rank put that parameter. The last
entry is rank + 1, whose mean is known: what is not linear (Adasum, Min, Max, Product) gives itself away.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Iterable
from functools import cached_property
from types import FrameType

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.backends import home, take_gpu
from hvd_qgenx.checks import check_choice, check_named_parameters, check_process_set
from hvd_qgenx.codec import can_be_coded, check_gradient
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.allgather import Arrived
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.levels import Levels


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


_CALLS = 2**20  # call numbers start again here: float32 carries them exactly, divided by any number of ranks


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

    def add(self, tensor: Tensor, is_gradient: bool) -> _Call:
        call = _Call(self, len(self.calls), tensor, is_gradient)
        self.calls.append(weakref.ref(call))
        return call

    def tensors(self) -> list[Tensor | None]:
        """Of all calls, in their order; None for one that was given up."""
        return [None if (call := kept()) is None else call.tensor for kept in self.calls]

    def targets(self) -> list[Tensor]:
        """Where the mean of each call's tensor goes, contiguous float32."""
        calls = [kept() for kept in self.calls]
        return [torch.zeros(0, dtype=torch.float32, device="cpu") if call is None else call.target for call in calls]


class _Call:
    """What ``compress`` gives Horovod to hand to ``decompress``: a tensor, and its place among those of its step.

    ``mean`` and the factor that it was decoded with are there once its step has been exchanged.
    """

    def __init__(self, batch: _Batch, index: int, tensor: Tensor, is_gradient: bool):
        self.batch, self.index, self.tensor = batch, index, tensor
        can_take = tensor.dtype is torch.float32 and can_be_coded(tensor)
        self.is_own = is_gradient and can_take
        self.broken = False

    @property
    def number(self) -> int:
        """1 to ``_CALLS``, counted through the life of the compressor."""
        return (self.batch.first + self.index) % _CALLS + 1

    @cached_property
    def target(self) -> Tensor:
        """The gradient itself, which Horovod overwrites with what it gets; else a new vector."""
        if self.is_own:
            return self.tensor
        return torch.empty(self.tensor.numel(), dtype=torch.float32, device=home(self.tensor.device))


class QGenXCompressor:
    """Quantises without bias, entropy codes and exchanges exactly those bytes, on an unmodified Horovod.

    Calling an instance returns a new one that is configured; ``Compression.qgenx`` itself is one process-wide instance
    with the defaults. State (exchange counter, levels) belongs to the instance: two optimizers should each get a called
    one with its own ``seed``. Right for ``op`` Average and Sum; any other raises at the first exchange.
    """

    def __init__(
        self, settings: Settings | None = None, named_parameters: Iterable | None = None, process_set=None,
        exchange: CodedExchange | None = None,
    ):  # fmt: skip
        self.settings = settings or Settings()
        self.process_set = None if process_set is None else check_process_set(process_set)
        self._named = check_named_parameters(named_parameters) if named_parameters is not None else []
        self._communication = exchange.communication if exchange else Communication()
        self._made = exchange
        self._open = _Batch(0)
        self._lock = threading.Lock()

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
            statistics: what adaptive levels are fitted to: "histogram" of the magnitudes (no model; ranks share 8,320
                bytes each at an adaptation), or the "normal" distribution with their moments, cut off outside [-1, 1]
                (the paper's form, 112 bytes); neither grows with the gradient.
            rate_weight: lambda of the objective that adaptive levels minimise, relative variance + lambda * bits per
                coordinate; 0 is the paper's, 2 ln(2) times the relative variance a good start. See ``Levels.fitted``.
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
        return QGenXCompressor(settings, named_parameters, process_set)

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
        return self._made

    @property
    def communication(self):
        """What was sent, its entropy and variance, what adaptation cost: a ``communication.Communication``."""
        return self._communication

    def compress(self, tensor: Tensor):
        """Keeps ``tensor`` for the next exchange. Returns the token that Horovod reduces, and a context."""
        if check_gradient(tensor).requires_grad:
            raise ValueError("gradient must not require a gradient itself: rounding has none")
        with self._lock:
            call = self._open.add(tensor, is_optimizer(caller()))
        size, rank = self._ranks(call.batch)
        entries = [0.0] * (2 + size)
        entries[0], entries[1 + rank], entries[-1] = 1.0, call.number, rank + 1
        token = torch.tensor(entries, dtype=torch.float32, device="cpu")
        return self._communication.count(token), call

    def decompress(self, token: Tensor, ctx: _Call | None):
        """The mean over ranks of the tensor that ``ctx`` stands for, times the factor that Horovod applied."""
        if ctx is None:  # a sparse gradient, which Horovod sends by itself
            return token
        sections, factor = self._sections(ctx, token)
        tensor, mean = ctx.tensor, self._mean(ctx, sections, factor)
        if ctx.broken:
            self._exchange.report_broken([True], [self._name(ctx)])
        if mean is tensor:
            return tensor
        return mean.view(tensor.shape).to(device=tensor.device, dtype=tensor.dtype)

    def _sections(self, call: _Call, token: Tensor) -> tuple[list[int], float]:
        """Where each rank put this tensor, and the factor that Horovod applied; sends the step if it is the first."""
        entries = token.tolist()
        numbers = self._numbers(entries, call)
        if call.batch.arrived is None:
            call.batch.arrived = self._send(call.batch, entries[0])
        firsts = [envelope.first for envelope in call.batch.arrived.envelopes]
        return [(number - 1 - first) % _CALLS for number, first in zip(numbers, firsts, strict=True)], entries[0]

    def _mean(self, call: _Call, sections: list[int], factor: float) -> Tensor:
        arrived = call.batch.arrived
        assert arrived is not None
        if not arrived.decoded_as(call.index, sections, factor):
            call.broken = arrived.mean_of(sections, call.target, factor)
        return call.target

    def _ranks(self, batch: _Batch) -> tuple[int, int]:
        if batch.ranks is None:
            transport = self._exchange.transport
            if not transport.included:
                raise ValueError("process_set of Compression.qgenx(process_set=...) does not include this rank")
            batch.ranks = transport.size, transport.rank
        return batch.ranks

    def _numbers(self, token: list[float], call: _Call) -> list[int]:
        """For every rank, the number under which it kept the tensor that this token belongs to."""
        size, rank = self._ranks(call.batch)
        if len(token) == 2 + size and token[0] != 0.0 and all(map(math.isfinite, token)):
            scaled = [entry * size / token[0] for entry in token[1:]]
            if abs(scaled[-1] - size * (size + 1) / 2) < 1e-3 and round(scaled[rank]) == call.number:
                return [round(number) for number in scaled[:-1]]
        raise ValueError(
            "op must be hvd.Average or hvd.Sum for Compression.qgenx, in an allreduce over its process_set "
            "with the same compression on all ranks: Horovod changed the token as none of these would"
        )

    def _send(self, batch: _Batch, factor: float) -> Arrived:
        """Exchanges all tensors of a step, and decodes them as if all ranks had called in the same order."""
        with self._lock:
            self._open = _Batch((batch.first + len(batch.calls)) % _CALLS)
        exchange = self._exchange
        fused = exchange.fuse(batch.tensors())
        exchange.settle()
        exchange.adapt_if_due(fused)
        arrived = exchange.start_allgather(fused, "step", first=batch.first).arrived
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


def caller() -> FrameType:
    """Who called ``compress``: the innermost frame outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("hvd_qgenx."):
        frame = frame.f_back
    return frame


def is_optimizer(frame: FrameType) -> bool:
    """Whether ``compress`` was called for a gradient of Horovod's optimizer.

    Horovod gives a gradient the memory of what ``decompress`` returns, so it may take the mean itself: nothing is
    copied, and views of it see the mean. What ``hvd.allreduce`` is given must stay as it is, and no argument tells
    the two apart.
    """
    return frame.f_globals.get("__name__") == "horovod.torch.optimizer"
