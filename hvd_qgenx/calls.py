"""What the drop-in keeps of a step: the calls of ``compress``, the tensors that they gave, and what came of them."""

from __future__ import annotations

import weakref
from types import CodeType

import torch
from torch import Tensor

from hvd_qgenx.backends import home
from hvd_qgenx.codec import can_be_coded
from hvd_qgenx.exchange.allgather import Arrived
from hvd_qgenx.gradients import is_expanded
from hvd_qgenx.token import CALLS

_NOTHING = torch.zeros(0, dtype=torch.float32, device="cpu")


class Batch:
    """The calls since the last exchange, and what came of them; ``first`` is the number of the first one.

    It holds contexts weakly: Horovod keeps those of a step until it asks for their means, so that a context that is
    gone belongs to a step that was given up, and its tensor is not sent.
    """

    def __init__(self, first: int):
        self.first = first
        #: How many ranks there are, and which this is; asked for once a step, since Horovod takes 10 us to answer.
        self.ranks: tuple[int, int] | None = None
        self.calls: list[weakref.ref[Call]] = []
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

    def add(self, tensor: Tensor, real: Tensor) -> Call:
        call = Call(self, len(self.calls), tensor, real)
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


class Call:
    """What ``compress`` gives Horovod to hand to ``decompress``: a tensor, and its place among those of its step."""

    __slots__ = (
        "__weakref__", "_target", "batch", "broken", "index", "is_gradient", "number", "real", "refusal", "tensor",
    )  # fmt: skip

    def __init__(self, batch: Batch, index: int, tensor: Tensor, real: Tensor):
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
