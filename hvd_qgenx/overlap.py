"""Parts of a vector start during backward, as their gradients are there. Knows parameters and parts, nothing of bytes.

The order is that of backward, and the same on all ranks: the last part first, and none before all later ones have
started. Part 0 is left to the half-step, and so is all that backward did not make ready.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_qgenx.layout import Part

#: float32 bytes of a part. At 4 bits a coordinate it is 0.5 MB, 4 ms of a link of 1 Gbit/s: several times what starting
#: a collective takes. A network of 100 MB has 25 parts, so that all but its first 4 % can travel during backward.
PART_BYTES = 4 * 2**20

_SAMPLES = 32

#: Starts the part of this index with these gradients; says whether it did.
Start = Callable[[int, "list[Tensor | None]"], bool]


class _Sent(NamedTuple):
    """A gradient as it was when its part started: torch counts changes in place, but for some of them."""

    gradient: Tensor | None
    version: int
    sample: Tensor | None

    @classmethod
    def of(cls, gradient: Tensor | None) -> _Sent:
        return cls(gradient, *((0, None) if gradient is None else (gradient._version, _sample(gradient))))

    def is_still(self, gradient: Tensor | None) -> bool:
        if gradient is None or self.sample is None:
            return gradient is self.gradient
        is_same = gradient is self.gradient and gradient._version == self.version
        return is_same and torch.equal(_sample(gradient), self.sample)


def _sample(gradient: Tensor) -> Tensor:
    """Some coordinates, a copy: GradScaler and ``grad.data`` change gradients without counting it."""
    vector = gradient.detach().reshape(-1)
    return vector[:: max(len(vector) // _SAMPLES, 1)].clone()


class Overlap:
    """Watches gradients and starts parts; one exchange after another, each ended by ``end``.

    Args:
        start: a bound method, held weakly, so that the hooks of an optimizer that is gone do nothing.
        passes: how often a gradient accumulates before it is ready.
    """

    def __init__(self, start: Start, passes: int):
        self._start = weakref.WeakMethod(start)
        self.passes = passes
        self._lock = threading.Lock()
        self._hooked: set[Tensor] = set()
        self.follow([], [], [])

    def follow(self, parameters: Sequence[Tensor], names: Sequence[str], parts: Sequence[Part]) -> None:
        """From here on, these parameters and parts of them; one part alone, or none, needs no hooks."""
        self._parameters, self._names = list(parameters), list(names)
        self._index = {p: index for index, p in enumerate(parameters)}
        several = parts if len(parts) > 1 else []
        self._members = [list(dict.fromkeys(piece.segment for piece in part.slices)) for part in several]
        self._slices = [[piece.segment for piece in part.slices] for part in several]
        self._parts_of: list[list[int]] = [[] for _ in parameters]
        for part, members in enumerate(self._members):
            for index in members:
                self._parts_of[index].append(part)
        self._forget()

    def end(self) -> bool:
        """Ends the exchange, whether it was made or given up; says whether what was started still is what it was."""
        stands = not self._cleared
        for index, sent in self._sent.items():
            stands = stands and sent.is_still(self._parameters[index].grad)
        self._forget()
        return stands

    def _forget(self) -> None:
        self._accumulated = [0] * len(self._parameters)
        self._missing = [sum(self._parameters[i].requires_grad for i in members) for members in self._members]
        self._next = len(self._members) - 1
        self._sent: dict[int, _Sent] = {}
        self._cleared = False
        for p in self._parameters if self._members else ():
            if p.requires_grad and p not in self._hooked:
                p.register_post_accumulate_grad_hook(self._accumulate)
                self._hooked.add(p)

    def _accumulate(self, p: Tensor) -> None:
        """The hook: a gradient has been added to ``p.grad``."""
        with self._lock:
            if self._start() is None or p not in self._index:
                return
            index = self._index[p]
            if index in self._sent:
                self._check_cleared(index)
            self._accumulated[index] += 1
            if self._accumulated[index] == self.passes:
                for part in self._parts_of[index]:
                    self._missing[part] -= 1
            self._start_what_is_ready()

    def _check_cleared(self, index: int) -> None:
        """Raises RuntimeError unless somebody cleared the gradient meanwhile, so that this is another try."""
        gradient, sent = self._parameters[index].grad, self._sent[index]
        # Accumulating in place is one change.
        if gradient is not None and gradient is sent.gradient and gradient._version == sent.version + 1:
            raise RuntimeError(
                f"the gradient of {self._names[index]} was accumulated again after it was sent: with overlap=True the "
                f"backward of number backward_passes_per_step sends, which is {self.passes}; pass the number of "
                "backwards that precede a half-step"
            )
        self._cleared = True

    def _start_what_is_ready(self) -> None:
        while self._next > 0 and not self._missing[self._next] and not self._cleared:
            gradients = [self._parameters[index].grad for index in self._members[self._next]]
            if not self._send(gradients):
                self._next = 0
                return
            for index, gradient in zip(self._members[self._next], gradients, strict=True):
                self._sent.setdefault(index, _Sent.of(gradient))  # it may be in a later part already
            self._next -= 1

    def _send(self, gradients: Sequence[Tensor | None]) -> bool:
        start = self._start()
        if start is None or any(g is not None and g.is_sparse for g in gradients):
            return False
        own = dict(zip(self._members[self._next], gradients, strict=True))
        return start(self._next, [own[index] for index in self._slices[self._next]])
