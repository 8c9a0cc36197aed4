"""The binding of the compiled core, csrc/qgenx.h: buffers are checked here, errors come back as values.

The functions are called through ctypes, which releases the GIL for the time of a call. ``backend.name`` says which path
is in use: "avx2" or "portable" of the compiled core, or "reference", the specification in plain torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hvd_qgenx.distribution import NUM_BINS

BACKENDS = ("avx2", "portable", "reference")
FORMS = ("histogram", "normal")
SWITCH = "HVD_QGENX_BACKEND"
_PATHS = {"portable": 0, "avx2": 1}
_MESSAGE = 256
_MAX_LEVELS = 127


class CoreError(Exception):
    """What the core refused, in one sentence; ``is_payload`` if a payload was to blame, not an argument."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.is_payload = status == 1


class _Book(Structure):
    _fields_ = [
        ("coder", c_uint32),
        ("num_levels", c_uint32),
        ("hash", c_uint64),
        ("levels", c_float * (_MAX_LEVELS + 1)),
        ("lengths", c_uint8 * (2 * _MAX_LEVELS + 1)),
    ]


class _Job(Structure):
    _fields_ = [
        ("sizes", POINTER(c_uint64)),
        ("num_segments", c_uint32),
        ("min_numel", c_uint32),
        ("bucket_size", c_uint32),
        ("norm", c_uint32),
        ("seed", c_uint64),
        ("step", c_uint64),
        ("rank", c_uint32),
        ("stream", c_uint32),
        ("key", c_uint32 * 2),
        ("inline_codebook", c_uint32),
    ]


@dataclass
class Backend:
    """Which path the codec takes; change it by ``force`` alone."""

    name: str


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("hvd_qgenx._core")
    if spec is None:
        raise ImportError(
            "hvd_qgenx._core is not there: install hvd_qgenx with pip, which compiles it, "
            f"or set {SWITCH}=reference for the slow path in plain torch"
        )
    library = ctypes.CDLL(spec.origin)
    library.qgenx_squared_error.restype = None
    return library


def _find() -> Backend:
    asked = os.environ.get(SWITCH)
    if asked == "reference":
        return Backend(asked)
    best = "avx2" if _library().qgenx_best_path() == _PATHS["avx2"] else "portable"
    if asked not in (None, best, "portable"):
        raise ImportError(f"{SWITCH} must be one of {', '.join(BACKENDS)} that this machine has, got {asked!r}")
    return Backend(asked or best)


@contextmanager
def force(name: str) -> Iterator[None]:
    """For tests: everything inside runs on the backend of that name."""
    before = backend.name
    backend.name = name
    try:
        yield
    finally:
        backend.name = before


def compiled() -> bool:
    """Whether the core is in use."""
    return backend.name != "reference"


def book(coder: int, levels: Sequence[float], lengths: Sequence[int], identity: int) -> _Book:
    """Levels l_0 ... l_s, the bits of the code words of -s ... s (none for the fixed code), and their hash."""
    count = len(levels)
    floats, bytes_ = (c_float * (_MAX_LEVELS + 1))(*levels), (c_uint8 * (2 * _MAX_LEVELS + 1))(*lengths)
    return _Book(coder, count - 1, identity, floats, bytes_)


def job(
    sizes: Sequence[int],
    min_numel: int,
    bucket_size: int,
    norm: int,
    key: Sequence[int] = (0, 0, 0, 0),
    words: Sequence[int] = (0, 0),
    inline: bool = False,
) -> _Job:
    """How a vector is cut, and what its header says; ``key`` is (seed, step, rank, stream)."""
    array = (c_uint64 * len(sizes))(*sizes)
    return _Job(array, len(sizes), min_numel, bucket_size, norm, *key, (c_uint32 * 2)(*words), inline)


def bound(codebook: _Book, cut: _Job) -> int:
    found = c_uint64()
    _call("qgenx_bound", byref(codebook), byref(cut), byref(found))
    return found.value


def encode(codebook: _Book, cut: _Job, vector: Tensor, out: Tensor, counts: Tensor | None = None) -> int:
    """Writes a payload to the start of ``out``, uint8, and returns its bytes; counts int64[s + 1] of the indices."""
    _check(vector, torch.float32, _numel(cut))
    size = c_uint64()
    where = None if counts is None else _pointer(counts, torch.int64, codebook.num_levels + 1)
    _call(
        "qgenx_encode", byref(codebook), byref(cut), _pointer(vector, torch.float32), _pointer(out, torch.uint8),
        c_uint64(len(out)), byref(size), where, *_how(),
    )  # fmt: skip
    return size.value


def parse(payload: Tensor, expected: int | None) -> int:
    """The coordinates of a payload whose header and sections fit its bytes."""
    numel = c_uint64()
    at = _pointer(payload, torch.uint8)
    wanted = -1 if expected is None else expected
    _call("qgenx_parse", at, c_uint64(len(payload)), c_int64(wanted), byref(numel), _PATHS[backend.name])
    return numel.value


def decode_mean(codebook: _Book, payloads: Sequence[Tensor], out: Tensor) -> None:
    """Overwrites ``out``, float32[numel], with the mean of the payloads' vectors."""
    pointers = (ctypes.c_void_p * len(payloads))(*(payload.data_ptr() for payload in payloads))
    sizes = (c_uint64 * len(payloads))(*map(len, payloads))
    _call(
        "qgenx_decode_mean", byref(codebook), pointers, sizes, c_uint32(len(payloads)),
        _pointer(out, torch.float32), c_uint64(len(out)), *_how(),
    )  # fmt: skip


def statistics(cut: _Job, vector: Tensor, form: str, minimum: int) -> tuple[int, Tensor, Tensor]:
    """Exponent and the two parts of ``adaptation.Statistics``: int64[NUM_BINS] each, or int64[3]."""
    _check(vector, torch.float32, _numel(cut))
    exponent, integers = c_int32(), torch.empty(2, NUM_BINS if form == "histogram" else 3, dtype=torch.int64)
    _call(
        "qgenx_statistics", byref(cut), _pointer(vector, torch.float32), FORMS.index(form), byref(exponent),
        c_int32(minimum), _pointer(integers[0], torch.int64), _pointer(integers[1], torch.int64), *_how(),
    )  # fmt: skip
    return exponent.value, integers[0], integers[1]


def squared_error(vector: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Sums of (decoded - vector)^2 and of vector^2, over coordinates whose ``decoded`` is finite."""
    _check(decoded, torch.float32, len(vector))
    error, norm = c_double(), c_double()
    at, other = _pointer(vector, torch.float32), _pointer(decoded, torch.float32)
    threads = c_int(torch.get_num_threads())
    _library().qgenx_squared_error(at, other, c_uint64(len(vector)), byref(error), byref(norm), threads)
    return error.value, norm.value


def _call(function: str, *arguments) -> None:
    message = ctypes.create_string_buffer(_MESSAGE)
    status = getattr(_library(), function)(*arguments, message)
    if status:
        raise CoreError(status, message.value.decode())


def _how() -> tuple[c_int, int]:
    return c_int(torch.get_num_threads()), _PATHS[backend.name]


def _numel(cut: _Job) -> int:
    return sum(cut.sizes[: cut.num_segments])


def _pointer(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_check(tensor, dtype, numel).data_ptr())


def _check(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> Tensor:
    fits = tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not fits or (numel is not None and tensor.numel() != numel):
        raise ValueError(f"the core needs a contiguous {dtype} tensor of {numel} elements, got {tensor.dtype}")
    return tensor


backend = _find()
