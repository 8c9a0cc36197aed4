"""Compressors that code nothing, as Horovod has them."""

from __future__ import annotations

from torch import Tensor


class NoneCompressor:
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: Tensor):
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx):
        return tensor


class FP16Compressor:
    """Sends floating-point tensors as float16."""

    @staticmethod
    def compress(tensor: Tensor):
        return (tensor.half(), tensor.dtype) if tensor.is_floating_point() else (tensor, None)

    @staticmethod
    def decompress(tensor: Tensor, ctx):
        return tensor if ctx is None else tensor.to(ctx)
