"""The binding of the compiled core, csrc/qgenx.h: buffers are checked here, errors come back as values.

The functions are called through ctypes, which releases the GIL for the time of a call. ``backend.name`` says which path
is in use: "avx2" or "portable" of the compiled core, or "reference", the specification in plain torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
)
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

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
    """What the core refused a payload for, in one sentence that names the field."""


class _Book(Structure):
    _fields_ = [
        ("coder", c_uint32),
        ("num_levels", c_uint32),
        ("hash", c_uint64),
        ("levels", c_float * (_MAX_LEVELS + 1)),
        ("lengths", c_uint8 * (2 * _MAX_LEVELS + 1)),
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


class Segments:
    """Where the coordinates of a list of segments lie, in the form in which the core takes it.

    An exchange makes it once of its gradients and hands it to several calls. It keeps the tensors alive; it is wrong
    once one of them gets other memory, as by ``set_`` or ``resize_``.

    Args:
        tensors: contiguous float32 tensors of any shape on the CPU.

    Attributes:
        sizes: a ctypes array of uint64, the coordinates of each.
        pointers: a ctypes array of uint64, where each begins.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._owners = tuple(tensors)
        for tensor in self._owners:
            if not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()):
                _check(tensor, torch.float32)
        self.sizes = _integers(list(map(Tensor.numel, self._owners)))
        self.pointers = _integers(list(map(Tensor.data_ptr, self._owners)))

    @classmethod
    def cut(cls, vector: Tensor, sizes: Sequence[int]) -> Segments:
        """A contiguous float32 vector on the CPU, cut into segments of ``sizes`` coordinates."""
        segments = cls((vector,))
        if sum(sizes) != vector.numel():
            raise ValueError(f"sizes must add up to the vector's {vector.numel()} coordinates, got {sum(sizes)}")
        if len(sizes) != 1:
            first, begins = segments.pointers[0], list(accumulate(sizes, initial=0))[:-1]
            segments.sizes = _integers(sizes)
            segments.pointers = _integers([first + 4 * begin for begin in begins])
        return segments

    @classmethod
    def of(cls, tensors: Segments | Sequence[Tensor]) -> Segments:
        return tensors if isinstance(tensors, Segments) else cls(tensors)

    def __len__(self) -> int:
        return len(self.sizes)


def _integers(values: Sequence[int]) -> Array:
    """A ctypes array of uint64, by way of ``array``, since ctypes converts a list slowly."""
    return (c_uint64 * len(values)).from_buffer(array("Q", values))


@dataclass(frozen=True)
class Measured:
    """What an encoding tells beside its payload; the sums are over the coordinates of segments that are not spoiled.

    Attributes:
        counts: int64[s + 1], how often each magnitude's index was drawn.
        squared_error: sum of (decoded - v)^2, with ``decoded`` as receivers compute it and each difference rounded to
            float32.
        squared_norm: sum of v^2.
        spoiled: bool[num_segments], whether a coordinate, or an L2 norm, is not finite: all of it is sent as NaN.
    """

    counts: Tensor
    squared_error: float
    squared_norm: float
    spoiled: Tensor


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


def layout(sizes: Sequence[int], min_numel: int, bucket_size: int) -> _Layout:
    """Segments of ``sizes`` coordinates, or ``Segments.sizes``; those of at least ``min_numel`` have buckets."""
    sizes = sizes if isinstance(sizes, Array) else _integers(sizes)
    return _Layout(sizes, len(sizes), min_numel, bucket_size)


def encoding(
    norm: int, key: Sequence[int] = (0, 0, 0, 0), mixed: Sequence[int] = (0, 0), inline: bool = False
) -> _Encoding:
    """What else a payload depends on; ``key`` is (seed, step, rank, stream), ``mixed`` its two words."""
    return _Encoding(*key, (c_uint32 * 2)(*mixed), norm, inline)


def bound(codebook: _Book, cut: _Layout, inline: bool) -> int:
    """Bytes of the largest payload."""
    found = c_uint64()
    _call("qgenx_bound", byref(codebook), byref(cut), c_int(inline), byref(found))
    return found.value


