"""What the drop-in finds out about, and leaves to, the stock optimizer of Horovod that calls it.

Horovod gives a compressor neither the parameters nor a way out: what ``compress`` or ``decompress`` raises leaves its
handles behind, and every later step fails. So errors are kept and raised in the optimizer's own ``step``, just before
it would move parameters, when Horovod is through with the gradients and the step can be repeated.
"""

from __future__ import annotations

import sys
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


def check_horovod() -> None:
    """Raises ImportError, saying how to get Horovod, if it is not there."""
    try:
        import horovod.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exchanging gradients needs Horovod with PyTorch: pip install --no-build-isolation horovod "
            "(see hvd_qgenx's README for a build that works with today's torch)"
        ) from error
