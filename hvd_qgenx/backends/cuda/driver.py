"""A GPU through the CUDA driver: modules are loaded and kernels launched by ctypes, on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from hvd_qgenx.backends.cuda import nvrtc
from hvd_qgenx.backends.cuda.device import Device, DeviceError

OLDEST = (7, 5)  # the first architecture that every NVRTC of ``nvrtc`` knows


def reason_against() -> str | None:
    """Why no kernels can run here, or None. Looks at the devices and compiles for them, unless that was kept."""
    if torch.version.hip:
        return "torch is built for another vendor's devices"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capabilities = set(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if (oldest := min(capabilities)) < OLDEST:
        return f"the device's compute capability is {oldest[0]}.{oldest[1]}, below {OLDEST[0]}.{OLDEST[1]}"
    try:
        # Now, not in the first exchange: what fails here is a reason, what fails there is an error on one rank.
        for major, minor in capabilities:
            nvrtc.compiled(f"sm_{major}{minor}")
        _driver()
    except DeviceError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the CUDA driver cannot be loaded: {error}") from None


class Cuda(Device):
    """The GPUs of this machine. Kernels are compiled for a device when it is first used."""

    name = "cuda"

    def __init__(self) -> None:
        # Of this object: modules belong to torch's context of a device, and end with the process.
        self._function = lru_cache(maxsize=None)(self._load_function)
        self._module = lru_cache(maxsize=None)(self._load_module)
        self._side = lru_cache(maxsize=None)(lambda where, to_device: torch.cuda.Stream(where))

    def launch(self, kernel, job, where, blocks, threads, shared):
        with torch.cuda.device(where):
            stream = ctypes.c_void_p(torch.cuda.current_stream(where).cuda_stream)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
            function = self._function(kernel, torch.cuda.current_device())
            _call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, shared, stream, arguments, None)

    def pinned(self, num_bytes):
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy_aside(self, pairs, where):
        # A stream for each direction: they do not wait for each other.
        now, side = torch.cuda.current_stream(where), self._side(where, pairs[0][0].is_cuda)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.is_cuda else source).record_stream(side)
        event = torch.cuda.Event(blocking=True)
        event.record(side)
        now.wait_event(event)
        return event.synchronize

    def wait(self, where):
        # A blocking event: several ranks share a machine's cores, and one that waits must not spin.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(where))
        event.synchronize()

    def _load_module(self, index: int) -> ctypes.c_void_p:
        major, minor = torch.cuda.get_device_capability(index)
        module, code = ctypes.c_void_p(), nvrtc.compiled(f"sm_{major}{minor}")
        _call("cuModuleLoadData", ctypes.byref(module), code)
        return module

    def _load_function(self, kernel: str, index: int) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(function), self._module(index), kernel.encode())
        return function


def _call(function: str, *arguments) -> None:
    if status := getattr(_driver(), function)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DeviceError(f"the CUDA driver's {function} failed: {(text.value or b'unknown').decode()}")
