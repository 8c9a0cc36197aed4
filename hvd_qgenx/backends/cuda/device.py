"""What the backend asks of a device, beside torch's own operations: kernels, and waiting for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from ctypes import Structure

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.backend import DeviceError

__all__ = ["Device", "DeviceError"]


class Device(ABC):
    """One kind of device; work goes to the device of the tensors and there to torch's current stream."""

    name: str

    @abstractmethod
    def launch(self, kernel: str, job: Structure, where: torch.device, blocks: int, threads: int, shared: int) -> None:
        """Starts a kernel of csrc/gpu/kernels.cu; returns at once. ``shared``: bytes of shared memory of a block."""

    @abstractmethod
    def pinned(self, num_bytes: int) -> Tensor:
        """uint8[num_bytes] on the CPU, which the device can copy to and from by itself."""

    @abstractmethod
    def copy_aside(self, pairs: Sequence[tuple[Tensor, Tensor]], where: torch.device) -> Callable[[], None]:
        """Starts copies beside the current stream, behind what was started there and before what will be.

        Args:
            pairs: targets and sources, all to the device or all from it.

        Returns:
            What sleeps until they are done.
        """

    @abstractmethod
    def wait(self, where: torch.device) -> None:
        """Sleeps until all that was started is done."""

    def upload(self, array: np.ndarray, where: torch.device) -> Tensor:
        """uint8 tensor with an array's bytes, on the device."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        pinned = self.pinned(len(flat))
        pinned.numpy()[:] = flat
        return pinned.to(where, non_blocking=True, copy=True)
