"""What a device's errors become: full memory a warning, since the CPU can do the same; all else one sentence.

A warning because nothing is lost but time: the core makes the same bytes and the same means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvd_qgenx.backends.backend import DeviceError

#: What torch raises where a device failed, beside plain RuntimeErrors; it has it from 2.8 on.
_FAILED = getattr(torch, "AcceleratorError", DeviceError)


@contextmanager
def failures_of(name: str, falls_back: bool = True) -> Iterator[None]:
    """Raises DeviceError for what torch raises where a device failed.

    A body that runs out of the device's memory ends here, with a warning, so that what follows it can do the same on
    the CPU. There, in a body of ``falls_back`` False, the device's memory does not matter.

    Args:
        name: of the backend, or in words of the device.
        falls_back: whether something follows.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not falls_back:
            raise DeviceError(f"{name} failed: {_first_line(error)}") from error
        # Not the error's own words: they have numbers that differ each time, and this is to be said once.
        warnings.warn(
            f"{name} has no memory left for the exchange: it is coded on the CPU", RuntimeWarning, stacklevel=4
        )
    except RuntimeError as error:
        if isinstance(error, DeviceError) or not (isinstance(error, _FAILED) or "CUDA error" in str(error)):
            raise
        raise DeviceError(f"{name} failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