def encode(
    codebook: _Book,
    cut: _Layout,
    how: _Encoding,
    segments: Segments | Sequence[Tensor],
    out: Tensor,
    measure: bool = False,
) -> tuple[int, Measured | None]:
    """Writes a payload to the start of ``out``, uint8, and returns its bytes; and what ``measure`` asks for."""
    segments = _fit(cut, segments)
    size, report, measured = c_uint64(), None, None
    if measure:
        error, norm = c_double(), c_double()
        counts = torch.empty(codebook.num_levels + 1, dtype=torch.int64)
        spoiled = torch.empty(len(segments), dtype=torch.bool)
        report = byref(_Report(counts.data_ptr(), pointer(error), pointer(norm), spoiled.data_ptr()))
    _call(
        "qgenx_encode", byref(codebook), byref(cut), byref(how), segments.pointers, _pointer(out, torch.uint8),
        c_uint64(len(out)), byref(size), report, *_how(),
    )  # fmt: skip
    if measure:
        measured = Measured(counts, error.value, norm.value, spoiled)
    return size.value, measured


def parse(payload: Tensor, expected: int | None) -> int:
    """The coordinates of a payload whose header and sections fit its bytes."""
    numel = c_uint64()
    at = _pointer(payload, torch.uint8)
    wanted = -1 if expected is None else expected
    _call("qgenx_parse", at, c_uint64(len(payload)), c_int64(wanted), byref(numel), _PATHS[backend.name])
    return numel.value


def decode_mean(
    codebook: _Book,
    payloads: Sequence[Tensor],
    targets: Segments | Sequence[Tensor],
    sections: Tensor | None = None,
    divisor: float | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Overwrites each target with (float32 sum of its sections, in the payloads' order) / ``divisor`` * ``factor``.

    Args:
        codebook: of payloads that bring none.
        payloads: 1-D uint8 tensors.
        targets: contiguous float32 tensors on the CPU; one that no payload has keeps its values.
        sections: int32[num_payloads, num_targets]: which section of each payload is added to each target, -1 where it
            has none, which counts as zero, as does a section of no coordinates. None is each target's own number.
        divisor: None is the number of payloads.
        factor: of the quotient, rounded by itself.

    Returns:
        bool[num_targets], whether a payload's norm or raw coordinate in it is NaN.

    Raises:
        CoreError: if a payload is damaged or does not hold what the targets need.
    """
    targets, payloads = Segments.of(targets), [_check(payload, torch.uint8) for payload in payloads]
    where = None if sections is None else _pointer(sections, torch.int32, len(payloads) * len(targets))
    target = _Target(targets.sizes, targets.pointers, where, len(targets))
    broken = torch.empty(len(targets), dtype=torch.bool)
    _call(
        "qgenx_decode_mean", byref(codebook), _integers([payload.data_ptr() for payload in payloads]),
        _integers([len(payload) for payload in payloads]), c_uint32(len(payloads)),
        byref(target), c_float(len(payloads) if divisor is None else divisor), c_float(factor),
        c_void_p(broken.data_ptr()), *_how(),
    )  # fmt: skip
    return broken


def statistics(
    cut: _Layout, norm: int, segments: Segments | Sequence[Tensor], form: str, minimum: int
) -> tuple[int, Tensor, Tensor]:
    """Exponent and the two parts of ``adaptation.Statistics``: int64[NUM_BINS] each, or int64[3]."""
    segments = _fit(cut, segments)
    exponent, integers = c_int32(), torch.empty(2, NUM_BINS if form == "histogram" else 3, dtype=torch.int64)
    _call(
        "qgenx_statistics", byref(cut), c_int(norm), segments.pointers, FORMS.index(form), byref(exponent),
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
        raise _ERRORS[status](message.value.decode())


def _how() -> tuple[c_int, int]:
    return c_int(torch.get_num_threads()), _PATHS[backend.name]


def _fit(cut: _Layout, segments: Segments | Sequence[Tensor]) -> Segments:
    segments = Segments.of(segments)
    if len(segments) != cut.num_segments or _bytes(cut.sizes, len(segments)) != bytes(segments.sizes):
        raise ValueError("the segments must have the coordinates that the layout gives them")
    return segments


def _bytes(integers, count: int) -> bytes:
    return ctypes.string_at(integers, 8 * count)


def _pointer(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> c_void_p:
    return c_void_p(_check(tensor, dtype, numel).data_ptr())


def _check(tensor: Tensor, dtype: torch.dtype, numel: int | None = None) -> Tensor:
    fits = tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not fits or (numel is not None and tensor.numel() != numel):
        raise ValueError(f"the core needs a contiguous {dtype} tensor of {numel} elements, got {tensor.dtype}")
    return tensor


_ERRORS = {1: CoreError, 2: ValueError, 3: MemoryError}  # by qgenx_status
backend = _find()
