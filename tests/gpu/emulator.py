"""The kernels of a GPU on the CPU: csrc/gpu built by g++, as a device of its own."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import torch

from hvd_qgenx.backends.cuda.backend import Kernels
from hvd_qgenx.backends.cuda.device import Device

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "hvd_qgenx" / "csrc" / "gpu"
EXACT = ("-ffp-contract=off",)


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    """The library of emulate.cpp, made in ``folder``."""
    path = folder / "libemulated.so"
    warnings = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
    command = ["g++", "-std=c++17", "-O2", *warnings, *flags, "-shared", "-fPIC", f"-I{SOURCE}", "-o", str(path)]
    subprocess.run([*command, str(HERE / "emulate.cpp")], check=True)
    return ctypes.CDLL(str(path))


class Emulated(Device):
    """A device whose kernels run on the CPU, its memory and torch's operations being the CPU's."""

    name = "emulated"

    def __init__(self, library: ctypes.CDLL, order: int = 0):
        self.library = library
        library.emulated_order(ctypes.c_uint(order))

    def launch(self, kernel, job, where, blocks, threads, shared):
        status = self.library.emulated_launch(
            kernel.encode(), ctypes.byref(job), ctypes.c_uint(blocks), threads, ctypes.c_uint(shared)
        )
        assert status == 0, kernel

    def pinned(self, num_bytes):
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def copy_aside(self, pairs, where):
        for target, source in pairs:
            target.copy_(source)
        return lambda: None

    def wait(self, where):
        pass


@cache
def emulated(folder: Path, order: int = 0, flags: tuple[str, ...] = EXACT) -> Kernels:
    """The backend on that device; ``order`` draws in which order threads go on, 0 is ascending."""
    folder = folder / f"{order}{''.join(flags)}"
    folder.mkdir(exist_ok=True)
    return Kernels(Emulated(build(folder, *flags), order))
