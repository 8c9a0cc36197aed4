"""The five functions on a device: kernels do the buckets, the compiled core the rest, and payloads lie on the CPU.

A gradient never comes to the host: its norms, lengths and code do, each section to its place in the payload. Before the
first bucket of a received payload is read the host has checked all but the code words.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Backend, device_of
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda import host
from hvd_qgenx.backends.cuda.decoding import Decoding
from hvd_qgenx.backends.cuda.device import Device, DeviceError
from hvd_qgenx.backends.cuda.encoding import Encoding
from hvd_qgenx.backends.cuda.jobs import COPIES, WARPS, MeasureJob
from hvd_qgenx.backends.cuda.resident import Resident, check_pointers, check_segments, grid
from hvd_qgenx.backends.failures import failures_of
from hvd_qgenx.fitting import NUM_BINS

_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 2**22  # coordinates of a squared error at once
_WEIGHT_BITS, _NO_WEIGHT = 20, -(2**15)


class Kernels(Backend):
    """Vectors on one kind of device. Arguments: the device."""

    def __init__(self, device: Device):
        self.device, self.name = device, device.name
        self._core = Compiled(best_path())
        self.resident = Resident(device)

    # ---- encode ------------------------------------------------------------------------------------------------------

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        with failures_of(self.name):
            return self._encode(codebook, norm, layout, key, segments, out, inline)
        with failures_of(self.name, falls_back=False):
            copies = [segment.cpu() for segment in segments]
            return self._core.encode(codebook, norm, layout, key, copies, out, inline)

    def _encode(self, codebook, norm, layout, key, segments, out, inline):
        check_segments(segments, layout)
        where = device_of(segments, out.device)
        encoding = Encoding(self.resident, codebook, norm, layout, key, segments, where)
        raw = [segment.reshape(-1) for segment in segments if segment.numel() < layout.min_numel]
        raw = torch.cat(raw).cpu().split(list(map(len, raw))) if raw else []
        begun = host.begin(codebook, norm, layout, key, raw, out, inline)
        if not encoding.cut.num_buckets:
            return encoding.drawn(begun, host.seal(out, begun.places.coded))
        encoding.start()
        self.device.wait(where)
        if host.spoil(layout, encoding.norms, begun.spoiled):
            # Only now is it known that all buckets of a segment must be NaN: rare enough to code everything again.
            encoding.start(again=True)
            self.device.wait(where)
        end = encoding.deliver(begun.places, out)
        self.device.wait(where)
        return encoding.drawn(begun, host.seal(out, end))

    # ---- decode ------------------------------------------------------------------------------------------------------

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        with failures_of(self.name):
            return self._decode_mean(codebook, payloads, targets, sections, factor)
        with failures_of(self.name, falls_back=False):
            copies = [target.cpu() for target in targets]
            broken = self._core.decode_mean(codebook, payloads, copies, sections, factor)
            for target, copy in zip(targets, copies, strict=True):
                target.copy_(copy)
            return broken

    def _decode_mean(self, codebook, payloads, targets, sections, factor):
        check_pointers(targets)
        lengths = list(map(Tensor.numel, targets))
        located = host.locate(codebook, payloads, lengths, sections, factor)
        where = device_of(targets, torch.device("cpu"))
        decoding = Decoding(self.resident, codebook, payloads, targets, located, where, factor)
        for first, end in decoding.groups():
            decoding.add(first, end)
        if decoding.refused():
            self._blame(codebook, payloads, targets, sections, factor)
        return tuple(map(_is_broken, located.most.tolist(), targets))

    def _blame(self, codebook, payloads, targets, sections, factor) -> None:
        """Raises what the core says of payloads that a kernel has refused."""
        copies = [torch.zeros(target.numel(), dtype=torch.float32, device="cpu") for target in targets]
        self._core.decode_mean(codebook, payloads, copies, sections, factor)
        raise DeviceError(f"{self.name} refuses a payload that the CPU can read: its memory or its kernels are damaged")

    def parse(self, payload, numel=None):
        return self._core.parse(payload, numel)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def statistics(self, norm, layout, segments, form):
        with failures_of(self.name):
            return self._statistics(norm, layout, segments, form)
        with failures_of(self.name, falls_back=False):
            return self._core.statistics(norm, layout, [segment.cpu() for segment in segments], form)

    def _statistics(self, norm, layout, segments, form):
        check_segments(segments, layout)
        where = device_of(segments, torch.device("cpu"))
        cut, size = self.resident.cut(layout, where), NUM_BINS if form == "histogram" else 3
        sums = torch.zeros(2, COPIES, size, dtype=torch.int64, device=where)
        if not cut.num_buckets:
            return _NO_WEIGHT, *sums.sum(dim=1).cpu()
        pointers = self.resident.pointers(segments, where)
        norms = torch.empty(cut.num_buckets, dtype=torch.float32, device=where)
        job = MeasureJob(
            cut.buckets.data_ptr(), pointers.data_ptr(), cut.num_buckets, norms.data_ptr(), linf=norm == "linf"
        )
        self.device.launch("norms", job, where, *grid(cut.num_buckets), 0)
        found = norms.cpu().numpy().copy()
        host.spoil(layout, found, None)
        exponent, weights = _weights(found)
        kept = self.device.upload(np.concatenate([found.view(np.uint32), weights]), where)
        job.norms, job.weights = kept.data_ptr(), kept.data_ptr() + 4 * cut.num_buckets
        job.weighted, job.plain = sums[0].data_ptr(), sums[1].data_ptr()
        shared = 4 * (NUM_BINS + 3) * WARPS if form == "histogram" else 0
        self.device.launch(
            "histogram" if form == "histogram" else "moments", job, where, *grid(cut.num_buckets), shared
        )
        return exponent, *sums.sum(dim=1).cpu()

    def squared_error(self, vector, decoded):
        sums = torch.zeros(2, dtype=torch.float64, device=vector.device)
        for value, found in zip(vector.split(_BLOCK), decoded.split(_BLOCK), strict=True):
            finite = found.isfinite()
            value, found = value[finite].double(), found[finite].double()
            sums += torch.stack([(found - value).square().sum(), value.square().sum()])
        return tuple(sums.tolist())


def _is_broken(most: float, target: Tensor) -> bool:
    """Whether a mean is not finite; it is looked at only where that is possible at all."""
    if most < _LARGEST:
        return False
    return math.isnan(most) or not bool(target.isfinite().all())


def _weights(norms: np.ndarray) -> tuple[int, np.ndarray]:
    """What a bucket counts for, its squared norm in units of 2**exponent, as uint32; as the core has it."""
    squares = np.where(np.isfinite(norms), norms.astype(np.float64) ** 2, 0.0)
    heaviest = float(squares.max())
    exponent = math.frexp(heaviest)[1] - _WEIGHT_BITS if heaviest > 0 else _NO_WEIGHT
    return exponent, np.ldexp(squares, -exponent).astype(np.uint32) if heaviest > 0 else np.zeros(len(norms), np.uint32)
