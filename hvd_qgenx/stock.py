"""What the drop-in finds out about, and leaves to, the stock optimizer of Horovod that calls it.

Horovod gives a compressor neither the parameters nor a way out: what ``compress`` or ``decompress`` raises leaves its
handles behind, and every later step fails. So errors are kept and raised in the optimizer's own ``step``, just before
it would move parameters, when Horovod is through with the gradients and the step can be repeated.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch

_NAME = "horovod.torch.optimizer"


def is_optimizer(frame: FrameType) -> bool:
    """Whether the compressor was called for a gradient of Horovod's optimizer.

    Horovod gives a gradient the memory of what ``decompress`` returns, so it may take the mean itself: nothing is
    copied, and views of it see the mean. What ``hvd.allreduce`` is given must stay as it is, and no argument tells
    the two apart.
    """
    return frame.f_globals.get("__name__") == _NAME


def optimizer_of(frame: FrameType) -> torch.optim.Optimizer | None:
    """The optimizer that called; None if ``hvd.allreduce`` or the like did."""
    return frame.f_locals.get("self") if is_optimizer(frame) else None


def describe(optimizer: Any) -> tuple[list[str], list[torch.dtype], list[int]]:
    """A line, a type and a size for each parameter that Horovod will reduce, whether it has a gradient or not."""
    names = getattr(optimizer, "_parameter_names", {})
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    lines = [f"{names.get(p, 'a parameter')} of shape {tuple(p.shape)} and type {p.dtype}" for p in parameters]
    return lines, [p.dtype for p in parameters], [p.numel() for p in parameters]


def postpone(error: Exception, optimizer: torch.optim.Optimizer) -> None:
    """Raises ``error`` in the coming step instead of moving parameters, once."""

    def raise_it(*arguments: object) -> None:
        # Torch calls this also before Horovod's own step, which must run first.
        if not getattr(optimizer, "_handles", None):
            hook.remove()
            raise error

    hook = optimizer.register_step_pre_hook(raise_it)
