"""The binding of the compiled core, csrc/qgenx.h: buffers are checked here, and a refusal becomes an exception.

The functions are called through ctypes, which releases the GIL for the time of a call.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Array,
    Structure,
    byref,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
    pointer,
)  # fmt: skip
from functools import cache, lru_cache
from importlib import resources
from itertools import chain

import torch
from torch import Tensor

from hvd_qgenx.backends.backend import FORMS, Backend, Drawn, no_counts
from hvd_qgenx.codebook import CODERS, Codebook
from hvd_qgenx.fitting import NUM_BINS
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import MAX_LEVELS, NORMS
from hvd_qgenx.payload import PayloadError, read_header

_PATHS = {"portable": 0, "avx2": 1}
_MESSAGE = 256
_BAD_PAYLOAD, _BAD_ARGUMENT, _NO_MEMORY = 1, 2, 3
_NO_WEIGHT = -(2**15)  # exponent of statistics without weight


class _Codebook(Structure):
    _fields_ = [
        ("coder", c_uint32),
        ("num_levels", c_uint32),
        ("hash", c_uint64),
        ("levels", c_float * (MAX_LEVELS + 1)),
        ("lengths", c_uint8 * (2 * MAX_LEVELS + 1)),
    ]


class _Layout(Structure):
    _fields_ = [
        ("sizes", POINTER(c_uint64)),
        ("num_segments", c_uint32),
        ("min_numel", c_uint32),
        ("bucket_size", c_uint32),
    ]


class _Encoding(Structure):
    _fields_ = [
        ("seed", c_uint64),
        ("step", c_uint64),
        ("rank", c_uint32),
        ("stream", c_uint32),
        ("key", c_uint32 * 2),
        ("norm", c_uint32),
        ("inline_codebook", c_uint32),
    ]


class _Report(Structure):
    _fields_ = [
        ("counts", c_void_p),
        ("squared_error", POINTER(c_double)),
        ("squared_norm", POINTER(c_double)),
        ("spoiled", c_void_p),
    ]


class _Target(Structure):
    _fields_ = [
        ("sizes", POINTER(c_uint64)),
        ("segments", POINTER(c_uint64)),
        ("sections", c_void_p),
        ("num_segments", c_uint32),
    ]


@cache
def _library() -> ctypes.CDLL:
    path = resources.files("hvd_qgenx") / "libqgenx.so"
    if not path.is_file():
        raise ImportError(
            f"{path.name} is not there: install hvd_qgenx with pip, which compiles it, "
            "or set HVD_QGENX_BACKEND=specification for the slow path in plain torch"
        )
    library = ctypes.CDLL(str(path))
    library.qgenx_squared_error.restype = None
    return library


def best_path() -> str:
    """The fastest path that this machine has: "avx2" or "portable"."""
    return "avx2" if _library().qgenx_best_path() == _PATHS["avx2"] else "portable"


class Compiled(Backend):
    """The five functions of the compiled core, by one of its paths, on as many threads as torch was told to use."""

    def __init__(self, path: str):
        self.name, self._path = path, _PATHS[path]

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        # The core believes pointers: what does not fit the layout must stop here.
        lengths, pointers = _segments(segments)
        if lengths != list(layout.sizes):
            raise ValueError(f"segments must have the layout's {layout.numel} coordinates, got {sum(lengths)}")
        counts, error, total, size = no_counts(codebook), c_double(), c_double(), c_uint64()
        spoiled = (c_uint8 * len(lengths))()
        report = _Report(counts.data_ptr(), pointer(error), pointer(total), ctypes.addressof(spoiled))
        _call(
            "qgenx_encode", byref(_codebook(codebook)), byref(_layout(layout)), byref(_encoding(key, norm, inline)),
            pointers, _pointer(out, torch.uint8), c_uint64(len(out)), byref(size), byref(report), *self._how(),
        )  # fmt: skip
        return Drawn(size.value, counts, error.value, total.value, tuple(map(bool, spoiled)))

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        lengths, pointers = _segments(targets)
        places = None if sections is None else _places(sections, len(lengths))
        target = _Target(_integers(lengths), pointers, places and ctypes.addressof(places), len(lengths))
        broken = (c_uint8 * len(lengths))()
        _call(
            "qgenx_decode_mean", byref(_codebook(codebook)), _integers([one.data_ptr() for one in payloads]),
            _integers(list(map(len, payloads))), c_uint32(len(payloads)), byref(target), c_float(len(payloads)),
            c_float(factor), broken, *self._how(),
        )  # fmt: skip
        return tuple(map(bool, broken))

    def parse(self, payload, numel=None):
        found, wanted = c_uint64(), -1 if numel is None else numel
        _call(
            "qgenx_parse", _pointer(payload, torch.uint8), c_uint64(len(payload)), c_int64(wanted), byref(found),
            self._path,
        )  # fmt: skip
        return read_header(memoryview(payload.numpy()))

    def statistics(self, norm, layout, segments, form):
        lengths, pointers = _segments(segments)
        if lengths != list(layout.sizes):
            raise ValueError(f"segments must have the layout's {layout.numel} coordinates, got {sum(lengths)}")
        exponent, size = c_int32(), NUM_BINS if form == "histogram" else 3
        integers = torch.empty(2, size, dtype=torch.int64, device="cpu")
        _call(
            "qgenx_statistics", byref(_layout(layout)), NORMS.index(norm), pointers, FORMS.index(form),
            byref(exponent), c_int32(_NO_WEIGHT), _pointer(integers[0], torch.int64),
            _pointer(integers[1], torch.int64), *self._how(),
        )  # fmt: skip
        return exponent.value, integers[0], integers[1]

    def squared_error(self, vector, decoded):
        error, norm = c_double(), c_double()
        first, second = _pointer(vector, torch.float32, len(decoded)), _pointer(decoded, torch.float32)
        threads = c_int(torch.get_num_threads())
        _library().qgenx_squared_error(first, second, c_uint64(len(vector)), byref(error), byref(norm), threads)
        return error.value, norm.value

    def _how(self) -> tuple[c_int, int]:
        return c_int(torch.get_num_threads()), self._path


@lru_cache(maxsize=16)
def _codebook(codebook: Codebook) -> _Codebook:
    """The core's form of a codebook, kept: a new one is made only when levels are fitted."""
    levels = (c_float * (MAX_LEVELS + 1))(*codebook.levels.values)
    lengths = (c_uint8 * (2 * MAX_LEVELS + 1))(*codebook.code.lengths)
    return _Codebook(CODERS.index(codebook.coder), codebook.levels.num_levels, codebook.hash, levels, lengths)


