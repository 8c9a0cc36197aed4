"""The binding of the compiled core, csrc/qgenx.h: buffers are checked here, and a refusal becomes an exception.

The functions are called through ctypes, which releases the GIL for the time of a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64
from functools import cache, lru_cache
from importlib import util

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
        ("pair", c_uint32 * 2),
        ("inline_codebook", c_uint32),
    ]


@cache
def _library() -> ctypes.CDLL:
    spec = util.find_spec("hvd_qgenx._core")
    if spec is None or spec.origin is None:
        raise ImportError(
            "hvd_qgenx._core is not there: install hvd_qgenx with pip, which compiles it, "
            "or set HVD_QGENX_BACKEND=specification for the slow path in plain torch"
        )
    library = ctypes.CDLL(spec.origin)
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
        vector = _joined(segments, layout.numel)
        job, counts, size = _job(norm, layout, key, inline), no_counts(codebook), c_uint64()
        _call(
            "qgenx_encode", byref(_book(codebook)), byref(job), _pointer(vector, torch.float32),
            _pointer(out, torch.uint8), c_uint64(len(out)), byref(size), _pointer(counts, torch.int64), *self._how(),
        )  # fmt: skip
        decoded = torch.empty(layout.numel, dtype=torch.float32, device="cpu")
        broken = self.decode_mean(codebook, [out[: size.value]], decoded.split(list(layout.sizes)))
        return Drawn(size.value, counts, *self.squared_error(vector, decoded), broken)

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        if sections is not None:
            return self._by_sections(codebook, payloads, targets, sections, factor)
        vector = torch.empty(sum(map(len, targets)), dtype=torch.float32, device="cpu")
        pointers = (ctypes.c_void_p * len(payloads))(*(payload.data_ptr() for payload in payloads))
        sizes = (c_uint64 * len(payloads))(*map(len, payloads))
        _call(
            "qgenx_decode_mean", byref(_book(codebook)), pointers, sizes, c_uint32(len(payloads)),
            _pointer(vector, torch.float32), c_uint64(len(vector)), *self._how(),
        )  # fmt: skip
        for target, part in zip(targets, vector.split([len(target) for target in targets]), strict=True):
            target.copy_(part * factor if factor != 1.0 else part)
        return tuple(not bool(target.isfinite().all()) for target in targets)

    def _by_sections(self, codebook, payloads, targets, sections, factor):
        sizes = [self.parse(payload).layout.sizes for payload in payloads]
        if all(own == sizes[0] for own in sizes) and all(list(own) == list(range(len(sizes[0]))) for own in sections):
            return self.decode_mean(codebook, payloads, targets, None, factor)
        decoded = []
        for payload, own in zip(payloads, sizes):
            vector = torch.empty(sum(own))
            self.decode_mean(codebook, [payload], [vector])
            decoded.append(vector.split(list(own)))
        for index, target in enumerate(targets):
            parts = [d[own[index]] for d, own in zip(decoded, sections) if len(d[own[index]])]
            if parts:
                total = parts[0].clone()
                for part in parts[1:]:
                    total.add_(part)
                target.copy_(total.div_(len(payloads)) * factor)
        return tuple(not bool(target.isfinite().all()) for target in targets)

    def parse(self, payload, numel=None):
        found, wanted = c_uint64(), -1 if numel is None else numel
        _call(
            "qgenx_parse", _pointer(payload, torch.uint8), c_uint64(len(payload)), c_int64(wanted), byref(found),
            self._path,
        )  # fmt: skip
        return read_header(memoryview(payload.numpy()))

    def statistics(self, norm, layout, segments, form):
        vector, exponent = _joined(segments, layout.numel), c_int32()
        size = NUM_BINS if form == "histogram" else 3
        integers = torch.empty(2, size, dtype=torch.int64, device="cpu")
        _call(
            "qgenx_statistics", byref(_job(norm, layout)), _pointer(vector, torch.float32), FORMS.index(form),
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
def _book(codebook: Codebook) -> _Codebook:
    """The core's form of a codebook, kept: a new one is made only when levels are fitted."""
    levels = (c_float * (MAX_LEVELS + 1))(*codebook.levels.values)
    lengths = (c_uint8 * (2 * MAX_LEVELS + 1))(*codebook.code.lengths)
    return _Codebook(CODERS.index(codebook.coder), codebook.levels.num_levels, codebook.hash, levels, lengths)


def _job(norm: str, layout: Layout, key: Key | None = None, inline: bool = False) -> _Job:
    key = key or Key(0, 0, 0)
    sizes = (c_uint64 * len(layout.sizes))(*layout.sizes)
    return _Job(
        sizes, len(sizes), layout.min_numel, layout.bucket_size, NORMS.index(norm),
        key.seed, key.step, key.rank, key.stream, (c_uint32 * 2)(*key.pair), inline,
    )  # fmt: skip


def _joined(segments: Sequence[Tensor], numel: int) -> Tensor:
    vector = (
        segments[0] if len(segments) == 1 else torch.cat([*segments, torch.zeros(0, dtype=torch.float32, device="cpu")])
    )
    return _check(vector, torch.float32, numel)


def _call(function: str, *arguments) -> None:
    """Calls the core; only what it says of a payload blames one."""
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
