"""Who moves the bits: five functions on the same values, for each kind of device.

``encode``, ``decode_mean``, ``parse``, ``statistics`` and ``squared_error`` are declared once, on ``Backend``. The
backend follows the vector's device; ``force`` names another for tests. A backend for another kind of device is a room
beside ``compiled`` and one entry of ``_BY_DEVICE``. That of GPUs is there once ``take_gpu`` was called.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Backend, DeviceError, Drawn, device_of
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.failures import failures_of
from hvd_qgenx.backends.specification import Specification

__all__ = [
    "BACKENDS",
    "SWITCH",
    "Backend",
    "DeviceError",
    "Drawn",
    "announced",
    "backend_of",
    "device_of",
    "failures_of",
    "force",
    "gpu_backend",
    "home",
    "name",
    "take_gpu",
]

BACKENDS = ("avx2", "portable", "specification")
SWITCH = "HVD_QGENX_BACKEND"


def _find() -> Backend:
    """The backend of the CPU: the fastest, or what the switch says."""
    asked = os.environ.get(SWITCH)
    if asked == "specification":
        return Specification()
    best = best_path()
    # The portable path runs everywhere; another that was asked for must be there.
    if asked not in (None, best, "portable"):
        raise ImportError(f"{SWITCH} must be one of {', '.join(BACKENDS)} that this machine has, got {asked!r}")
    return Compiled(asked or best)


_BY_DEVICE: dict[str, Backend] = {"cpu": _find()}
_NOT_ASKED = 'not asked for; Compression.qgenx(device="cuda") asks'
_against_gpu = _NOT_ASKED


def home(device: torch.device) -> torch.device:
    """Where a vector on ``device`` is coded: there, if that kind of device has a backend, else on the CPU."""
    return device if device.type in (*_BY_DEVICE, "cuda") else torch.device("cpu")


def backend_of(device: torch.device) -> Backend:
    """The backend of a device that is a ``home``."""
    if device.type == "cuda" and device.type not in _BY_DEVICE:
        # Not before: importing the package touches no GPU.
        from hvd_qgenx.backends.cuda import stage

        _BY_DEVICE["cuda"] = stage()
    return _BY_DEVICE[device.type]


def announced(groups: Sequence[Sequence[Tensor]]) -> AbstractContextManager[None]:
    """See ``Backend.announced``; of the backend where these segments lie."""
    segments = [segment for group in groups for segment in group]
    return backend_of(home(device_of(segments, torch.device("cpu")))).announced(groups)


def name() -> str:
    """The CPU's backend in use: "avx2" or "portable", the compiled core, or "specification", plain torch."""
    return _BY_DEVICE["cpu"].name


def take_gpu() -> bool:
    """From now on vectors on a CUDA device are coded there; where that cannot be, one warning says why.

    They are coded on the CPU otherwise. Kernels have been compiled and emulated, and not yet been run on a GPU: so
    they are taken only when asked for.
    """
    global _against_gpu
    if _against_gpu == _NOT_ASKED:
        # Not before: importing the package touches no GPU.
        from hvd_qgenx.backends.cuda import find

        found = find()
        if isinstance(found, Backend):
            _BY_DEVICE["cuda"], _against_gpu = found, ""
        else:
            _against_gpu = found
            warnings.warn(f"gradients on a GPU are coded on the CPU: {found}", RuntimeWarning, stacklevel=2)
    return not _against_gpu


def gpu_backend() -> str:
    """The backend of vectors on a GPU: "cuda", or "cpu: ..." with the reason why it is not."""
    return _BY_DEVICE["cuda"].name if not _against_gpu else f"cpu: {_against_gpu}"


@contextmanager
def force(forced: str | Backend) -> Iterator[None]:
    """For tests: vectors on the CPU go to that backend, or the one of that name, inside."""
    before = _BY_DEVICE["cpu"]
    if isinstance(forced, Backend):
        _BY_DEVICE["cpu"] = forced
    else:
        _BY_DEVICE["cpu"] = Specification() if forced == "specification" else Compiled(forced)
    try:
        yield
    finally:
        _BY_DEVICE["cpu"] = before