def _layout(layout: Layout) -> _Layout:
    return _Layout(_integers(layout.sizes), len(layout.sizes), layout.min_numel, layout.bucket_size)


def _encoding(key: Key, norm: str, inline: bool) -> _Encoding:
    # Mixed here, once a payload: the core has no part in how keys are made.
    mixed = (c_uint32 * 2)(*key.pair)
    return _Encoding(key.seed, key.step, key.rank, key.stream, mixed, NORMS.index(norm), inline)


def _segments(tensors: Sequence[Tensor]) -> tuple[list[int], Array]:
    """The coordinates of each tensor, and where each begins."""
    # Cheap questions first: they are asked of every parameter in every exchange.
    for tensor in tensors:
        if not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()):
            _check(tensor, torch.float32)
    return list(map(Tensor.numel, tensors)), _integers(list(map(Tensor.data_ptr, tensors)))


def _integers(values: Sequence[int]) -> Array:
    """A ctypes array of uint64, by way of ``array``, since ctypes converts a list slowly."""
    return (c_uint64 * len(values)).from_buffer(array("Q", values)) if values else (c_uint64 * 0)()


def _places(sections: Sequence[Sequence[int]], count: int) -> Array:
    """int32[payloads x targets], the section of each payload for each target."""
    flat = array("i", chain.from_iterable(sections))
    if any(len(own) != count for own in sections):
        raise ValueError(f"sections must name one for each of the {count} targets")
    return (c_int32 * len(flat)).from_buffer(flat) if flat else (c_int32 * 0)()


def _call(function: str, *arguments) -> None:
    """Calls the core; only what it says of a payload blames one."""
    # A buffer of its own for each call: several threads may be in the core at once.
    message = ctypes.create_string_buffer(_MESSAGE)
    status = getattr(_library(), function)(*arguments, message)
    if status:
        text = message.value.decode()
        kind = {_BAD_PAYLOAD: PayloadError, _BAD_ARGUMENT: ValueError, _NO_MEMORY: MemoryError}[status]
        raise kind(f"payload: {text}" if status == _BAD_PAYLOAD else text)


def _pointer(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_check(tensor, dtype, numel).data_ptr())


def _check(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> Tensor:
    fits = tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not fits or (numel is not None and tensor.numel() != numel):
        wanted = "" if numel is None else f" of {numel} elements"
        raise ValueError(f"the core needs a contiguous {dtype} tensor on the CPU{wanted}, got {tensor.dtype}")
    return tensor
