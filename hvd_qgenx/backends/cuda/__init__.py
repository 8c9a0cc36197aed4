"""Kernels on a GPU: csrc/gpu, compiled at run time, behind the same five functions."""

from __future__ import annotations

from hvd_qgenx.backends.cuda.backend import Kernels
from hvd_qgenx.backends.cuda.driver import Cuda, reason_against

__all__ = ["Kernels", "find"]


def find() -> Kernels | str:
    """The backend of this machine's GPUs, or why there is none."""
    return reason_against() or Kernels(Cuda())
