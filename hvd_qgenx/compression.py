"""The choices of compression."""

from __future__ import annotations

from hvd_qgenx.automatic import AutoCompressor
from hvd_qgenx.compressor import QGenXCompressor
from hvd_qgenx.uncoded import FP16Compressor, NoneCompressor


class Compression:
    """The choices: ``none``, ``fp16``, ``qgenx``, and ``auto``, the fastest of them here; ``none`` and ``fp16`` are as
    in Horovod."""

    none = NoneCompressor
    fp16 = FP16Compressor
    qgenx = QGenXCompressor()
    auto = AutoCompressor()
