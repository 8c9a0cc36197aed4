"""Who moves the bits: five functions on the same values, for each kind of device.

``encode``, ``decode_mean``, ``parse``, ``statistics`` and ``squared_error`` are declared once, on ``Backend``. The
backend follows the vector's device; ``force`` names another for tests. A backend for another kind of device is a room
beside ``compiled`` and one entry of ``_BY_DEVICE``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvd_qgenx.backends.backend import Backend, Drawn
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.specification import Specification

__all__ = ["BACKENDS", "SWITCH", "Backend", "Drawn", "backend_of", "force", "home", "name"]

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


def home(device: torch.device) -> torch.device:
    """Where a vector on ``device`` is coded: there, if that kind of device has a backend, else on the CPU."""
    return device if device.type in _BY_DEVICE else torch.device("cpu")


def backend_of(device: torch.device) -> Backend:
    """The backend of a device that is a ``home``."""
    return _BY_DEVICE[device.type]


def name() -> str:
    """The CPU's backend in use: "avx2" or "portable", the compiled core, or "specification", plain torch."""
    return _BY_DEVICE["cpu"].name


@contextmanager
def force(forced: str) -> Iterator[None]:
    """For tests: vectors on the CPU go to the backend of that name inside."""
    before = _BY_DEVICE["cpu"]
    _BY_DEVICE["cpu"] = Specification() if forced == "specification" else Compiled(forced)
    try:
        yield
    finally:
        _BY_DEVICE["cpu"] = before
