"""Vectors on a GPU: by kernels, csrc/gpu compiled at run time, or staged; behind the same five functions."""

from __future__ import annotations

from hvd_qgenx.backends.cuda.backend import Kernels
from hvd_qgenx.backends.cuda.driver import Cuda, reason_against
from hvd_qgenx.backends.cuda.staging import Staged

__all__ = ["Kernels", "Staged", "find", "stage"]


def find() -> Kernels | str:
    """The backend of this machine's GPUs, or why there is none."""
    return reason_against() or Kernels(Cuda())


def stage() -> Staged:
    """The backend of this machine's GPUs without kernels."""
    return Staged(Cuda())
